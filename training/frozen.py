"""A frozen layer's forward pass that keeps neither its input nor its weight for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

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


class _ReplacedForward(torch.autograd.Function):
    """y = f(x) where somebody has put f in the place of the layer's own forward pass, for example with a LoRA beside the weight.

    dL/dx is that of f itself, computed anew in the backward pass; where f has none (a kernel of other precision), that of the
    layer's weight: dL/dy * W.
    """

    @staticmethod
    def forward(ctx, x: Tensor, module: nn.Module, forward: Callable, fetch: Fetch, products: CpuProducts) -> Tensor:
        ctx.module, ctx.run, ctx.fetch, ctx.products = module, forward, fetch, products
        ctx.save_for_backward(x)
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        found = _differentiated(ctx.run, x, grad)
        if found is None:
            found = _input_gradient(ctx.module, grad, x.shape, ctx.fetch, ctx.products)
        return found, None, None, None, None


def _differentiated(forward: Callable, x: Tensor, grad: Tensor) -> Tensor | None:
    """dL/dx through `forward`; None where it has no backward pass."""
    leaf = x.detach().requires_grad_()
    try:
        with torch.enable_grad(), _NormalArguments():
            y = forward(leaf.clone())  # which may write into it
        return torch.autograd.grad(y, leaf, grad)[0] if y.requires_grad else None
    except RuntimeError as error:
        if has_no_backward(error):
            return None
        raise


class _NormalArguments(TorchFunctionMode):
    """Hands every function copies of tensors made in inference mode, which autograd refuses to keep."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") not in ("__get__", "__set__"):  # of a property
            args, kwargs = tree_map_only(Tensor, _normal, (args, kwargs))
        return function(*args, **kwargs)


def _normal(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def has_no_backward(error: RuntimeError) -> bool:
    """Whether autograd says that an operation of the model has no formula for its gradient."""
    words = ("autograd formula", "derivative for", "is not implemented", "implement either the backward")
    return any(word in str(error) for word in words)


def _output(x: Tensor, module: nn.Module, forward: Callable, fetch: Fetch, products: CpuProducts) -> Tensor:
    if _is_replaced(module, forward) or not products.take(module, x):
        return forward(x)
    with fetch(module, _like(module, x)) as weight:
        return products.output(module, x, weight)


def _is_replaced(module: nn.Module, forward: Callable) -> bool:
    """Whether a forward pass is not the layer's own, so that it may do more than multiply."""
    return getattr(forward, "__func__", None) is not type(module).forward


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
    differentiable = (_ReplacedForward if _is_replaced(module, forward) else _FrozenForward).apply

    def call(x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs:
            return forward(x, *args, **kwargs)
        compute = differentiable if x.requires_grad else _output
        return compute(x, module, forward, fetch, products)

    return call
