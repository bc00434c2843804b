"""A frozen layer's forward pass that keeps neither its input nor its weight for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .cpu_products import CpuProducts

_CONV_INPUT = {1: torch.nn.grad.conv1d_input, 2: torch.nn.grad.conv2d_input, 3: torch.nn.grad.conv3d_input}
Fetch = Callable[[nn.Module, Tensor], AbstractContextManager[Tensor]]


class _FrozenForward(torch.autograd.Function):
    """y = f(x) with dL/dx = dL/dy * W, W fetched anew in the backward pass.

    Plain autograd would keep W (or its cast copy: a second model in memory for fp8 and offloaded bases), and refuses
    weights made in inference mode, which is what the host's loaders make.
    """

    @staticmethod
    def forward(ctx, x: Tensor, module: nn.Module, forward: Callable, fetch: Fetch, products: CpuProducts) -> Tensor:
        ctx.module, ctx.fetch, ctx.products, ctx.shape = module, fetch, products, x.shape
        return _output(x, module, forward, fetch, products)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _input_gradient(ctx.module, grad, ctx.shape, ctx.fetch, ctx.products), None, None, None, None


def _output(x: Tensor, module: nn.Module, forward: Callable, fetch: Fetch, products: CpuProducts) -> Tensor:
    # a forward pass that somebody has put in the place of the layer's own may do more than multiply
    if getattr(forward, "__func__", None) is not type(module).forward or not products.take(module, x):
        return forward(x)
    with fetch(module, _like(module, x)) as weight:
        return products.output(module, x, weight)


def _input_gradient(module: nn.Module, grad: Tensor, shape: torch.Size, fetch: Fetch, products: CpuProducts) -> Tensor:
    if products.take(module, grad):
        with fetch(module, _like(module, grad)) as weight:
            return products.input_gradient(module, grad, weight, shape)
    with fetch(module, grad) as weight:
        if weight.ndim == 2:
            return grad @ weight
        return _CONV_INPUT[weight.ndim - 2](shape, weight, grad, module.stride, module.padding, module.dilation, module.groups)


def _like(module: nn.Module, x: Tensor) -> Tensor:
    # asks for the weight in its own dtype, since the products cast it themselves; one that is patched on its way is patched as for x
    return x if getattr(module, "weight_function", ()) else torch.empty(0, dtype=module.weight.dtype)


def can_freeze(module: nn.Module) -> bool:
    """Whether the input gradient is grad * W: linear layers and zero-padded convolutions."""
    if hasattr(module, "in_features"):
        return True
    return (hasattr(module, "kernel_size") and not getattr(module, "transposed", False)
            and module.padding_mode == "zeros" and not isinstance(module.padding, str))


def frozen_forward(module: nn.Module, forward: Callable, fetch: Fetch, products: CpuProducts) -> Callable[[Tensor], Tensor]:
    """`forward` with the memory-free backward pass; anything beyond a single tensor argument goes to `forward` itself."""

    def call(x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs:
            return forward(x, *args, **kwargs)
        compute = _FrozenForward.apply if x.requires_grad else _output
        return compute(x, module, forward, fetch, products)

    return call
