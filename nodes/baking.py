"""What Bake Adapter does: every adapter under the names of the model's family, with the strengths of its layers, then all as one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import folder_paths

from ..trilora_ops.bake import Source, bake
from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.key_names import names_in
from ..trilora_ops.message_words import counted, some
from ..trilora_ops.metadata import fingerprint, title
from ..trilora_ops.naming import PREFIX, split_target
from .block_strengths import block_strengths
from .comfy_patches import Places
from .files import as_state, read_file
from .names import convert_names
from .types import StackEntry


@dataclass(frozen=True)
class Given:
    """An adapter with the strengths, block weights and keep_rank of a stack's entry; identity: its name and hash for the provenance."""

    state: AdapterState
    entry: StackEntry
    identity: dict[str, str]


def of_adapter(adapter, entry: StackEntry) -> Given:
    """A LORA_MODEL with the strengths of `entry`."""
    state = as_state(adapter)
    return Given(state, entry, {"name": title(state.metadata), "fingerprint": fingerprint(state)})


def of_file(entry: StackEntry) -> Given:
    """A stack's entry, its file read."""
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
    places = Places.of(model, clip)
    sources, targets = [], {}
    for one in given:
        state = _placed(one, model, clip, places)
        found = {name: places.names[name] for name in dict.fromkeys(names_in(key, places.names)[0] for key in state)}
        targets |= found
        sources.append(_source(one, state, found, places))
    baked, report = bake(sources, targets, _tick())
    return baked, f"{len(sources)} adapter{'s' * (len(sources) > 1)}: {report.text()}"


def _tick():
    """Moves the node's progress bar, and stops where the user has asked to."""
    bar = None

    def tick(done: int, count: int) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(count)
        bar.update_absolute(done)

    return tick


def _placed(one: Given, model, clip, places: Places) -> AdapterState:
    """The layers that have a place in the model, under the names of its family."""
    name = one.entry.name
    places.patches(one.state, name)  # as a loader reads it: every layer once, whole and of the right size; the rest is told
    matched = places.match(one.state, name)
    text = matched.diagnosis.left_text
    if text and clip is None and one.entry.strength_clip:
        raise TriLoRAError(f"{name}: {counted(len(text), 'layer')} for a text encoder ({some(text, 1)}), and clip is not connected; connect it, or set strength_clip "
                           "to 0 to leave them out")
    here = {layer + ending: tensor for layer, found in matched.layers.items() for ending, tensor in found.items()}
    return convert_names(AdapterState(here, one.state.metadata), model, clip, "kohya", name)


def _source(one: Given, state: AdapterState, targets: dict, places: Places):
    entry = one.entry
    weights = block_strengths(entry.block_weights, places.blocks, entry.name) if (entry.block_weights or "").strip() else None
    ratios = {}
    for name, target in targets.items():
        strength = entry.strength_model if split_target(target)[0].startswith(PREFIX) else entry.strength_clip
        ratios[name] = strength * (1.0 if weights is None else weights.at(places.blocks.place(target)))
    about = {**one.identity, "strength_model": entry.strength_model, "strength_clip": entry.strength_clip}
    if weights is not None:
        about["block_weights"] = weights.text()
    if entry.keep_rank:
        about["keep_rank"] = entry.keep_rank
    return Source(state, ratios, entry.keep_rank, about)
