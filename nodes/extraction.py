"""What Extract Adapter does: layer by layer, the difference of two models as an adapter."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch

from ..training.export import export_tensors
from ..training.plan import adaptable
from ..training.report import describe_run
from ..trilora_ops.adapter import Adapter
from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.extract import extract_adapter
from ..trilora_ops.metadata import describe_layers, reworked
from ..trilora_ops.naming import UNetLayout, public_name
from ..trilora_ops.registry import Method as MethodPair
from ..trilora_ops.targets import select
from . import compat
from .comfy_host import family_of, prediction_of
from .effective_weights import EffectiveWeights
from .notices import given, notice

log = logging.getLogger("trilora")
_WORST = 5


@dataclass(frozen=True)
class Extracted:
    """One layer: its adapter, |dW|_F and |W0|_F, and the relative error |dW - R|_F / |dW|_F."""

    adapter: Adapter
    size: float
    base: float
    error: float


def extract(model_tuned, model_base, method: MethodPair, target: str, energy: float, node_id: str | None = None) -> tuple[AdapterState, str]:
    """(adapter, report) of what `model_tuned` has more than `model_base` on the layers that `target` names.

    Both are patchers, and neither is loaded, patched or changed. Layers outside the blocks that have another shape in the two
    (an inpainting model's first convolution) are left out with a notice. Raises TriLoRAError where the two are models of
    different shape, where a weight is not finite, and where they do not differ at all.
    """
    tuned, base = _open(model_tuned, model_base)
    chosen = select(adaptable(base), target)
    shapes = _OtherShapes(base)
    keys = [key for key in chosen if not shapes.differ(key, tuned.shape(key), base.shape(key))]
    bar, layers = comfy.utils.ProgressBar(len(keys)), {}
    for place, key in enumerate(keys):
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not tuned.same(key, base):
            found = _layer(key, tuned, base, shapes, method, energy, torch.Generator().manual_seed(place))
            if found is not None:
                layers[key] = found
        bar.update_absolute(place + 1, len(keys))
        compat.show_text(f"layer {place + 1} of {len(keys)}", node_id)
    shapes.tell()
    if not layers:
        raise TriLoRAError(f"model_tuned: equals model_base in all {len(keys)} layers of target={target!r}; connect the model with the changes, "
                           "or choose a wider target")
    family = family_of(model_base.model)
    tensors, ranks = export_tensors({key: layer.adapter for key, layer in layers.items()}, family, base.layers())
    facts = describe_layers(method=method.name, form=method.form, options=method.options, plan=ranks, family=family,
                            prediction=_prediction(model_base), base=base.fingerprint())
    facts = reworked(facts, ranks, {"action": "extract", "target": target, "energy": energy, "error": _total(layers)})
    report = _report(layers, tensors, ranks, keys, tuned, base, method, target)
    log.info("extracted %s\n%s", method.name, report)
    return AdapterState(tensors, facts), report


def _open(model_tuned, model_base) -> tuple[EffectiveWeights, EffectiveWeights]:
    size = max((math.prod(weight.shape) for weight in model_base.model.diffusion_model.parameters()), default=0)
    # two weights, their difference and the temporary tensors of a decomposition
    comfy.model_management.free_memory(8 * 4 * size, model_base.load_device)
    return EffectiveWeights(model_tuned), EffectiveWeights(model_base)


def _layer(key: str, tuned: EffectiveWeights, base: EffectiveWeights, shapes: "_OtherShapes", method: MethodPair, energy: float,
           generator: torch.Generator) -> Extracted | None:
    """None where the difference is zero, or where there is none since a patch gives the weight another shape."""
    weight, changed = base.weight(key), tuned.weight(key)
    if shapes.differ(key, tuple(changed.shape), tuple(weight.shape)):
        return None
    delta = changed.to(weight.device).sub_(weight).flatten(1)
    size = float(delta.norm())
    if not math.isfinite(size):
        raise TriLoRAError(f"{key}: the difference holds NaN or infinite values; one of the models, or an adapter on it, is broken")
    if size == 0:
        return None
    try:
        adapter, error = extract_adapter(weight, delta, method, generator, energy, comfy.model_management.throw_exception_if_processing_interrupted)
    except TriLoRAError as reason:
        raise TriLoRAError(f"layer {key}: {reason}") from None
    return Extracted(adapter.cpu(), size, float(weight.norm()), error)


class _OtherShapes:
    """Layers that have another shape in the two models: a few outside the blocks are left out, such as an inpainting model's
    first convolution; one inside the blocks means that the models are of two families or sizes."""

    def __init__(self, base: EffectiveWeights):
        layers = adaptable(base)
        try:
            self.inside = set(select(layers, "linear+conv"))
        except TriLoRAError:  # a model without blocks of the known names
            self.inside = set(layers)
        self.found: dict[str, str] = {}

    def differ(self, key: str, mine: tuple[int, ...] | None, its: tuple[int, ...]) -> bool:
        """Whether they do, in a layer that can be left out. Raises TriLoRAError in one that cannot."""
        if mine == its:
            return False
        if key in self.inside:
            raise TriLoRAError(f"model_tuned: {key} is {mine or 'not there'}, expected {its} as in model_base; connect two models of one family and size")
        self.found[key] = f"{key} ({mine or 'not there'}, in model_base {its})"
        return True

    def tell(self) -> None:
        """Say what was left out."""
        named, more = list(self.found.values())[:_WORST], len(self.found) - _WORST
        if named:
            notice(f"left out, since its shape differs in the two models: {', '.join(named)}{f' and {more} more' if more > 0 else ''}")


def _prediction(patcher) -> str:
    try:
        return prediction_of(patcher.get_model_object("model_sampling"))
    except TriLoRAError:  # nothing here depends on it
        return "other"


def _total(layers: Mapping[str, Extracted]) -> float:
    """sqrt(sum |dW - R|^2 / sum |dW|^2) over all layers."""
    return math.sqrt(sum((x.error * x.size) ** 2 for x in layers.values()) / sum(x.size**2 for x in layers.values()))


def _report(layers: Mapping[str, Extracted], tensors, ranks: Mapping[str, int], keys, tuned, base, method: MethodPair, target: str) -> str:
    layout, family = UNetLayout.of(base.layers()), family_of(base.patcher.model)
    others = [key for key in base.keys() & tuned.keys() - set(keys) if _differs(key, tuned, base)]
    numbers = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith((".alpha", ".scale")))
    change = math.sqrt(sum(x.size**2 for x in layers.values()) / sum(x.base**2 for x in layers.values()))
    used = sorted(set(ranks.values()))
    facts = {
        "method": f"{method.name}, {len(layers)} layers, {numbers:,} parameters",
        "rank": f"{used[0]}" if len(used) == 1 else f"{used[0]} to {used[-1]}, {statistics.median(ranks.values()):g} in the middle",
        "difference": f"{change:.2%} of the weights, |ΔW| / |W|",
        "error": f"{_total(layers):.4f} in all, |ΔW − adapter| / |ΔW|; {statistics.median(x.error for x in layers.values()):.4f} in the middle layer",
        "no difference": f"{len(keys) - len(layers)} of the {len(keys)} layers of target {target}",
        "not extracted": f"{len(others)} other weights differ (biases, norms, layers outside the target)" if others else "nothing: no other weight differs",
    }
    if tuned.patcher.injections.keys() - base.patcher.injections.keys():
        facts["not seen"] = f"what model_tuned does while it runs ({', '.join(tuned.patcher.injections)}): it is not in its weights"
    worst = sorted(layers, key=lambda key: -layers[key].error)[:_WORST]
    lines = [f"  {layers[key].error:.4f}  {public_name(key, family, layout)}" for key in worst]
    return "\n".join([describe_run(facts), "largest errors", *lines, *(f"notice: {text}" for text in given())])


def _differs(key: str, tuned: EffectiveWeights, base: EffectiveWeights) -> bool:
    comfy.model_management.throw_exception_if_processing_interrupted()
    if tuned.same(key, base):
        return False
    mine, its = tuned.weight(key), base.weight(key)
    return mine.shape != its.shape or not torch.equal(mine, its.to(mine.device))
