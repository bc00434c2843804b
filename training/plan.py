"""Which layer gets which adapter: from a target word and a method to built adapters."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..trilora_ops.adapter import Adapter, LayerShape
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.registry import Method
from ..trilora_ops.targets import select
from .host import Host


def adaptable(host: Host) -> dict[str, int]:
    """Target key -> number of kernel axes, for every layer an adapter can act on (grouped convolutions cannot)."""
    layers = {}
    for key, module in host.layers().items():
        try:
            layers[key] = len(LayerShape.of(module).kernel)
        except TriLoRAError:
            continue
    return layers


def build_adapters(host: Host, method: Method, target: str, seed: int) -> dict[str, Adapter]:
    """Adapters equal to the identity on every layer that `target` names, on the host's device, in the model's order.

    Every layer draws from a generator of its own, seeded by `seed` and its place, so that changing one layer's rank
    leaves the others' start as it was. Raises TriLoRAError naming the layer that cannot carry the method.
    """
    adapters = {}
    modules: Mapping = host.layers()
    for place, key in enumerate(select(adaptable(host), target)):
        host.check_interrupt()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
        try:
            adapter = method.build(modules[key], host.weight(key), generator)
        except TriLoRAError as error:
            raise TriLoRAError(f"layer {key}: {error}") from None
        adapters[key] = adapter.to(host.device)
    return adapters


def parameter_count(adapters: Mapping[str, Adapter]) -> int:
    """Trained numbers in all."""
    return sum(p.numel() for a in adapters.values() for p in a.parameters())
