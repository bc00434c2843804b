"""Backward passes for kernels of ComfyUI that have none, on versions that do not yet leave such kernels out for training."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def add_rope_gradients() -> None:
    """Give comfy-kitchen's rotary position embeddings a formula, once; nothing where there are no such operations.

    y_i = F_ij x_j on every pair of channels, so dL/dx_j = F_ij dL/dy_i: the same operation with F transposed.
    x: (..., d), F (freqs_cis): (..., d/2, 2, 2), broadcast against x.
    """
    kitchen = getattr(torch.ops, "comfy_kitchen", None)
    if hasattr(kitchen, "apply_rope1"):
        torch.library.register_autograd("comfy_kitchen::apply_rope1", _one_backward, setup_context=_keep_frequencies)
    if hasattr(kitchen, "apply_rope"):
        torch.library.register_autograd("comfy_kitchen::apply_rope", _both_backward, setup_context=_keep_frequencies)


def _keep_frequencies(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[-1])


def _turned(ctx) -> Tensor:
    return ctx.saved_tensors[0].transpose(-1, -2).contiguous()


def _one_backward(ctx, grad: Tensor):
    return torch.ops.comfy_kitchen.apply_rope1(grad, _turned(ctx)), None


def _both_backward(ctx, grad_q: Tensor, grad_k: Tensor):
    turned = _turned(ctx)
    one = torch.ops.comfy_kitchen.apply_rope1
    return one(grad_q, turned), one(grad_k, turned), None
