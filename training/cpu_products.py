"""The products of a frozen layer on a CPU, where the ways that torch chooses by itself are not the fastest.

Three findings, on AMD processors with AVX-512 and torch 2.11; what they come to is in `benchmarks/training_step.py`:

- A linear layer is a 1x1 convolution, and there oneDNN does half as many fp32 products again a second as the library that
  torch takes for matrices. It pays from some hundred rows on.
- For a convolution oneDNN rearranges the whole kernel on every call. Where the output has few positions that costs more than
  multiplying patches (im2col), which reads the kernel once as it lies in memory.
- Memory for a cast weight costs more than the cast: the system clears fresh pages one by one. One piece is cast into again
  and again, and larger weights go through it in parts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.bfloat16)
_MANY_ROWS, _MANY_ROWS_BACK = 256, 512  # the backward pass also turns W round
_FEW_POSITIONS = 128  # batch times space
_PIECE = 15 * 2**20  # entries at the most; a 3x3 convolution between 1280 channels just fits


class CpuProducts:
    """y = W x + b and dL/dx = W^T dL/dy in the dtype of x and dL/dy, W being stored in any."""

    def __init__(self):
        self._piece: Tensor | None = None

    @staticmethod
    def take(module: nn.Module, x: Tensor) -> bool:
        """Whether the layer is a linear one or an ungrouped 2-D convolution with plain weights, and x lies on a CPU that oneDNN knows."""
        return (x.device.type == "cpu" and x.dtype in _DTYPES and torch.backends.mkldnn.is_available()
                and type(module.weight) in (nn.Parameter, Tensor) and module.weight.dtype in _DTYPES and not getattr(module, "bias_function", ())
                and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)))

    def output(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """y; weight: the effective W, x as the layer takes it."""
        bias = None if module.bias is None else module.bias.to(x.dtype)
        if weight.ndim == 2:
            if x.dtype == torch.float32 and x.numel() >= _MANY_ROWS * x.shape[-1]:
                return _as_convolution(x, self._cast(weight, x), bias)
            return F.linear(x, self._cast(weight, x), bias)
        geometry = zip(x.shape[2:], module.padding, module.dilation, module.kernel_size, module.stride, strict=True)
        space = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in geometry]
        if x.shape[0] * space[0] * space[1] > _FEW_POSITIONS:
            return F.conv2d(x, self._cast(weight, x), bias, module.stride, module.padding, module.dilation)
        patches = _joined(F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride))
        y = self._product(weight.flatten(1), patches).view(-1, x.shape[0], *space).transpose(0, 1).contiguous()
        return y if bias is None else y.add_(bias[:, None, None])

    def input_gradient(self, module: nn.Module, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """dL/dx; grad: dL/dy, shape: x's."""
        if weight.ndim == 2:
            if grad.dtype == torch.float32 and grad.numel() >= _MANY_ROWS_BACK * grad.shape[-1]:
                return _as_convolution(grad, self._cast(weight, grad).t(), None)
            return grad @ self._cast(weight, grad)
        if grad.shape[0] * grad.shape[2:].numel() > _FEW_POSITIONS:
            return torch.nn.grad.conv2d_input(shape, self._cast(weight, grad), grad, module.stride, module.padding, module.dilation)
        patches = self._product(weight.flatten(1), _joined(grad.flatten(2)), turned=True)
        patches = patches.view(patches.shape[0], shape[0], -1).transpose(0, 1)
        # in fp32: patches overlap, and sums of bf16 would be rounded at every one
        return F.fold(patches.float(), shape[2:], module.kernel_size, module.dilation, module.padding, module.stride).to(grad.dtype)

    def _product(self, weight: Tensor, right: Tensor, turned: bool = False) -> Tensor:
        """W @ right, or W^T @ right where turned, in right's dtype; (m, k) and (k, n) -> (m, n)."""
        axis = 1 if turned else 0
        step = max(1, _PIECE // weight.shape[1 - axis])
        result = right.new_empty(weight.shape[axis], right.shape[1])
        for part, rows in zip(weight.split(step, axis), result.split(step), strict=True):
            left = self._cast(part, right)
            torch.mm(left.t() if turned else left, right, out=rows)
        return result

    def _cast(self, weight: Tensor, like: Tensor) -> Tensor:
        """`weight` in like's dtype; valid until the next call."""
        if weight.dtype == like.dtype:
            return weight
        if weight.numel() > _PIECE:
            return weight.to(like.dtype)
        if self._piece is None or self._piece.dtype != like.dtype or len(self._piece) < weight.numel():
            self._piece = like.new_empty(weight.numel())
        return self._piece[:weight.numel()].view(weight.shape).copy_(weight)


def _as_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wt + b as a 1x1 convolution over the rows; x: (..., in), weight: (out, in) -> (..., out), nothing copied but Wt."""
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # channels last
    return F.conv2d(rows, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _joined(x: Tensor) -> Tensor:
    """(B, k, positions) -> (k, B positions); nothing is copied where B is 1."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)
