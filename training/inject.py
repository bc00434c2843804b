"""Putting adapters on a frozen model for the length of a `with` block, and taking every trace away again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..trilora_ops.adapter import Adapter
from .checkpointing import checkpointed
from .cpu_products import CpuProducts
from .frozen import can_freeze, frozen_forward
from .host import Host


@contextmanager
def injected(host: Host, adapters: Mapping[str, Adapter], checkpointing: bool = False,
             clone_saved: bool = False) -> Iterator[None]:
    """Within the block the model computes with its adapters: y = f(T x) + R x on every adapted layer.

    Frozen layers keep neither weight nor input for the backward pass; below the first adapted layer nothing is
    differentiated, since the model's input asks for no gradient. checkpointing: recompute the host's blocks.
    clone_saved: keep copies of saved activations, for models whose blocks add in place (`needs_clones`).
    """
    replaced: list[tuple[nn.Module, Callable | None]] = []
    saved, products = _cloning if clone_saved else nullcontext, CpuProducts()

    def replace(module: nn.Module, forward: Callable) -> None:
        replaced.append((module, module.__dict__.get("forward")))
        module.forward = forward

    try:
        for key, module in host.layers().items():
            original = module.forward
            frozen = frozen_forward(module, original, host.frozen_weight, products) if can_freeze(module) else original
            adapter = adapters.get(key)
            replace(module, frozen if adapter is None else _adapted(adapter, frozen))
        if checkpointing:
            owners = {id(m): a for k, m in host.layers().items() if (a := adapters.get(k)) is not None}
            for block in host.blocks():
                parameters = [p for m in block.modules() if id(m) in owners for p in owners[id(m)].parameters()]
                replace(block, checkpointed(block.forward, parameters, saved))
        with saved():
            yield
    finally:
        for module, own in reversed(replaced):
            if own is None:
                module.__dict__.pop("forward", None)  # not there yet if an interrupt came before the assignment
            else:
                module.forward = own


def needs_clones(error: RuntimeError) -> bool:
    """Whether autograd says that a block overwrote an activation it had kept (Flux's in-place residual adds)."""
    return "modified by an inplace operation" in str(error)


def _adapted(adapter: Adapter, frozen: Callable[[Tensor], Tensor]) -> Callable:
    return lambda x: adapter(x, frozen)


def _cloning():
    # parameters are never written by a block; copying them would cost a second model
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t if isinstance(t, nn.Parameter) else t.clone(), lambda t: t)
