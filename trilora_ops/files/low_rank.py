"""Layers of low rank: a pair of factors in every spelling, with a Tucker core, with magnitudes, with a new shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TriLoRAError
from ..factors import LowRank, canonicalise, fold_scale, is_canonical, keep_rank
from .layer import BROKEN, OTHER_MODEL, ScaledLayer, check_kernel
from .numbers import ALPHA, MAGNITUDES, RESHAPE, factor, largest, matrix, product_bound, whole_bound

# (up, down) endings after the layer's name, as written by kohya, PEFT, diffusers (three ages) and Mochi's trainer
PAIRS = ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight"),
         ("_lora.up.weight", "_lora.down.weight"), (".lora.up.weight", ".lora.down.weight"),
         (".lora_B", ".lora_A"), (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
         (".lora_B.default.weight", ".lora_A.default.weight"))  # fmt: skip
UP, DOWN = PAIRS[0]
PEFT_UP, PEFT_DOWN = PAIRS[1]
MID = ".lora_mid.weight"
_WIDEST = 16  # times the weight's size that a new shape may have


@dataclass(frozen=True)
class FileLayer:
    """One low-rank layer of a file: its factors flattened to matrices, and the kernel axes to give back."""

    pair: LowRank
    kernel: tuple[int, ...] = ()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The layer's three tensors under kohya's endings; up (out, r[, 1, 1]), down (r, in[, kh, kw]), alpha ()."""
        up, down, ones = self.pair.up, self.pair.down, [1] * len(self.kernel)
        inp = down.shape[1] // math.prod(self.kernel)
        return {name + UP: up.reshape(*up.shape, *ones).contiguous(),
                name + DOWN: down.reshape(down.shape[0], inp, *self.kernel).contiguous(),
                name + ALPHA: torch.tensor(float(self.pair.alpha))}  # fmt: skip

    def peft_tensors(self, name: str) -> dict[str, Tensor]:
        """The same under PEFT's endings: lora_B (out, r[, 1, 1]), lora_A (r, in[, kh, kw]), the scale folded into
        both."""
        folded = FileLayer(fold_scale(self.pair), self.kernel).tensors(name)
        return {name + PEFT_UP: folded[name + UP], name + PEFT_DOWN: folded[name + DOWN]}


