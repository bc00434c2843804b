"""Our own layers with a transform, W_1 = W T + R, as the table of kinds sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..adapter import Adapter, LayerShape
from ..errors import TriLoRAError
from ..factors import LowRank
from ..registry import read_adapter_tensors
from ..tensorisation import numbered_cores
from .layer import BROKEN, OTHER_MODEL, Layer
from .numbers import LIMIT, largest, product_bound, whole_bound, worst

# the two halves of a layer with a transform: <layer>.transform.<tensor>, <layer>.residual.<tensor>
PARTS = ("transform", "residual")
_ROWS = 512  # of T at a time


def part_of(key: str) -> tuple[str, str, str] | None:
    """(layer, "transform" or "residual", tensor) of a key that holds a part of a layer with a transform, None for any
    other.

    A layer's own path may have these words in it: what follows the last of them must be a single name.
    """
    for part in PARTS:
        name, mark, tensor = key.rpartition(f".{part}.")
        if mark and "." not in tensor:
            return name, part, tensor
    return None


class TransformLayer(Layer):
    """W_1 = W T + R by the registered transforms and residuals, which check the tensors against the weight's shape."""

    LABEL = "transform"
    needs_the_weight = True
    READS_ALPHA = False

    @classmethod
    def read(cls, name, tensors, alpha) -> "TransformLayer":
        """See `Layer.read`. Raises TriLoRAError for a residual without a transform."""
        layer = cls(name, tensors, None)
        if not layer.parts()[0]:
            raise TriLoRAError(
                f"{name}{next(iter(tensors))} is not part of a whole layer: the other half, its transform, is missing; "
                "copy or download the file again"
            )
        return layer

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(transform's, residual's) tensors by their own names."""
        return tuple(
            {
                ending.removeprefix(f".{part}."): tensor
                for ending, tensor in self.tensors.items()
                if ending.startswith(f".{part}.")
            }
            for part in PARTS
        )

    @property
    def fixed(self) -> str:
        """Why no share of it can be written: (1 - s) I + s T must be of T's kind."""
        transform, residual = self.parts()
        linear = (set(transform) == {"m"} or numbered_cores(transform) is not None) and (
            not residual or set(residual) == {"up", "down", "scale"} or numbered_cores(residual) is not None
        )
        return "" if linear else "a share of what an orthogonal transform changes is not an orthogonal transform"

    def adapter(self, shape: LayerShape) -> Adapter:
        """The adapter on a layer of this shape, fp32. Raises TriLoRAError where the tensors are another layer's."""
        ready = [
            {key: tensor.to("cpu", torch.float32).clone() for key, tensor in part.items()} for part in self.parts()
        ]
        return read_adapter_tensors(shape, *ready).requires_grad_(False)

    def check(self, shape) -> None:
        """See `Layer.check`; also what `Layer.check_finite` is for, since only a shape tells what the tensors make."""
        if len(shape) < 2:
            raise TriLoRAError(f"is a transform, and the weight is {tuple(shape)}, not a matrix; {OTHER_MODEL}")
        if not all(tensor.is_floating_point() for tensor in self.tensors.values()):
            raise TriLoRAError(f"cannot be read: a tensor of it holds no floating-point numbers; {BROKEN}")
        try:
            adapter = self.adapter(LayerShape(shape[0], shape[1], tuple(shape[2:])))
        except TriLoRAError as error:
            raise TriLoRAError(f"cannot be read: {error}") from None
        if not self._bound() <= LIMIT and not _reach(adapter) <= LIMIT:
            raise TriLoRAError(
                f"has tensors that multiply to numbers beyond {LIMIT:g}, more than a weight can hold; {BROKEN}"
            )

    def check_finite(self) -> None:
        """Nothing: `check` does it."""

    def _bound(self) -> float:
        transform, residual = (dict(part) for part in self.parts())
        bounds = []
        if {"up", "down"} <= residual.keys():
            bounds.append(product_bound(residual.pop("up"), residual.pop("down")))
        for tensor in (*transform.values(), *residual.values()):
            bounds.append(largest(tensor) * (tensor.shape[-1] if tensor.ndim > 1 else 1))
        return whole_bound(*bounds)

    def scaled(self, ratio: float) -> dict[str, Tensor]:
        """See `Layer.scaled`: W + s (W (T - I) + R) = W ((1 - s) I + s T) + s R. A diagonal stays one; a ring of rank
        R gets rank R + 1."""
        if ratio == 1:
            return dict(self.tensors)
        transform, residual = self.parts()
        cores = numbered_cores(transform)
        if cores is None:
            transform = {"m": (1 - ratio) + ratio * transform["m"].float()}
        else:
            transform = {f"core{d}": core for d, core in enumerate(_with_identity(cores, ratio))}
        if "scale" in residual:
            pair = scaled_pair(LowRank(residual["up"], residual["down"], float(residual["scale"])), ratio)
            residual = {"up": pair.up, "down": pair.down, "scale": torch.tensor(pair.scale)}
        elif residual:
            residual = {**residual, "core0": residual["core0"].float() * ratio}
        return _named("transform", transform) | _named("residual", residual)


def scaled_pair(pair: LowRank, ratio: float) -> LowRank:
    """ratio * R: its size into the scale, its sign into up, so that no factor is rounded again."""
    return LowRank(pair.up if ratio > 0 else -pair.up.float(), pair.down, pair.scale * abs(ratio))


@torch.no_grad()
def _reach(adapter: Adapter) -> float:
    """max |entry| of T - I, some rows at a time, and of R."""
    J, reaches = adapter.shape.inp, [largest(adapter.residual.delta())]
    for start in range(0, J, _ROWS):
        rows = torch.zeros(min(_ROWS, J - start), J)
        rows.diagonal(start).fill_(1.0)
        reaches.append(largest(adapter.transform.rows(rows) - rows))
    return worst(*reaches)


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f".{part}.{name}": tensor for name, tensor in tensors.items()}


def _with_identity(cores: Sequence[Tensor], s: float) -> list[Tensor]:
    """Cores of (1 - s) I + s T, (J, J, R + 1, R + 1): rings add where their cores stand in diagonal blocks, and I is
    a ring of rank 1."""
    wide = []
    for d, core in enumerate(cores):
        size, _, R, _ = core.shape
        both = torch.zeros(size, size, R + 1, R + 1)
        both[:, :, :R, :R] = core.float() * (s if d == 0 else 1.0)
        both[:, :, R, R] = torch.eye(size) * (1 - s if d == 0 else 1.0)
        wide.append(both)
    return wide
