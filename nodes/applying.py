"""Adapters onto a MODEL and an optional CLIP: one, or all of a stack."""

from __future__ import annotations

from ..trilora_ops.checkpoint import AdapterState
from .block_strengths import weigh
from .comfy_patches import Places
from .comfy_stack import stack_patches
from .files import read_file
from .types import StackEntry


def apply_state(state: AdapterState, entry: StackEntry, model, clip):
    """(model, clip) patched with an adapter as its entry says; both are clones, clip stays None where it was.

    Raises TriLoRAError before anything is patched if the adapter does not fit, or its block weights cannot be read.
    """
    places = Places.of(model, clip)
    patches = _patches(state, entry, places)
    model, clip = model.clone(), None if clip is None else clip.clone()
    for patcher, strength in ((model, entry.strength_model), (clip, entry.strength_clip)):
        if patcher is not None and strength and patches:
            patcher.add_patches(patches, strength)  # it takes those whose key it has
    return model, clip


def apply_stack(entries: tuple[StackEntry, ...], model, clip):
    """(model, clip) with all entries on them, one patch a weight; both are clones, clip stays None where it was.

    Files whose strengths are 0 are not read. Raises TriLoRAError before anything is patched if a file does not fit, or its
    block weights cannot be read.
    """
    places = Places.of(model, clip)
    used = [e for e in entries if e.strength_model or (clip is not None and e.strength_clip)]
    files = [(_patches(read_file(e.name), e, places), e) for e in used]
    model = model.clone()
    if model_patches := stack_patches((patches, e.strength_model) for patches, e in files):
        model.add_patches(model_patches)
    if clip is not None:
        clip = clip.clone()
        if clip_patches := stack_patches((patches, e.strength_clip) for patches, e in files):
            clip.add_patches(clip_patches)
    return model, clip


def _patches(state: AdapterState, entry: StackEntry, places: Places):
    return weigh(entry.block_weights, places.patches(state, entry.name, entry.keep_rank), places, entry.name)
