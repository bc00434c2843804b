"""OFT and BOFT, as LyCORIS and kohya write them: rotations of the outputs by blocks; and IA3, a scale of inputs or
outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import TriLoRAError
from .layer import BROKEN, OTHER_MODEL, Layer
from .numbers import LIMIT, RESCALE, factor, largest

BLOCKS = ".oft_blocks"
_PLAIN = 100.0  # of the sum of a row of a skew matrix: up to here its Cayley transform is surely accurate in fp32
_ORTHOGONAL = 1e-3


class OFTLayer(Layer):
    """W_1 = rescale R' W, R block-diagonal with blocks (I + Q)(I - Q)^-1, Q = B - B' (arXiv:2306.07280).

    The alpha is not a scale: alpha * rows is the largest Frobenius norm that Q, of all blocks together, keeps; larger
    ones are scaled down to it. 0 or none: no bound. Core takes the alpha itself for that norm, and leaves `rescale`
    out. BOFT (arXiv:2311.06243) has m stages of blocks, each acting on the rows in another order; its blocks are not
    transposed.
    """

    LABEL = "OFT or BOFT"
    needs_the_weight = True
    fixed = "a share of what a rotation changes is not a rotation"
    ENDINGS = (BLOCKS, RESCALE)

    @classmethod
    def read(cls, name, tensors, alpha) -> "OFTLayer":
        """See `Layer.read`."""
        blocks = factor(name, tensors, BLOCKS)
        if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
            raise TriLoRAError(f"{name}{BLOCKS} is {tuple(blocks.shape)}, blocks that are not square; {BROKEN}")
        rows = blocks.shape[-3] * blocks.shape[-1]
        if RESCALE in tensors and factor(name, tensors, RESCALE).numel() != rows:
            raise TriLoRAError(f"{name}{RESCALE} is {tuple(tensors[RESCALE].shape)}, expected {rows} numbers; {BROKEN}")
        layer = cls(name, tensors, alpha)
        if blocks.ndim == 4 and any(not half or rows % (2 * half) for half in layer.halves()):
            raise TriLoRAError(
                f"{name}{BLOCKS} is {tuple(blocks.shape)}: {len(blocks)} stages of blocks of {blocks.shape[-1]} "
                f"cannot mix {rows} rows; {BROKEN}"
            )
        return layer

    @property
    def kind(self) -> str:
        """What people call it."""
        return "OFT" if self.tensors[BLOCKS].ndim == 3 else "BOFT"

    @property
    def size(self) -> tuple[int, None]:
        """See `Layer.size`."""
        blocks = self.tensors[BLOCKS]
        return blocks.shape[-3] * blocks.shape[-1], None

    def halves(self) -> list[int]:
        """How far apart the rows lie that each stage of BOFT mixes."""
        blocks = self.tensors[BLOCKS]
        return [2**stage * (blocks.shape[-1] // 2) for stage in range(len(blocks))]

    def rotation(self, weight: Tensor) -> Tensor:
        """The blocks' Cayley transforms, of the shape of the blocks."""
        blocks = self.on(BLOCKS, weight)
        skew = blocks - blocks.transpose(-1, -2)
        most = 0.0 if self.alpha is None else self.alpha * self.size[0]
        if most > 0:
            skew = skew * (most / torch.linalg.vector_norm(skew).clamp_min(most))
        eye = torch.eye(blocks.shape[-1], device=weight.device, dtype=weight.dtype)
        return torch.linalg.solve_ex(eye - skew, eye + skew)[0]

    def bound(self) -> float:
        """See `Layer.bound`."""
        blocks, rescale = self.tensors[BLOCKS], self.tensors.get(RESCALE)
        plain = 2 * blocks.shape[-1] * largest(blocks) <= _PLAIN
        return (1.0 if rescale is None else largest(rescale)) if plain else math.inf

    def reach(self) -> float:
        """See `Layer.reach`; infinite where fp32 finds no rotation."""
        R, rescale = self.rotation(torch.zeros(1)), self.tensors.get(RESCALE)
        off = largest(R @ R.transpose(-1, -2) - torch.eye(R.shape[-1]))
        return (1.0 if rescale is None else largest(rescale)) if off <= _ORTHOGONAL else math.inf

    def added(self, weight: Tensor) -> Tensor:
        """See `Layer.added`."""
        R, flat = self.rotation(weight), weight.reshape(weight.shape[0], -1)
        if R.ndim == 3:
            turned = torch.bmm(
                (R - torch.eye(R.shape[-1], device=R.device, dtype=R.dtype)).transpose(1, 2),
                flat.view(*R.shape[:2], -1),
            ).reshape(flat.shape)
        else:
            turned = self._stages(R, flat) - flat
        if RESCALE in self.tensors:
            rescale = self.on(RESCALE, weight).reshape(-1, 1)
            turned = rescale * turned + (rescale - 1) * flat
        return turned.reshape(weight.shape)

    def _stages(self, R: Tensor, flat: Tensor) -> Tensor:
        for stage, half in zip(R, self.halves(), strict=True):
            # rows c g k -> c k g, with g of 2: partners stand side by side
            order = torch.arange(len(flat), device=flat.device).view(-1, 2, half).transpose(1, 2).flatten()
            mixed = torch.bmm(stage, flat[order].view(*stage.shape[:2], -1)).reshape(flat.shape)
            flat = torch.empty_like(flat)
            flat[order] = mixed
        return flat


class IA3Layer(Layer):
    """W_1 = W (1 + w), w for each input (`.on_input` other than 0) or each output, as LyCORIS writes it
    (arXiv:2205.05638)."""

    LABEL = "IA3"
    needs_the_weight = True
    FACTORS = (".weight",)
    READS_ALPHA = False
    ENDINGS = (".on_input", ".weight")

    @classmethod
    def read(cls, name, tensors, alpha) -> "IA3Layer":
        """See `Layer.read`."""
        scale, on_input = factor(name, tensors, ".weight"), tensors[".on_input"]
        if on_input.numel() != 1 or on_input.is_complex():
            raise TriLoRAError(
                f"{name}.on_input is {tuple(on_input.shape)} {on_input.dtype}, expected 0 or 1; {BROKEN}"
            )
        if scale.numel() != max(scale.shape, default=1):
            raise TriLoRAError(
                f"{name}.weight is {tuple(scale.shape)}, expected one number for each input or output; {BROKEN}"
            )
        return cls(name, tensors, None)

    @property
    def axis(self) -> int:
        """Of the weight that is scaled: 1 for inputs."""
        return int(bool(self.tensors[".on_input"].item()))

    def check(self, shape) -> None:
        """See `Layer.check`."""
        count = self.tensors[".weight"].numel()
        if len(shape) <= self.axis or count != shape[self.axis]:
            raise TriLoRAError(
                f"is for {count} {'inputs' if self.axis else 'outputs'} of a weight that is {tuple(shape)}; "
                f"{OTHER_MODEL}"
            )

    def bound(self) -> float:
        """See `Layer.bound`."""
        return largest(self.tensors[".weight"])

    def reach(self) -> float:
        """See `Layer.reach`."""
        return self.bound() if self.bound() <= LIMIT else math.inf

    def added(self, weight: Tensor) -> Tensor:
        """See `Layer.added`."""
        return weight * self.on(".weight", weight).reshape(
            [-1 if axis == self.axis else 1 for axis in range(weight.ndim)]
        )
