"""What every kind of layer answers: whether it fits a weight, what it makes of it, and how a share of it is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import TriLoRAError
from .numbers import ALPHA, LIMIT, MAGNITUDES, largest, whole_bound, worst

BROKEN = "the file is broken"
OTHER_MODEL = "it was made for another model"
# entries; small factors can make a matrix that no memory holds
LARGEST_WEIGHT = 2**27


class Layer:
    """One layer of a file, whole and computable: W_1 is the weight with it at strength 1, and W + s (W_1 - W) at
    strength s.

    name: in the file; tensors: by their endings, alpha left out; alpha: None where the file has none.
    A kind gives `read`, `size`, `bound` and `added`; one that replaces the weight gives `changed` instead of `added`.
    """

    LABEL: ClassVar[str]  # what people call the kind
    FACTORS: ClassVar[
        tuple[str, ...]
    ] = ()  # endings of the factors to which the change is proportional, one for each term
    TAKES_MAGNITUDES: ClassVar[bool] = False  # whether DoRA's magnitudes may stand beside it
    READS_ALPHA: ClassVar[bool] = True
    # these a kind may tell layer by layer
    rank = 0  # directions of a layer of low rank
    fixed = ""  # why no share of it can be written; empty where one can
    summable = False  # whether the sum of two is of this kind too
    needs_the_weight = False  # whether the change depends on the weight that it meets
    replaces = False  # whether W_1 itself is made, so that a strength is best applied on the line from W to it

    def __init__(self, name: str, tensors: Mapping[str, Tensor], alpha: float | None = None):
        self.name, self.tensors, self.alpha = name, dict(tensors), alpha

    @property
    def kind(self) -> str:
        """What people call it."""
        return self.LABEL

    @classmethod
    def read(cls, name: str, tensors: Mapping[str, Tensor], alpha: float | None) -> "Layer":
        """The layer of these tensors. Raises TriLoRAError, naming a key, where it is not whole."""
        raise NotImplementedError

    @property
    def size(self) -> tuple[int, int | None]:
        """(rows, columns) of the flattened change; None where any number of columns fits."""
        raise NotImplementedError

    def new_shape(self) -> tuple[int, ...] | None:
        """The shape that it gives its weight, None where it leaves it."""
        return None

    def widened(self, weight: Tensor) -> Tensor:
        """The weight in the shape that it is given, zero where it was not."""
        return weight

    def check(self, shape: torch.Size | tuple[int, ...]) -> None:
        """Raise TriLoRAError where it is not for a weight of this shape, (out, in, *kernel) or (size,)."""
        rows, cols = self.size
        wanted = (shape[0], math.prod(shape[1:])) if len(shape) else (0, 0)
        if rows != wanted[0] or cols not in (None, wanted[1]):
            got, wanted = ((rows,), wanted[:1]) if cols is None else ((rows, cols), wanted)
            raise TriLoRAError(f"is {got}, expected {wanted}; {OTHER_MODEL}")

    def bound(self) -> float:
        """At least max |entry| of the change (on a weight of rows of norm 1), and of what is computed on the way to
        it."""
        raise NotImplementedError

    def reach(self) -> float:
        """The same exactly, where the bound is too coarse; NaN or infinite where the numbers overflow, or no weight is so
        large."""
        return largest(self.added(torch.zeros(self.size))) if math.prod(self.size) <= LARGEST_WEIGHT else math.inf

    def check_finite(self) -> None:
        """Raise TriLoRAError where a tensor is not finite, or finite ones make a change that half precision cannot
        hold (LIMIT)."""
        if self.bound() <= LIMIT:
            return
        for ending, tensor in self.tensors.items():
            if not torch.isfinite(tensor.float()).all():
                raise TriLoRAError(
                    f"{self.name}{ending}: holds NaN or infinite values; {BROKEN}; train or download it again"
                )
        if not self.reach() <= LIMIT:
            many = len(self.tensors) > 1
            said = "its tensors multiply to numbers" if many else "holds numbers"
            raise TriLoRAError(
                f"{self.name}{'' if many else next(iter(self.tensors))}: {said} beyond {LIMIT:g}, more than half "
                f"precision can hold; {BROKEN}"
            )

    def added(self, weight: Tensor) -> Tensor:
        """What the factors alone add, of the weight's shape and dtype (fp32 or fp64)."""
        raise NotImplementedError

    def changed(self, weight: Tensor) -> Tensor:
        """W_1, of the weight's shape and dtype (fp32 or fp64)."""
        wide = self.widened(weight)
        return wide + self.added(wide)

    def delta(self, weight: Tensor) -> Tensor:
        """W_1 - W."""
        wide = self.widened(weight)
        return self.changed(weight) - wide if self.replaces else self.added(wide)

    def scaled(self, ratio: float) -> dict[str, Tensor]:
        """Tensors by ending of a layer with `ratio` times the change: its size goes into the alpha where one is read
        (so that half precision loses nothing), its sign into the factors. Only for a layer that is not `fixed`."""
        found = self.written()
        if ratio == 1:
            return found
        in_alpha = self.alpha is not None and self.READS_ALPHA
        if in_alpha:
            found[ALPHA] = torch.tensor(self.alpha * abs(ratio))
        if not in_alpha or ratio < 0:
            share = math.copysign(1.0, ratio) if in_alpha else ratio
            found |= {ending: found[ending].float() * share for ending in self.FACTORS if ending in found}
        return found

    def written(self) -> dict[str, Tensor]:
        """Its tensors by ending, the alpha among them."""
        return {**self.tensors, **({} if self.alpha is None else {ALPHA: torch.tensor(self.alpha)})}

    def on(self, ending: str, weight: Tensor) -> Tensor:
        """A tensor on the weight's device in its dtype."""
        return self.tensors[ending].to(weight.device, weight.dtype)


