"""The plan of an adapter: as its metadata have it, else the ranks of its layers."""

from __future__ import annotations

from types import SimpleNamespace

from comfy.weight_adapter import LoRAAdapter

from ..training.plan import adaptable
from ..training.report import describe_run
from ..trilora_ops.block_plan import METADATA, BlockPlan, from_metadata
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.naming import split_target
from ..trilora_ops.ranks_text import ranks_as_text
from ..trilora_ops.registry import Method
from ..trilora_ops.targets import TARGETS, select
from .block_plan import blocks_of
from .comfy_host import layers_of
from .comfy_layers import LayerPatch
from .comfy_patches import Places
from .comfy_transforms import TransformPatch, shape_of
from .files import as_state


def plan_of(adapter, model) -> tuple[BlockPlan, str]:
    """(the plan of a LORA_MODEL for a MODEL, the narrowest target that has all of its layers).

    Raises TriLoRAError for an adapter that does not fit the model, whose plan names blocks that it has not, or that has
    no layer with a rank there.
    """
    state, places = as_state(adapter), Places.of(model, None)
    layers, blocks = layers_of(model.model), blocks_of(model.model)
    ranks: dict[str, int] = {}
    for target, patch in places.patches(state, "the adapter").items():
        key = split_target(target)[0]  # of the parts of a fused weight the largest
        if key in layers and (rank := _rank(patch, layers[key].weight)):
            ranks[key] = max(rank, ranks.get(key, 0))
    everything = adaptable(SimpleNamespace(layers=lambda: layers))
    target = next((word for word in TARGETS if ranks.keys() <= set(select(everything, word))), None)
    if not ranks or target is None:
        raise TriLoRAError("adapter: has no layer with a rank that could be trained here; LoRA, LoCon, TriLoRA and transforms have")
    # a tool that made another file of it has left the plan behind
    if METADATA in state.metadata and "trilora.provenance" not in state.metadata:
        try:
            plan = from_metadata(state.metadata[METADATA])
            plan.read(blocks, Method())
        except TriLoRAError as error:
            raise TriLoRAError(f"adapter: {error}") from None
        return plan, target
    return BlockPlan(ranks_as_text({key: ranks.get(key, 0) for key in select(everything, target)}, blocks)), target


def describe(plan: BlockPlan, target: str) -> str:
    """The texts of a plan and of the earlier ones."""
    parts = []
    for one in plan.chain():
        said = {"rank": one.rank, "alpha": one.alpha, "learning_rate": one.learning_rate, "method": one.method and one.method.name}
        parts.append(describe_run({name: value for name, value in said.items() if value}))
    return "\n\n".join([*parts, f"target: {target}"])


def _rank(patch, weight) -> int:
    if isinstance(patch, TransformPatch):
        return patch.adapter(shape_of(weight), weight.device).residual.rank or 1  # 1 stands for a method without a rank
    if isinstance(patch, LayerPatch):
        return patch.layer.rank
    return patch.weights[1].shape[0] if isinstance(patch, LoRAAdapter) else 0
