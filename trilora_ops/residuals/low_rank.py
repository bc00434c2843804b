"""What every low-rank residual shares: R = up * down from a pair of thin factors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LayerShape
from ..errors import TriLoRAError
from ..factors import LowRank


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

    def penalty(self) -> Tensor:
        """0: no regulariser unless a kind has one."""
        return torch.zeros(())
