"""A frozen layer's forward pass that keeps neither its input nor its weight for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CONV_INPUT = {1: torch.nn.grad.conv1d_input, 2: torch.nn.grad.conv2d_input, 3: torch.nn.grad.conv3d_input}
Fetch = Callable[[nn.Module, Tensor], AbstractContextManager[Tensor]]


class _FrozenForward(torch.autograd.Function):
    """y = f(x) with dL/dx = dL/dy * W, W fetched anew in the backward pass.

    Plain autograd would keep W (or its cast copy: a second model in memory for fp8 and offloaded bases), and refuses
    weights made in inference mode, which is what the host's loaders make.
    """

    @staticmethod
    def forward(ctx, x: Tensor, module: nn.Module, forward: Callable, fetch: Fetch) -> Tensor:
        ctx.module, ctx.fetch, ctx.shape = module, fetch, x.shape
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        with ctx.fetch(ctx.module, grad) as weight:
            if weight.ndim == 2:
                return grad @ weight, None, None, None
            module = ctx.module
            convolution = _CONV_INPUT[weight.ndim - 2]
            return convolution(ctx.shape, weight, grad, module.stride, module.padding, module.dilation, module.groups), None, None, None


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
