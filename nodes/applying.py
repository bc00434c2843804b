"""Adapters onto a MODEL and an optional CLIP: one, or all of a stack."""

from __future__ import annotations

from ..trilora_ops.checkpoint import AdapterState
from .block_strengths import weigh
from .comfy_patches import Places
from .comfy_stack import stack_patches
from .files import read_file
from .types import StackEntry


def apply_state(state: AdapterState, model, clip, name: str, strength_model: float, strength_clip: float, keep: int = 0, block_weights: str = ""):
    """(model, clip) patched with an adapter; both are clones, clip stays None where it was.

    block_weights: see `block_strengths.weigh`. Raises TriLoRAError before anything is patched if the adapter does not
    fit, or the text cannot be read.
    """
    places = Places.of(model, clip)
    patches = weigh(block_weights, places.patches(state, name, keep), places, name)
    model, clip = model.clone(), None if clip is None else clip.clone()
    for patcher, strength in ((model, strength_model), (clip, strength_clip)):
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
    files = [(weigh(e.block_weights, places.patches(read_file(e.name), e.name, e.keep_rank), places, e.name), e) for e in used]
    model = model.clone()
    if model_patches := stack_patches((patches, e.strength_model) for patches, e in files):
        model.add_patches(model_patches)
    if clip is not None:
        clip = clip.clone()
        if clip_patches := stack_patches((patches, e.strength_clip) for patches, e in files):
            clip.add_patches(clip_patches)
    return model, clip
