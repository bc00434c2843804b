"""T = I: the transform of LoRA, LoCon and TriLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LayerShape


@dataclass(frozen=True)
class NoTransformConfig:
    """No options."""

    kind: ClassVar[str] = "none"
    TENSORS: ClassVar[tuple[str, ...]] = ()
    SIZE: ClassVar[str | None] = None

    @classmethod
    def read(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "NoTransform | None":
        """What a file's tensors make on a layer of this shape; None where they are another kind's."""
        return NoTransform.from_tensors(shape, tensors)

    def build(self, shape: LayerShape, weight: Tensor, generator: torch.Generator) -> "NoTransform":
        """Return T = I; nothing is drawn."""
        return NoTransform()


class NoTransform(nn.Module):
    """T = I, without parameters."""

    NO_DECAY: ClassVar[tuple[str, ...]] = ()

    def act(self, x: Tensor) -> Tensor:
        """T x = x."""
        return x

    def delta(self, weight: Tensor) -> Tensor:
        """W0 (T - I) = 0, shape and device of `weight`."""
        return torch.zeros_like(weight)

    @classmethod
    def from_tensors(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "NoTransform | None":
        """T = I where a file holds no tensors for a transform."""
        return None if tensors else cls()

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def penalty(self) -> Tensor:
        """0."""
        return torch.zeros(())
