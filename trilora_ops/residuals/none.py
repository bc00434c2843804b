"""R = 0: the residual of a method that is a transform alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LayerShape


@dataclass(frozen=True)
class NoResidualConfig:
    """No options."""

    kind: ClassVar[str] = "none"
    TENSORS: ClassVar[tuple[str, ...]] = ()
    SIZE: ClassVar[str | None] = None

    @classmethod
    def read(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "NoResidual | None":
        """What a file's tensors make on a layer of this shape; None where they are another kind's."""
        return NoResidual.from_tensors(shape, tensors)

    def build(self, shape: LayerShape, weight: Tensor, generator: torch.Generator) -> "NoResidual":
        """Return R = 0; nothing is drawn."""
        return NoResidual(shape)


class NoResidual(nn.Module):
    """R = 0, without parameters."""

    NO_DECAY: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: LayerShape):
        super().__init__()
        self.shape = shape

    @property
    def rank(self) -> int:
        """0."""
        return 0

    def delta(self) -> Tensor:
        """R = 0, as the scalar that adds to a transform's part on any device."""
        return torch.zeros(())

    def low_rank(self) -> None:
        """None: there are no factors."""
        return None

    def add_output(self, y: Tensor, x: Tensor) -> Tensor:
        """y + R x = y."""
        return y

    @classmethod
    def from_tensors(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "NoResidual | None":
        """R = 0 where a file holds no tensors for a residual."""
        return None if tensors else cls(shape)

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def penalty(self) -> Tensor:
        """0."""
        return torch.zeros(())
