"""LoRA and LoCon: R = s * up * down (arXiv:2106.09685, eq. 3; on convolutions a k x k down and a 1x1 up)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LayerShape
from ..errors import TriLoRAError
from .low_rank import FixedLowRank, LowRankResidual, check_rank


@dataclass(frozen=True)
class LoraConfig:
    """Options of one LoRA layer.

    rank: r >= 1. alpha: numerator of s = alpha / r, > 0; 0 means alpha = rank (s = 1).
    """

    kind: ClassVar[str] = "lora"
    TENSORS: ClassVar[tuple[str, ...]] = ("up", "down", "scale")
    SIZE: ClassVar[str | None] = "rank"
    rank: int = 16
    alpha: float = 0.0

    def __post_init__(self):
        check_rank_and_alpha(self.rank, self.alpha)

    @classmethod
    def read(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "FixedLowRank | None":
        """What a file's tensors make on a layer of this shape; None where they are another kind's."""
        return FixedLowRank.from_tensors(shape, tensors)

    def build(self, shape: LayerShape, weight: Tensor, generator: torch.Generator) -> "LoraResidual":
        """Draw `down` kaiming-uniform (bound 1/sqrt(columns)), `up` zero. Raises TriLoRAError for a rank above the layer's."""
        check_rank(self.rank, shape)
        bound = 1.0 / math.sqrt(shape.columns)
        down = torch.empty(self.rank, shape.columns).uniform_(-bound, bound, generator=generator)
        scale = (self.alpha or self.rank) / self.rank
        return LoraResidual(shape, torch.zeros(shape.out, self.rank), down, scale)


class LoraResidual(LowRankResidual):
    """R = s * up * down; up: (out, r), down: (r, columns), both trained."""

    def __init__(self, shape: LayerShape, up: Tensor, down: Tensor, scale: float):
        super().__init__(shape)
        self.up, self.down, self.scale = nn.Parameter(up), nn.Parameter(down), scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """(s * up, down)."""
        return (self.up if self.scale == 1.0 else self.up * self.scale), self.down


def check_rank_and_alpha(rank: int, alpha: float) -> None:
    """Raise TriLoRAError unless rank >= 1 and alpha is finite and >= 0."""
    if rank < 1:
        raise TriLoRAError(f"rank={rank}: a rank is 1 or more; use a rank between 1 and 128")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise TriLoRAError(f"alpha={alpha}: alpha is 0 (meaning alpha = rank) or a positive number")