class LowRankLayer(ScaledLayer):
    """A = alpha / r * up * down, or with a core alpha / r * core x up x down (LoCon's Tucker form), r the rows of
    `down`."""

    LABEL = "low rank"
    FACTORS = tuple(up for up, _ in PAIRS)

    @classmethod
    def read(cls, name, tensors, alpha) -> "LowRankLayer":
        """See `Layer.read`. One spelling of the pair only."""
        spelled = [pair for pair in PAIRS if pair[0] in tensors or pair[1] in tensors] or [PAIRS[0]]
        if len(spelled) > 1:
            one, other = (next(ending for ending in pair if ending in tensors) for pair in spelled[:2])
            raise TriLoRAError(
                f"{name}{one} and {name}{other} are two layers for one place of the model, so it is in the file "
                "twice; keep one of them, or merge them"
            )
        ((up_end, down_end),) = spelled
        up, down = factor(name, tensors, up_end), factor(name, tensors, down_end)
        if (
            up.ndim < 2
            or down.ndim < 2
            or (MID not in tensors and matrix(name, tensors, up_end).shape[1] != down.shape[0])
        ):
            raise TriLoRAError(
                f"{name}{up_end} is {tuple(up.shape)} and {name}{down_end} is {tuple(down.shape)}: expected (out, r) "
                f"and (r, in) with the same r, and cannot be multiplied; {BROKEN}"
            )
        if MID in tensors:
            core, ranks = (
                factor(name, tensors, MID),
                (matrix(name, tensors, up_end).shape[1], matrix(name, tensors, down_end).shape[0]),
            )
            if core.ndim < 3 or tuple(core.shape[:2]) != ranks:
                raise TriLoRAError(
                    f"{name}{MID} is {tuple(core.shape)} between factors of {tuple(up.shape)} and "
                    f"{tuple(down.shape)}; {BROKEN}"
                )
        layer = cls(name, tensors, alpha)
        layer.up_end, layer.down_end = up_end, down_end
        layer.reshape = _new_shape(name, tensors)
        return layer

    @property
    def kind(self) -> str:
        """What people call it."""
        if self.reshape is not None:
            return "widening LoRA"
        return "Tucker LoCon" if MID in self.tensors and self.magnitudes is None else super().kind

    @property
    def is_plain(self) -> bool:
        """Whether it is up * down and no more."""
        return self.magnitudes is None and self.reshape is None and MID not in self.tensors

    summable = is_plain

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel axes, () for a linear layer."""
        return tuple(self.tensors[MID if MID in self.tensors else self.down_end].shape[2:])

    def pair(self) -> LowRank:
        """The factors as matrices, without core, magnitudes and new shape."""
        return LowRank(self.tensors[self.up_end].flatten(1), self.tensors[self.down_end].flatten(1), self.scale)

    def file_layer(self) -> FileLayer:
        """A plain layer's factors and kernel."""
        return FileLayer(self.pair(), self.kernel)

    @property
    def rank(self) -> int:
        """r."""
        return self.tensors[self.down_end].shape[0]

    scale_rank = rank

    @property
    def size(self) -> tuple[int, int]:
        """See `Layer.size`."""
        up, down = self.tensors[self.up_end], self.tensors[self.down_end]
        return up.shape[0], down.shape[1] * math.prod(self.kernel)

    def new_shape(self) -> tuple[int, ...] | None:
        """See `Layer.new_shape`."""
        return self.reshape

    def check(self, shape) -> None:
        """See `Layer.check`."""
        if self.reshape is not None:
            if len(self.reshape) != len(shape) or any(new < old for new, old in zip(self.reshape, shape, strict=True)):
                raise TriLoRAError(
                    f"gives it the shape {self.reshape}, smaller than {tuple(shape)} or of other axes; {OTHER_MODEL}"
                )
            if math.prod(self.reshape) > _WIDEST * math.prod(shape):
                raise TriLoRAError(
                    f"gives it the shape {self.reshape}, more than {_WIDEST} times as large as {tuple(shape)}; {BROKEN}"
                )
        super().check(shape if self.reshape is None else self.reshape)
        check_kernel(self.kernel, shape)

    def product_bound(self) -> float:
        """See `ScaledLayer.product_bound`."""
        up, down = self.tensors[self.up_end].flatten(1), self.tensors[self.down_end].flatten(1)
        if MID not in self.tensors:
            return product_bound(up, down)
        return tucker_bound(self.tensors[MID], up, down)

    def product(self, weight: Tensor) -> Tensor:
        """See `ScaledLayer.product`."""
        up, down = self.on(self.up_end, weight).flatten(1), self.on(self.down_end, weight).flatten(1)
        return up @ down if MID not in self.tensors else tucker(self.on(MID, weight), up, down)

    def widened(self, weight: Tensor) -> Tensor:
        """See `Layer.widened`."""
        if self.reshape is None or tuple(weight.shape) == self.reshape:
            return weight
        wide = weight.new_zeros(self.reshape)
        wide[tuple(slice(n) for n in weight.shape)] = weight
        return wide

    def cut(self, rank: int) -> "LowRankLayer":
        """The best approximation of the pair by `rank` directions (itself where it has no more); not for magnitudes
        and cores."""
        pair = self.pair()
        if rank >= pair.rank:
            return self
        pair = keep_rank(pair if is_canonical(pair) else canonicalise(pair), rank)
        up, down = self.tensors[self.up_end], self.tensors[self.down_end]
        kept = {
            self.up_end: pair.up.reshape(up.shape[0], pair.rank, *up.shape[2:]),
            self.down_end: pair.down.reshape(pair.rank, *down.shape[1:]),
        }
        return LowRankLayer.read(self.name, {**self.tensors, **kept}, pair.alpha)


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """core (r, s, *kernel) times left (rows, r) and right (s, columns) -> (rows, columns * kernel)."""
    return torch.einsum("rsk,or,si->oik", core.flatten(2), left, right).flatten(1)


def tucker_bound(core: Tensor, left: Tensor, right: Tensor) -> float:
    """At least max |entry| of `tucker`, and of each product in it; left, right and core as there."""
    r, s = core.shape[:2]
    return whole_bound(r * largest(left), largest(core), s * largest(right))


def _new_shape(name: str, tensors) -> tuple[int, ...] | None:
    if RESHAPE not in tensors:
        return None
    shape = tensors[RESHAPE]
    if (
        shape.ndim != 1
        or not 1 <= shape.numel() <= 5
        or shape.is_floating_point()
        or shape.is_complex()
        or shape.dtype == torch.bool
    ):
        raise TriLoRAError(
            f"{name}{RESHAPE} is {tuple(shape.shape)} {shape.dtype}, expected the whole numbers of a weight's shape; "
            f"{BROKEN}"
        )
    if MAGNITUDES in tensors:
        raise TriLoRAError(
            f"{name}{MAGNITUDES} stands beside {name}{RESHAPE}: no weight gets both magnitudes and a new shape; "
            f"{BROKEN}"
        )
    return tuple(int(n) for n in shape)
