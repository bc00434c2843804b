"""What every low-rank residual shares: R = up * down from a pair of thin factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LayerShape
from ..errors import TriLoRAError
from ..factors import LowRank, canonicalise
from ..files.numbers import number


def check_rank(rank: int, shape: LayerShape, name: str = "rank") -> int:
    """Return `rank`, or raise TriLoRAError where a matrix of this shape cannot have it."""
    if rank > shape.rank_max:
        raise TriLoRAError(
            f"{name}={rank} is larger than the layer: a weight of {shape.out}x{shape.columns} has rank {shape.rank_max} "
            "at the most; lower the rank or leave this layer out"
        )
    return rank


class LowRankResidual(nn.Module):
    """R = up * down; a kind gives its factors, everything else follows from them.

    Parameters are fp32 masters; `add_output` casts the factors to the activations' dtype for the products.
    """

    NO_DECAY: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: LayerShape):
        super().__init__()
        self.shape = shape

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up (out, r), down (r, columns)) with every scale inside, differentiable, fp32."""
        raise NotImplementedError(f"{type(self).__name__} must give its factors")

    @property
    def rank(self) -> int:
        """r of the pair of factors."""
        return self.factors()[1].shape[0]

    def delta(self) -> Tensor:
        """R = up * down, (out, columns), fp32."""
        up, down = self.factors()
        return up @ down

    def add_output(self, y: Tensor, x: Tensor) -> Tensor:
        """y + R x; shapes as in `LayerShape.add_low_rank`."""
        up, down = self.factors()
        return self.shape.add_low_rank(y, x, down.to(x.dtype), up.to(x.dtype))

    @torch.no_grad()
    def low_rank(self) -> LowRank:
        """The residual as a detached pair of factors, for files and merging."""
        up, down = self.factors()
        return LowRank(up.detach().clone(), down.detach().clone(), 1.0)

    def tensors(self) -> dict[str, Tensor]:
        """"up" and "down" in canonical form, for files in which a transform stands beside the residual."""
        pair = canonicalise(self.low_rank())
        return {"up": pair.up, "down": pair.down, "scale": torch.tensor(pair.scale)}

    def penalty(self) -> Tensor:
        """0: no regulariser unless a kind has one."""
        return torch.zeros(())


class FixedLowRank(LowRankResidual):
    """R = scale * up * down as read from a file."""

    def __init__(self, shape: LayerShape, pair: LowRank):
        super().__init__(shape)
        self.register_buffer("up", pair.up, persistent=False)  # buffers: they follow the module to another device
        self.register_buffer("down", pair.down, persistent=False)
        self.scale = pair.scale

    @classmethod
    def from_tensors(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "FixedLowRank | None":
        """The residual of a file, or None where these are another kind's. Raises TriLoRAError for shapes of another layer."""
        if set(tensors) != {"up", "down", "scale"}:
            return None
        up, down = tensors["up"], tensors["down"]
        if up.ndim != 2 or down.ndim != 2 or (len(up), down.shape[1]) != (shape.out, shape.columns) or up.shape[1] != len(down):
            raise TriLoRAError(f"residual.up is {tuple(up.shape)} and residual.down {tuple(down.shape)}, expected ({shape.out}, r) and "
                               f"(r, {shape.columns}); they are another layer's")
        return cls(shape, LowRank(up, down, number("residual.scale", tensors["scale"])))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(scale * up, down), fp32."""
        return self.up.float() * self.scale, self.down.float()
