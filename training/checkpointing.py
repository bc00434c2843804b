"""Recompute a block in the backward pass instead of keeping its activations, for blocks that write in place too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten


class _Recompute(torch.autograd.Function):
    """outputs = run(*inputs) without a graph; the backward pass runs it again with one.

    Inputs are cloned before the run, because a block may add to them in place (Flux does): torch's own checkpointing
    would then recompute from overwritten inputs and return wrong gradients without a word. The adapters' parameters
    are explicit inputs: otherwise the first trained block, whose activations need no gradient, would get none.
    """

    @staticmethod
    def forward(ctx, run: Callable, saved: Callable, count: int, *tensors: Tensor):
        ctx.run, ctx.saved, ctx.count = run, saved, count
        ctx.kept = [t.detach().clone() for t in tensors[:count]]
        ctx.needs = [t.requires_grad for t in tensors[:count]]
        ctx.parameters = tensors[count:]
        # on copies: a block that returns the tensor it wrote into would hand autograd an input as an output
        return tuple(run([t.clone() for t in tensors[:count]]))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        inputs = [t.requires_grad_(need) for t, need in zip(ctx.kept, ctx.needs, strict=True)]
        with torch.enable_grad(), ctx.saved():
            # a leaf that needs a gradient may not be written in place: hand the block a copy of it
            outputs = ctx.run([t.clone() if t.requires_grad else t for t in inputs])
        wanted = [t for t, need in zip(inputs, ctx.needs, strict=True) if need] + list(ctx.parameters)
        # a last block may return None for the stream that ends with it
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and o.requires_grad and g is not None]
        found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        result = [next(found) if need else None for need in ctx.needs]
        return None, None, None, *result, *found


def checkpointed(forward: Callable, parameters: Sequence[Tensor], saved: Callable) -> Callable:
    """`forward` of a block, with its activations recomputed in the backward pass.

    parameters: of the adapters inside the block; saved: context manager for tensors the recomputed graph keeps.
    Tensors anywhere in the arguments are followed; the outputs may be a tensor or a flat tuple of tensors.
    """

    def call(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        tensors = [leaves[i] for i in places]
        if not parameters and not any(t.requires_grad for t in tensors):
            return forward(*args, **kwargs)
        for place in places:  # `run` lives as long as the graph and must not keep the originals beside their copies
            leaves[place] = None
        single = []

        def run(copies: list[Tensor]):
            filled = list(leaves)
            for place, tensor in zip(places, copies, strict=True):
                filled[place] = tensor
            args, kwargs = tree_unflatten(filled, spec)
            outputs = forward(*args, **kwargs)
            single.append(isinstance(outputs, Tensor))
            return (outputs,) if single[-1] else outputs

        outputs = _Recompute.apply(run, saved, len(places), *tensors, *parameters)
        return outputs[0] if single[-1] else outputs

    return call
