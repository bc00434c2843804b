"""Block-diagonal orthogonal T by Cayley's transform (OFT, arXiv:2306.07280): T_b = (I - S_b)(I + S_b)^-1, S_b = -S_bt."""

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
class BlockOrthogonalConfig:
    """block: size b >= 2 of the blocks; a layer whose input size it does not divide gets the nearest divisor below, or
    above where there is none (a prime size becomes one block)."""

    kind: ClassVar[str] = "block_orthogonal"
    TENSORS: ClassVar[tuple[str, ...]] = ("skew",)
    SIZE: ClassVar[str | None] = "block"
    block: int = 32

    def __post_init__(self):
        if self.block < 2:
            raise TriLoRAError(f"block={self.block}: an orthogonal block has 2 rows or more; 32 is a common choice")

    @classmethod
    def read(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "BlockOrthogonal | None":
        """What a file's tensors make on a layer of this shape; None where they are another kind's."""
        return BlockOrthogonal.from_tensors(shape, tensors)

    def build(self, shape: LayerShape, weight: Tensor, generator: torch.Generator) -> "BlockOrthogonal":
        """S = 0, so T = I exactly; nothing is drawn."""
        divisors = [size for size in range(2, shape.inp + 1) if shape.inp % size == 0] or [1]
        block = max((size for size in divisors if size <= self.block), default=divisors[0])
        return BlockOrthogonal(shape, torch.zeros(shape.inp // block, block * (block - 1) // 2))


class BlockOrthogonal(ChannelTransform):
    """skew: (blocks, b (b - 1) / 2), the upper triangles of S."""

    NO_DECAY: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: LayerShape, skew: Tensor):
        super().__init__(shape)
        self.skew = nn.Parameter(skew)
        self.block = shape.inp // skew.shape[0]

    @classmethod
    def from_tensors(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "BlockOrthogonal | None":
        """The transform of a file, or None where these are another kind's. Raises TriLoRAError for another size."""
        if set(tensors) != {"skew"}:
            return None
        skew = tensors["skew"]
        block = shape.inp // max(1, len(skew))
        if skew.ndim != 2 or len(skew) * block != shape.inp or skew.shape[1] != block * (block - 1) // 2:
            raise TriLoRAError(f"transform.skew is {tuple(skew.shape)}, expected (blocks, b (b - 1) / 2) with blocks * b = {shape.inp}; it is another layer's")
        return cls(shape, skew)

    def blocks(self) -> Tensor:
        """T's diagonal blocks, (blocks, b, b), orthogonal to fp32 rounding."""
        rows, columns = torch.triu_indices(self.block, self.block, 1, device=self.skew.device)
        upper = self.skew.new_zeros(len(self.skew), self.block, self.block).index_put(
            (torch.arange(len(self.skew), device=self.skew.device)[:, None], rows[None], columns[None]), self.skew)
        S = upper - upper.transpose(1, 2)
        eye = torch.eye(self.block, device=self.skew.device)
        return torch.linalg.solve(eye + S, eye - S)  # (I + S)^-1 and (I - S) commute

    def rows(self, x: Tensor, transposed: bool = False) -> Tensor:
        """T x block by block."""
        blocks = self.blocks().transpose(1, 2) if transposed else self.blocks()
        return torch.einsum("bij,nbj->nbi", blocks, x.view(len(x), -1, self.block)).reshape(x.shape)
