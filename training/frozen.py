"""A frozen layer's forward pass that keeps neither its input nor its weight for the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CONV_INPUT = {1: torch.nn.grad.conv1d_input, 2: torch.nn.grad.conv2d_input, 3: torch.nn.grad.conv3d_input}
Fetch = Callable[[nn.Module, Tensor], AbstractContextManager[Tensor]]
# On the CPU oneDNN rearranges a convolution's whole kernel on every call. Up to about this many output positions (batch
# times space) that costs more than it gains over multiplying patches, which is what torch does without oneDNN.
_FEW_POSITIONS = 128
# A linear layer is a 1x1 convolution, and there oneDNN does twice the products a second of the library that torch takes
# for matrices (measured on an AMD processor, fp32). From how many rows on it pays: the backward pass also turns W round.
_MANY_ROWS, _MANY_ROWS_BACK = 256, 512


class _FrozenForward(torch.autograd.Function):
    """y = f(x) with dL/dx = dL/dy * W, W fetched anew in the backward pass.

    Plain autograd would keep W (or its cast copy: a second model in memory for fp8 and offloaded bases), and refuses
    weights made in inference mode, which is what the host's loaders make.
    """

    @staticmethod
    def forward(ctx, x: Tensor, module: nn.Module, forward: Callable, fetch: Fetch) -> Tensor:
        ctx.module, ctx.fetch, ctx.shape = module, fetch, x.shape
        if _is_plain(module, x) and x.numel() >= _MANY_ROWS * x.shape[-1]:
            with fetch(module, x) as weight:
                if weight is module.weight:  # neither cast nor patched: the layer is W x + b and nothing else
                    return _as_convolution(x, weight, module.bias)
        with _fastest(module, x, _positions(module, x)):
            return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        with ctx.fetch(ctx.module, grad) as weight:
            if weight.ndim == 2:
                turned = _is_plain(ctx.module, grad) and grad.numel() >= _MANY_ROWS_BACK * grad.shape[-1]
                return _as_convolution(grad, weight.t(), None) if turned else grad @ weight, None, None, None
            module = ctx.module
            convolution = _CONV_INPUT[weight.ndim - 2]
            with _fastest(module, grad, grad.shape[0] * grad.shape[2:].numel()):
                x = convolution(ctx.shape, weight, grad, module.stride, module.padding, module.dilation, module.groups)
            return x, None, None, None


def _is_plain(module: nn.Module, x: Tensor) -> bool:
    return (x.device.type == "cpu" and x.dtype == torch.float32 and hasattr(module, "in_features")
            and not getattr(module, "bias_function", ()) and torch.backends.mkldnn.is_available())


def _as_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wt + b as a 1x1 convolution over the rows; x: (..., in), weight: (out, in) -> (..., out), nothing copied but Wt."""
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # channels last
    return F.conv2d(rows, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _positions(module: nn.Module, x: Tensor) -> int:
    # of the output, from the input: exact for "same" padding, which is all that matters for a choice of speed
    return x.shape[0] * x.shape[2:].numel() // math.prod(getattr(module, "stride", ()))


def _fastest(module: nn.Module, x: Tensor, positions: int) -> AbstractContextManager:
    small = x.ndim == 4 and x.device.type == "cpu" and x.dtype == torch.float32 and positions <= _FEW_POSITIONS
    return _without_onednn() if small and getattr(module, "groups", 0) == 1 else nullcontext()


@contextmanager
def _without_onednn() -> Iterator[None]:
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def can_freeze(module: nn.Module) -> bool:
    """Whether the input gradient is grad * W: linear layers and zero-padded convolutions."""
    if hasattr(module, "in_features"):
        return True
    return (hasattr(module, "kernel_size") and not getattr(module, "transposed", False)
            and module.padding_mode == "zeros" and not isinstance(module.padding, str))


def frozen_forward(module: nn.Module, forward: Callable, fetch: Fetch) -> Callable[[Tensor], Tensor]:
    """`forward` with the memory-free backward pass; anything beyond a single tensor argument goes to `forward` itself."""

    def call(x: Tensor, *args, **kwargs) -> Tensor:
        if not x.requires_grad or args or kwargs:
            return forward(x, *args, **kwargs)
        return _FrozenForward.apply(x, module, forward, fetch)

    return call
