"""Which layer gets which adapter: from a target word, a method and a block plan to built adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..trilora_ops.adapter import Adapter, LayerShape
from ..trilora_ops.block_plan import ReadPlan
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.registry import Method
from ..trilora_ops.targets import TARGETS, select
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


def build_adapters(host: Host, method: Method, target: str, seed: int, plan: ReadPlan | None = None) -> dict[str, Adapter]:
    """Adapters equal to the identity on every layer that `target` names and `plan` trains, on the host's device, in the model's order.

    Every layer draws from a generator of its own, seeded by `seed` and its place, so that changing one layer's rank, or
    leaving it out, leaves the others' start as it was. Raises TriLoRAError naming the layer that cannot carry its method.
    """
    adapters = {}
    modules: Mapping = host.layers()
    for place, key in enumerate(select(adaptable(host), target)):
        host.check_interrupt()
        layer = method if plan is None else (planned := plan.at(key)) and planned.method
        if layer is None:
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
        try:
            adapter = layer.build(modules[key], host.weight(key), generator)
        except TriLoRAError as error:
            raise TriLoRAError(f"layer {key}: {error}") from None
        adapters[key] = adapter.to(host.device)
    return adapters


def check_plan(host: Host, target: str, plan: ReadPlan) -> list[str]:
    """What the plan asks for and the target leaves out, as selectors; mostly convolutions in blocks without attention.

    Raises TriLoRAError where the plan trains no layer of the target, with the target in which it would.
    """
    layers = adaptable(host)
    chosen = select(layers, target)
    left_out = plan.unmet(chosen, layers.keys() - set(chosen))
    if any(map(plan.at, chosen)):
        return left_out
    trained = {word: keys for word in TARGETS if (keys := [key for key in select(layers, word) if plan.at(key)])}
    # a residual block without attention has linear layers too, which only modulate it
    wider = next((word for word, keys in trained.items() if any("mod" not in plan.blocks.place(key).kinds for key in keys)), next(iter(trained), None))
    if wider is None and (encoders := plan.text_encoders()):
        raise TriLoRAError(f"block plan: it trains nothing of the model; text encoders ({', '.join(encoders)}) are not trained. Give some of the model's blocks a rank")
    if wider is None:
        raise TriLoRAError("block plan: its rank or its learning rate is 0 in every layer of this model; give some blocks a rank of 1 or more")
    raise TriLoRAError(f"block plan: target={target!r} has no layer in what the plan trains ({', '.join(left_out[:5]) or 'the rest of the model'}); "
                       f"choose target={wider!r}" + (", which makes it a LoCon, or other blocks" if wider == "linear+conv" else " or other blocks"))


def learning_rates(adapters: Mapping[str, Adapter], plan: ReadPlan | None) -> dict[str, float]:
    """Target key -> factor of the run's learning rate."""
    return {} if plan is None else {key: plan.at(key).rate for key in adapters}


def describe_plan(host: Host, adapters: Mapping[str, Adapter], target: str, plan: ReadPlan) -> dict[str, str]:
    """What a plan trains and what that saves, for the report.

    Blocks below the first trained one are computed without a backward pass; its cost goes with the weights it passes.
    """
    places = {key: plan.blocks.place(key).block for key in host.layers()}
    order = [block for block in plan.blocks.ids if block in set(places.values())]
    trained = {places[key] for key in adapters}
    first = next(place for place, block in enumerate(order) if block in trained)
    below = set(order[:first])
    weights = {key: math.prod(module.weight.shape) for key, module in host.layers().items()}  # packed ones have fewer entries
    passed = sum(count for key, count in weights.items() if places[key] not in below)
    ranks = sorted({adapter.residual.rank for adapter in adapters.values()} - {0})  # 0: a method without a residual
    whole = len(select(adaptable(host), target))
    facts = {
        "block plan": f"{len(adapters)} of the target's {whole} layers, in {len(trained)} of {len(order)} blocks"
                      + (f", rank {', '.join(map(str, ranks))}" if ranks else ""),
        "backward pass": f"from {order[first]} on: {len(order) - first} of {len(order)} blocks, {passed / sum(weights.values()):.0%} of the weights",
    }
    return facts if not below else facts | {"without one": f"{order[0]} to {order[first - 1]}: neither gradients nor kept activations"}


def parameter_count(adapters: Mapping[str, Adapter]) -> int:
    """Trained numbers in all."""
    return sum(p.numel() for a in adapters.values() for p in a.parameters())
