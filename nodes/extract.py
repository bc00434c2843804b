"""Extract Adapter: what one model has more than another, as an adapter of any method."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..training.export import export_tensors
from ..training.plan import adaptable
from ..training.report import describe_run
from ..trilora_ops.adapter import Adapter
from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.metadata import describe_layers, reworked
from ..trilora_ops.naming import UNetLayout, public_name
from ..trilora_ops.registry import Method as MethodPair
from ..trilora_ops.targets import TARGETS, select
from . import compat
from .comfy_host import family_of, prediction_of
from .effective_weights import EffectiveWeights
from .types import LoraModel, Method

log = logging.getLogger("trilora")
_WORST = 5


@dataclass(frozen=True)
class Extracted:
    """One layer: its adapter, |dW|_F and |W0|_F, and the relative error |dW - R|_F / |dW|_F."""

    adapter: Adapter
    size: float
    base: float
    error: float


class ExtractAdapter(io.ComfyNode):
    """Truncated SVD of the difference of two models, or a fit of a transform and a residual."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRAExtractAdapter",
            display_name="Extract Adapter",
            category="TriLoRA/tools",
            description="Turns the difference of two models, or everything that was applied to one, into an adapter file of the method you choose.",
            search_aliases=["extract lora", "convert lora", "merge loras", "svd", "model difference"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model_tuned", tooltip="A fine-tuned checkpoint, or a model with adapters of any kind on it."),
                io.Model.Input("model_base", tooltip="What the adapter will be applied to: the checkpoint it came from, without adapters."),
                Method.Input("method", tooltip="What comes out. TriLoRA and LoRA: the best file of that rank. Transforms are fitted, which takes longer."),
                io.Combo.Input("target", options=list(TARGETS), default="attention",
                               tooltip="Which layers to look at. Differences elsewhere are not extracted; the report counts them. "
                                       + " ".join(f"{name}: {what}." for name, what in TARGETS.items())),
                io.Float.Input("energy", default=0.0, min=0.0, max=1.0, step=0.01,
                               tooltip="0 = the method's rank everywhere. Above 0: each layer gets the smallest rank that holds this share of its "
                                       "difference, at most the method's rank."),
            ],
            outputs=[
                LoraModel.Output(display_name="adapter", tooltip="For Save Adapter, Inspect Adapter or any node that takes a LORA_MODEL."),
                io.String.Output(display_name="report", tooltip="How large the difference is, and how much of it the adapter misses."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model_tuned, model_base, method, target, energy) -> io.NodeOutput:
        with torch.inference_mode(False), torch.no_grad():  # a fit needs tensors that autograd knows
            state, report = extract(model_tuned, model_base, method, target, energy, cls.hidden.unique_id)
        compat.show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(state, report, ui=ui.PreviewText(report))


def extract(model_tuned, model_base, method: MethodPair, target: str, energy: float, node_id: str | None = None) -> tuple[AdapterState, str]:
    """(adapter, report) of what `model_tuned` has more than `model_base` on the layers that `target` names.

    Both are patchers, and neither is loaded, patched or changed. Raises TriLoRAError where the two are models of
    different shape, where a weight is not finite, and where they do not differ at all.
    """
    tuned, base = _open(model_tuned, model_base)
    keys = select(adaptable(base), target)
    for key in keys:
        _check_shape(key, tuned.shape(key), base.shape(key))
    bar, layers = comfy.utils.ProgressBar(len(keys)), {}
    for place, key in enumerate(keys):
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not tuned.same(key, base):
            found = _layer(key, tuned, base, method, energy, torch.Generator().manual_seed(place))
            if found is not None:
                layers[key] = found
        bar.update_absolute(place + 1, len(keys))
        compat.show_text(f"layer {place + 1} of {len(keys)}", node_id)
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
    size = max((weight.numel() for weight in model_base.model.diffusion_model.parameters()), default=0)
    # two weights, their difference and the temporary tensors of a decomposition
    comfy.model_management.free_memory(8 * 4 * size, model_base.load_device)
    return EffectiveWeights(model_tuned), EffectiveWeights(model_base)


def _layer(key: str, tuned: EffectiveWeights, base: EffectiveWeights, method: MethodPair, energy: float, generator: torch.Generator) -> Extracted | None:
    """None where the difference is zero."""
    from ..trilora_ops.extract import extract_adapter  # here: what only a tool needs must not slow the host's start

    weight, changed = base.weight(key), tuned.weight(key)
    _check_shape(key, tuple(changed.shape), tuple(weight.shape))  # a patch can give a weight another shape
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


def _check_shape(key: str, got: tuple[int, ...] | None, expected: tuple[int, ...]) -> None:
    if got != expected:
        raise TriLoRAError(f"model_tuned: {key} is {got or 'not there'}, expected {expected} as in model_base; connect two models of one family and size")


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
    return "\n".join([describe_run(facts), "largest errors", *lines])


def _differs(key: str, tuned: EffectiveWeights, base: EffectiveWeights) -> bool:
    comfy.model_management.throw_exception_if_processing_interrupted()
    if tuned.same(key, base):
        return False
    mine, its = tuned.weight(key), base.weight(key)
    return mine.shape != its.shape or not torch.equal(mine, its.to(mine.device))
