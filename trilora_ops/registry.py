"""The kinds there are. Adding one is its file and its line here; nodes, file format and contract tests read this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, LayerShape
from .errors import TriLoRAError
from .residuals.lora import LoraConfig
from .residuals.none import NoResidualConfig
from .residuals.tensor_ring import TensorRingResidualConfig
from .residuals.trilora import TriLoraConfig
from .transforms.block_orthogonal import BlockOrthogonalConfig
from .transforms.diagonal import DiagonalConfig
from .transforms.none import NoTransformConfig
from .transforms.tensor_ring import TensorRingConfig

TRANSFORMS: dict[str, type] = {c.kind: c for c in (NoTransformConfig, TensorRingConfig, DiagonalConfig, BlockOrthogonalConfig)}
RESIDUALS: dict[str, type] = {c.kind: c for c in (NoResidualConfig, LoraConfig, TriLoraConfig, TensorRingResidualConfig)}


def read_adapter_tensors(shape: LayerShape, transform: Mapping[str, Tensor], residual: Mapping[str, Tensor]) -> Adapter:
    """The adapter that a file's tensors make on a layer; names without the layer's name and the part's.

    Raises TriLoRAError where no kind, or more than one, knows the names, and where the shapes are another layer's.
    """
    return Adapter(shape, read_part("transform", shape, transform), read_part("residual", shape, residual))


def collect_tensors(file: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(transform's, residual's) tensors of the layer `name`, found by the names that the registered kinds declare."""
    return _collect(file, f"{name}.transform.", TRANSFORMS), _collect(file, f"{name}.residual.", RESIDUALS)


def read_part(part: str, shape: LayerShape, tensors: Mapping[str, Tensor]) -> nn.Module:
    """One half of an adapter, part "transform" or "residual"; see `read_adapter_tensors`."""
    kinds = {"transform": TRANSFORMS, "residual": RESIDUALS}[part]
    found = {type(module): module for config in kinds.values() if (module := config.read(shape, tensors)) is not None}
    if len(found) != 1:
        raise TriLoRAError(f"{part}: {'no' if not found else 'more than one'} kind reads the tensors {', '.join(sorted(tensors))}; "
                           f"this release knows {', '.join(kinds)}; update ComfyUI-TriLoRA")
    return next(iter(found.values()))


def is_known(part: str, names: Iterable[str]) -> bool:
    """Whether exactly these tensor names make a part of some registered kind; shapes are `read_part`'s business."""
    names = set(names)
    for config in {"transform": TRANSFORMS, "residual": RESIDUALS}[part].values():
        expected = set()
        for pattern in config.TENSORS:
            expected |= {pattern.replace("#", str(d)) for d in range(max(1, len(names)))} if "#" in pattern else {pattern}
        if expected == names:
            return True
    return False


def _collect(file: Mapping[str, Tensor], prefix: str, kinds: Mapping[str, type]) -> dict[str, Tensor]:
    tensors = {}
    for pattern in {pattern for config in kinds.values() for pattern in config.TENSORS}:
        number = 0
        while (name := pattern.replace("#", str(number))) not in tensors and prefix + name in file:
            tensors[name] = file[prefix + name]
            number += 1
    return tensors


@dataclass(frozen=True)
class Method:
    """A pair of configurations, W' = W0*T + R; what it builds on each layer is an `Adapter`."""

    residual: Any = field(default_factory=TriLoraConfig)
    transform: Any = field(default_factory=NoTransformConfig)

    def __post_init__(self):
        if self.residual.kind == "none" and self.transform.kind == "none":
            raise TriLoRAError("method=(none, none): a method needs a transform or a residual; choose one of "
                               f"{', '.join(k for k in RESIDUALS if k != 'none')}")

    @property
    def name(self) -> str:
        """The pair's name in files and reports: the residual's kind, with the transform's in front where there is one."""
        return "+".join(kind for kind in (self.transform.kind, self.residual.kind) if kind != "none")

    @property
    def form(self) -> str:
        """What its files hold: "svd", low-rank pairs in canonical form, or "transform", which needs this extension."""
        return "svd" if self.transform.kind == "none" else "transform"

    @property
    def options(self) -> dict:
        """All options of both halves, for metadata."""
        return {"transform": {"kind": self.transform.kind, **asdict(self.transform)}, "residual": {"kind": self.residual.kind, **asdict(self.residual)}}

    def build(self, module: nn.Module, weight: torch.Tensor, generator: torch.Generator) -> Adapter:
        """The adapter of one frozen layer, on the CPU in fp32, equal to the identity.

        module: a linear layer or convolution; weight: its effective W0, (out, in, *kernel).
        """
        shape = LayerShape.of(module)
        transform = self.transform.build(shape, weight, generator)
        return Adapter(shape, transform, self.residual.build(shape, weight, generator))
