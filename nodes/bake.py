"""Bake Adapter: strengths, block weights and whole stacks written into one ordinary file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.lora_convert
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.metadata import fingerprint, title
from ..trilora_ops.naming import PREFIX, spelling
from ..trilora_ops.peft_config import name_dora_scales
from . import compat
from .block_strengths import block_strengths, presets_in
from .comfy_patches import Places
from .load import BLOCK_WEIGHTS, read_file
from .names import convert_names, names_in
from .save import as_state
from .types import LoraModel, Stack, StackEntry


class BakeAdapter(io.ComfyNode):
    """What an adapter or a stack does on a model, as one adapter that does the same at strength 1, exactly."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRABakeAdapter",
            display_name="Bake Adapter",
            category="TriLoRA/tools",
            description="Writes strengths, block weights and whole stacks into one adapter, exactly: its file does the same at strength 1 in every loader.",
            search_aliases=["save block weights", "lora block weight save", "bake lora", "save lora stack"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model the adapters are for: it tells their blocks and the names of their layers. It is not changed."),
                LoraModel.Input("adapter", optional=True, tooltip="From Load Adapter, Train Adapter, Resize Adapter or another tool. The next three inputs are its own."),
                io.Float.Input("strength_model", default=1.0, min=-20.0, max=20.0, step=0.05, optional=True,
                               tooltip="What 1 of the new file stands for on the model: 0.7 writes an adapter that is 0.7 as strong."),
                io.Float.Input("strength_clip", default=1.0, min=-20.0, max=20.0, step=0.05, optional=True,
                               tooltip="The same on the text encoder. 0 leaves its layers out."),
                io.String.Input("block_weights", default="", optional=True, tooltip=BLOCK_WEIGHTS),
                Stack.Input("stack", optional=True, tooltip="Files from Adapter Stack, each with its own strengths, block weights and keep_rank, beside or instead of adapter."),
                io.Clip.Input("clip", optional=True, tooltip="Needed for adapters that have layers for the text encoder."),
            ],
            outputs=[
                LoraModel.Output(display_name="adapter", tooltip="For Save Adapter: the file does at strength 1 what was baked."),
                io.String.Output(display_name="report", tooltip="Layers by kind, how many are sums, and what was left out."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, block_weights="", **others):
        """Run again when a preset that the block weights name has changed."""
        return presets_in(block_weights)

    @classmethod
    def execute(cls, model, adapter=None, strength_model=1.0, strength_clip=1.0, block_weights="", stack=None, clip=None) -> io.NodeOutput:
        if adapter is None and not stack:
            raise TriLoRAError("adapter and stack: nothing is connected; connect an adapter from Load Adapter, or an Adapter Stack")
        with torch.inference_mode(False):
            given = [] if adapter is None else [_of_adapter(adapter, StackEntry("adapter", strength_model, strength_clip, block_weights=block_weights))]
            given += [_of_file(entry) for entry in stack or () if entry.strength_model or entry.strength_clip]
            baked, text = bake_on(model, clip, given)
        compat.show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(baked, text, ui=ui.PreviewText(text))


@dataclass(frozen=True)
class Given:
    """An adapter with the strengths, block weights and keep_rank of a stack's entry; identity: its name and hash for the provenance."""

    state: AdapterState
    entry: StackEntry
    identity: dict[str, str]


def _of_adapter(adapter, entry: StackEntry) -> Given:
    state = as_state(adapter)
    return Given(state, entry, {"name": title(state.metadata), "fingerprint": fingerprint(state)})


def _of_file(entry: StackEntry) -> Given:
    state, digest = read_file(entry.name), hashlib.sha256()
    with open(folder_paths.get_full_path_or_raise("loras", entry.name), "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return Given(state, entry, {"name": entry.name, "sha256": digest.hexdigest()})


def bake_on(model, clip, given: Sequence[Given]) -> tuple[AdapterState, str]:
    """(adapter, report) with the effect that all given adapters have together on a MODEL and an optional CLIP.

    Neither is changed. Layers get the names under which Save Adapter writes them. Raises TriLoRAError where an adapter
    does not fit the model, and where the result cannot be written exactly (`trilora_ops.bake`).
    """
    from ..trilora_ops.bake import bake  # here: what only a tool needs must not slow the host's start

    places = Places.of(model, clip)
    sources, targets, notes = [], {}, []
    for one in given:
        state, lost = _placed(one, model, clip, places)
        found = {name: places.names[name] for name in dict.fromkeys(names_in(key, places.names)[0] for key in state)}
        targets |= found
        sources.append(_source(one, state, found, places))
        if lost:
            notes.append(f"{one.entry.name}: {len(lost)} tensors have no place in this model and were left out ({', '.join(lost[:5])})")
    baked, report = bake(sources, targets)
    return baked, "\n".join([f"{len(sources)} adapter{'s' * (len(sources) > 1)}: {report.text()}", *notes])


def _placed(one: Given, model, clip, places: Places) -> tuple[AdapterState, list[str]]:
    """(the layers that have a place in the model, under the names of its family; keys of the others)."""
    name = one.entry.name
    places.patches(one.state, name)  # as a loader reads it: every layer once, whole and of the right size
    tensors = comfy.lora_convert.convert_lora(name_dora_scales(one.state))
    here, lost = {}, []
    for key, tensor in tensors.items():
        heads = names_in(key, places.names)
        if heads and _weight_key(places.names[heads[0]]) in places.shapes:
            here[key] = tensor
        else:
            lost.append(key)
    text = [key for key in lost if spelling(key)[0] == "text encoder"]
    if text and clip is None and one.entry.strength_clip:
        raise TriLoRAError(f"{name}: {len(text)} tensors are for a text encoder ({text[0]}), and clip is not connected; connect it, or set strength_clip "
                           "to 0 to leave them out")
    try:
        return convert_names(AdapterState(here, one.state.metadata), model, clip, "kohya"), lost
    except TriLoRAError as error:
        raise TriLoRAError(f"{name}: {error}") from None


def _source(one: Given, state: AdapterState, targets: dict, places: Places):
    from ..trilora_ops.bake import Source

    entry = one.entry
    weights = block_strengths(entry.block_weights, places.blocks, entry.name) if entry.block_weights.strip() else None
    ratios = {}
    for name, target in targets.items():
        strength = entry.strength_model if _weight_key(target).startswith(PREFIX) else entry.strength_clip
        ratios[name] = strength * (1.0 if weights is None else weights.at(places.blocks.place(target)))
    about = {**one.identity, "strength_model": entry.strength_model, "strength_clip": entry.strength_clip}
    if weights is not None:
        about["block_weights"] = weights.text()
    if entry.keep_rank:
        about["keep_rank"] = entry.keep_rank
    return Source(state, ratios, entry.keep_rank, about)


def _weight_key(target) -> str:
    return target if isinstance(target, str) else target[0]
