"""OFT and BOFT as PEFT writes them: rotations of the inputs by blocks (LyCORIS and kohya rotate the outputs, see `rotations`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import TriLoRAError
from .layer import BROKEN, OTHER_MODEL, Layer
from .numbers import factor, largest, number, whole_bound

ANGLES, TERMS = ".oft_angles", ".oft_terms"
BLOCKS, SCALES = ".boft_R", ".boft_s"
MOST_TERMS = 100
_ORTHOGONAL = 1e-3


class InputRotationLayer(Layer):
    """W_1 = s W R' with R block-diagonal over the columns of the flattened weight; one block for all where there is only one."""

    needs_the_weight = True
    fixed = "a share of what a rotation changes is not a rotation"
    READS_ALPHA = False
    exact = True  # whether the blocks are rotations, and no series cut off

    def rotation(self, weight: Tensor) -> Tensor:
        """The blocks R, (count, b, b), on the weight's device in its dtype."""
        raise NotImplementedError

    def output_scale(self, weight: Tensor) -> Tensor | None:
        """s, (out, 1), None for 1."""
        return None

    @property
    def columns(self) -> tuple[int, int]:
        """(count, size) of the blocks."""
        raise NotImplementedError

    def check(self, shape) -> None:
        """See `Layer.check`."""
        count, size = self.columns
        cols = math.prod(shape[1:]) if len(shape) > 1 else 0
        if not cols or cols % size or count not in (1, cols // size):
            raise TriLoRAError(
                f"turns {count} blocks of {size} inputs, and the weight is {tuple(shape)}; {OTHER_MODEL}"
            )

    def bound(self) -> float:
        """See `Layer.bound`."""
        like = torch.zeros(1)
        R, scale = self.rotation(like), self.output_scale(like)
        if self.exact and not largest(R @ R.transpose(-1, -2) - _eye(R)) <= _ORTHOGONAL:
            return math.inf  # fp32 finds no rotation
        return whole_bound(largest(R.abs().sum(dim=-1)), 1.0 if scale is None else largest(scale))

    def reach(self) -> float:
        """See `Layer.reach`."""
        return self.bound()

    def added(self, weight: Tensor) -> Tensor:
        """See `Layer.added`."""
        R, flat = self.rotation(weight), weight.reshape(weight.shape[0], -1)
        blocks = flat.view(len(flat), -1, R.shape[-1])
        change = torch.einsum("okc,kdc->okd", blocks, (R - _eye(R)).expand(blocks.shape[1], -1, -1)).reshape(flat.shape)
        scale = self.output_scale(weight)
        return (change if scale is None else scale * change + (scale - 1) * flat).reshape(weight.shape)


class PeftOFTLayer(InputRotationLayer):
    """R = (I - Q)(I + Q)^-1, Q skew with the angles above its diagonal, row by row (arXiv:2306.07280).

    `.oft_angles`: (count, b (b - 1) / 2), PEFT's `oft_R.weight`. `.oft_terms`: 0, or n, for which R is I + 2 Q + 2 Q^2 + ...
    + Q^(n - 1), the cut series of (I + Q)(I - Q)^-1, as PEFT computes it with `use_cayley_neumann`. It keeps that in its
    configuration (`peft_tuners`), without which the angles could mean either.
    """

    LABEL = "PEFT's OFT"
    ENDINGS = (ANGLES, TERMS)

    @classmethod
    def read(cls, name, tensors, alpha) -> "PeftOFTLayer":
        """See `Layer.read`."""
        angles = factor(name, tensors, ANGLES)
        if TERMS not in tensors:
            raise TriLoRAError(f"{name}{TERMS} is missing, which tells how {name}{ANGLES} turns; {BROKEN}")
        terms = number(name + TERMS, tensors[TERMS])
        if angles.ndim != 2 or not 0 <= terms <= MOST_TERMS or terms != int(terms):
            raise TriLoRAError(
                f"{name}{ANGLES} is {tuple(angles.shape)} with {terms:g} terms, expected (blocks, angles) and 0 to {MOST_TERMS} terms; {BROKEN}"
            )
        size = _size(angles.shape[1])
        if size * (size - 1) // 2 != angles.shape[1]:
            raise TriLoRAError(
                f"{name}{ANGLES} has {angles.shape[1]} angles for each block, which fill no square; {BROKEN}"
            )
        return cls(name, tensors, None)

    @property
    def exact(self) -> bool:
        """See `InputRotationLayer.exact`."""
        return not int(self.tensors[TERMS])

    @property
    def columns(self) -> tuple[int, int]:
        """See `InputRotationLayer.columns`."""
        count, angles = self.tensors[ANGLES].shape
        return count, _size(angles)

    def rotation(self, weight: Tensor) -> Tensor:
        """See `InputRotationLayer.rotation`."""
        angles = self.on(ANGLES, weight)
        count, size = self.columns
        rows, cols = torch.triu_indices(size, size, 1, device=angles.device)
        skew = angles.new_zeros(count, size, size)
        skew[:, rows, cols] = angles
        skew = skew - skew.transpose(-1, -2)
        terms = int(self.tensors[TERMS])
        return (
            _series(skew, terms)
            if terms
            else torch.linalg.solve_ex(_eye(skew) + skew, _eye(skew) - skew, left=False)[0]
        )


class PeftBOFTLayer(InputRotationLayer):
    """R = (I - Q)(I + Q)^-1 with Q = (B - B') / 2, and a scale for each output (arXiv:2311.06243), of one factor of blocks B.

    `.boft_R`: (1, count, b, b); `.boft_s`: (out, 1), of convolutions (1, out).
    """

    LABEL = "PEFT's BOFT"
    ENDINGS = (BLOCKS, SCALES)

    @classmethod
    def read(cls, name, tensors, alpha) -> "PeftBOFTLayer":
        """See `Layer.read`."""
        blocks, scales = factor(name, tensors, BLOCKS), factor(name, tensors, SCALES)
        if blocks.ndim != 4 or blocks.shape[-1] != blocks.shape[-2] or scales.numel() != max(scales.shape, default=0):
            raise TriLoRAError(
                f"{name}{BLOCKS} is {tuple(blocks.shape)} and {name}{SCALES} {tuple(scales.shape)}, expected (1, blocks, b, b) and one number "
                f"for each output; {BROKEN}"
            )
        if len(blocks) > 1:
            raise TriLoRAError(
                f"{name}{BLOCKS}: PEFT's BOFT with boft_n_butterfly_factor={len(blocks)} is not supported; merge it with PEFT"
            )
        return cls(name, tensors, None)

    @property
    def columns(self) -> tuple[int, int]:
        """See `InputRotationLayer.columns`."""
        return tuple(self.tensors[BLOCKS].shape[1:3])

    def check(self, shape) -> None:
        """See `Layer.check`."""
        super().check(shape)
        count, size = self.columns
        if self.tensors[SCALES].numel() != shape[0] or count * size != math.prod(shape[1:]):
            raise TriLoRAError(
                f"is for {self.tensors[SCALES].numel()} outputs and {count * size} inputs of a weight that is {tuple(shape)}; {OTHER_MODEL}"
            )

    def output_scale(self, weight: Tensor) -> Tensor:
        """See `InputRotationLayer.output_scale`."""
        return self.on(SCALES, weight).reshape(-1, 1)

    def rotation(self, weight: Tensor) -> Tensor:
        """See `InputRotationLayer.rotation`."""
        blocks = self.on(BLOCKS, weight)[0]
        skew = (blocks - blocks.transpose(-1, -2)) / 2
        return torch.linalg.solve_ex(_eye(skew) + skew, _eye(skew) - skew, left=False)[0]


def _size(angles: int) -> int:
    """The size of a square matrix with so many entries above its diagonal."""
    return (1 + math.isqrt(1 + 8 * angles)) // 2


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], device=like.device, dtype=like.dtype)


def _series(skew: Tensor, terms: int) -> Tensor:
    """As PEFT sums it: of three terms as of four."""
    total, power = _eye(skew).expand_as(skew).clone(), skew
    if terms > 1:
        total += 2 * skew
    if terms > 2:
        for _ in range(2, max(terms, 4) - 1):
            power = power @ skew
            total += 2 * power
        total += power @ skew
    return total