class ScaledLayer(Layer):
    """A kind of factors with a scale, alpha / rank, and, where a file has them, DoRA's magnitudes (arXiv:2402.09353):

        W_1 = m (W + A) / ||W + A||,

    the norms being those of rows for m of (out, 1, ...) or (out,), and of columns over all of `out` and the kernel
    for m of (1, in, 1, ...). PEFT, diffusers and LyCORIS merge it so; core divides by ||W|| for the rows.
    """

    TAKES_MAGNITUDES = True

    @property
    def kind(self) -> str:
        """What people call it."""
        return self.LABEL if self.magnitudes is None else "DoRA"

    @property
    def scale(self) -> float:
        """alpha / rank, 1 without an alpha."""
        return 1.0 if self.alpha is None or not self.READS_ALPHA else self.alpha / self.scale_rank

    @property
    def scale_rank(self) -> int:
        """The rank that the alpha is divided by."""
        raise NotImplementedError

    def product(self, weight: Tensor) -> Tensor:
        """The factors' product, (rows, columns), without the scale."""
        raise NotImplementedError

    def product_bound(self) -> float:
        """At least max |entry| of the product."""
        raise NotImplementedError

    @property
    def magnitudes(self) -> Tensor | None:
        """DoRA's magnitudes."""
        return self.tensors.get(MAGNITUDES)

    @property
    def fixed(self) -> str:
        """Why no share of it can be written."""
        return (
            "its magnitudes renormalise the whole weight, so no factor is proportional to the change"
            if self.magnitudes is not None
            else ""
        )

    @property
    def needs_the_weight(self) -> bool:
        """Whether the change depends on the weight that it meets."""
        return self.magnitudes is not None

    @property
    def replaces(self) -> bool:
        """Whether W_1 itself is made."""
        return self.magnitudes is not None

    def check(self, shape) -> None:
        """See `Layer.check`."""
        super().check(shape)
        if self.magnitudes is not None and _axis(self.magnitudes, shape) is None:
            rows, cols = (tuple([n if axis == kept else 1 for axis, n in enumerate(shape)]) for kept in (0, 1))
            raise TriLoRAError(
                f"has a dora_scale of {tuple(self.magnitudes.shape)}, expected {rows} or {cols}; {BROKEN}"
            )

    def bound(self) -> float:
        """See `Layer.bound`."""
        magnitudes = 0.0 if self.magnitudes is None else largest(self.magnitudes)
        return worst(whole_bound(self.product_bound(), abs(self.scale)), magnitudes)

    def reach(self) -> float:
        """See `Layer.reach`."""
        magnitudes = 0.0 if self.magnitudes is None else largest(self.magnitudes)
        return worst(super().reach(), magnitudes)

    def added(self, weight: Tensor) -> Tensor:
        """See `Layer.added`."""
        return (self.product(weight) * self.scale).reshape(weight.shape)

    def changed(self, weight: Tensor) -> Tensor:
        """See `Layer.changed`."""
        changed = super().changed(weight)
        if self.magnitudes is None:
            return changed
        axis = _axis(self.magnitudes, weight.shape)
        others = [other for other in range(weight.ndim) if other != axis]
        norms = torch.linalg.vector_norm(changed, dim=others, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
        return changed * (self.on(MAGNITUDES, weight).reshape(norms.shape) / norms)


def _axis(magnitudes: Tensor, shape) -> int | None:
    """The axis of the weight along which the magnitudes lie: 0 or 1, None where they do not fit."""
    got = list(magnitudes.shape) if magnitudes.ndim > 1 else [magnitudes.numel(), 1]
    if len(shape) < 2 or magnitudes.ndim == 0:
        return None
    for axis in (0, 1):
        if got[axis] == shape[axis] and math.prod(got) == shape[axis]:
            return axis
    return None


def check_kernel(kernel: tuple[int, ...], shape) -> None:
    """Raise TriLoRAError where a tensor with a kernel of its own is for a convolution of another one."""
    if len(shape) > 2 and any(n != 1 for n in kernel) and tuple(kernel) != tuple(shape[2:]):
        raise TriLoRAError(f"has a kernel of {tuple(kernel)}, expected {tuple(shape[2:])}; {OTHER_MODEL}")
