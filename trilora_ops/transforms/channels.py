"""What every transform of input channels shares: acting on activations and on weights, in fp32."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LayerShape


class ChannelTransform(nn.Module):
    """T acts on a layer's input channels: W' = W0 T, on a convolution W'[:, :, u, v] = W0[:, :, u, v] T.

    A kind gives `rows`; everything else follows. Products run in fp32 whatever the activations' dtype: bf16 cannot hold
    an identity plus something small.
    """

    NO_DECAY: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: LayerShape):
        super().__init__()
        self.shape = shape

    def rows(self, x: Tensor, transposed: bool = False) -> Tensor:
        """T x (or Tt x) for every row of x, (n, in) -> (n, in), fp32."""
        raise NotImplementedError(f"{type(self).__name__} must say how it acts on rows")

    def act(self, x: Tensor) -> Tensor:
        """T x; x: (..., in) or, on a convolution, (B, in, *space) -> the same shape and dtype."""
        moved = x.movedim(1, -1) if self.shape.kernel else x
        y = self.rows(moved.reshape(-1, self.shape.inp).float()).reshape(moved.shape).to(x.dtype)
        if not self.shape.kernel:
            return y
        # in x's own memory order: another one makes the convolution choose another algorithm, and T = I inexact
        return y.movedim(-1, 1).contiguous() if x.is_contiguous() else y.movedim(-1, 1)

    def delta(self, weight: Tensor) -> Tensor:
        """W0 (T - I), one mode at a time; weight: any rows of W0, (n, columns) fp32 -> (n, columns)."""
        parts = weight.view(len(weight), self.shape.inp, -1).transpose(1, 2)  # n, k, in
        rows = parts.reshape(-1, self.shape.inp)
        changed = self.rows(rows, transposed=True) - rows
        return changed.reshape(parts.shape).transpose(1, 2).reshape(weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by the names that a file gives them."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def penalty(self) -> Tensor:
        """0: no regulariser unless a kind has one."""
        return torch.zeros(())
