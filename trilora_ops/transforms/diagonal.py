"""T = diag(m): one trained scale for each input channel (with a LoRA residual a DoRA-like method, arXiv:2402.09353).

DoRA's W' = diag(m) (W0 + BA) / |W0 + BA| scales output rows; with its norm held constant, the transform-and-residual
form keeps a diagonal beside a low-rank update. Here it stands on the input side, as every transform does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LayerShape
from ..errors import TriLoRAError
from .channels import ChannelTransform


@dataclass(frozen=True)
class DiagonalConfig:
    """No options."""

    kind: ClassVar[str] = "diagonal"
    TENSORS: ClassVar[tuple[str, ...]] = ("m",)
    SIZE: ClassVar[str | None] = None

    @classmethod
    def read(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "Diagonal | None":
        """What a file's tensors make on a layer of this shape; None where they are another kind's."""
        return Diagonal.from_tensors(shape, tensors)

    def build(self, shape: LayerShape, weight: Tensor, generator: torch.Generator) -> "Diagonal":
        """m = 1, so T = I exactly; nothing is drawn."""
        return Diagonal(shape, torch.ones(shape.inp))


class Diagonal(ChannelTransform):
    """T = diag(m), m: (in,)."""

    NO_DECAY: ClassVar[tuple[str, ...]] = ("m",)

    def __init__(self, shape: LayerShape, m: Tensor):
        super().__init__(shape)
        self.m = nn.Parameter(m)

    @classmethod
    def from_tensors(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "Diagonal | None":
        """The transform of a file, or None where these are another kind's. Raises TriLoRAError for another size."""
        if set(tensors) != {"m"}:
            return None
        if tuple(tensors["m"].shape) != (shape.inp,):
            raise TriLoRAError(f"transform.m is {tuple(tensors['m'].shape)}, expected ({shape.inp},); it is another layer's")
        return cls(shape, tensors["m"])

    def rows(self, x: Tensor, transposed: bool = False) -> Tensor:
        """m * x; a diagonal is its own transpose."""
        return x * self.m
