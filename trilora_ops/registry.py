"""The kinds there are. Adding one is its file and its line here; nodes, file format and contract tests read this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

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

    def build(self, module: nn.Module, weight: torch.Tensor, generator: torch.Generator) -> Adapter:
        """The adapter of one frozen layer, on the CPU in fp32, equal to the identity.

        module: a linear layer or convolution; weight: its effective W0, (out, in, *kernel).
        """
        shape = LayerShape.of(module)
        transform = self.transform.build(shape, weight, generator)
        return Adapter(shape, transform, self.residual.build(shape, weight, generator))
