"""Adapters as the host's patches: reading a file into them, checked before anything is applied."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import comfy.lora
import comfy.lora_convert
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase

from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.factors import LowRank, canonicalise, is_canonical, keep_rank
from ..trilora_ops.naming import split_target
from ..trilora_ops.peft_config import name_dora_scales
from .comfy_low_rank import LowRankPatch
from .comfy_stack import linear
from .file_keys import check_left, check_once
from .names import layer_names, names_in
from .patch_shapes import check_shape, target_shapes

log = logging.getLogger("trilora")


@dataclass(frozen=True)
class Places:
    """Where a file's layers can go: every name a file may give a layer -> the host's target key, and the weights' shapes."""

    names: dict
    shapes: dict[str, torch.Size]
    has_clip: bool

    @classmethod
    def of(cls, model, clip) -> "Places":
        """For a MODEL and an optional CLIP patcher."""
        return cls(layer_names(model, clip), target_shapes(model, clip), clip is not None)

    @functools.cached_property
    def blocks(self):
        """The `Blocks` of the model and of the text encoder."""
        from ..trilora_ops.blocks import Blocks  # not at the pack's import: only a graph with block weights needs it

        return Blocks.of(self.shapes)

    def patches(self, state: AdapterState, name: str, keep: int = 0) -> dict:
        """Every layer of a file as a patch by the host's target key; low-rank ones as `LowRankPatch`, others as the host's own.

        Each is linear in the strength that add_patches is given, see `comfy_stack.linear`.
        name: the file's, for messages; keep: directions kept of low-rank layers, 0 = all. Keys without a place in the
        model are counted in the log. Raises TriLoRAError if none has one, or a layer's shape is wrong.
        """
        tensors = comfy.lora_convert.convert_lora(name_dora_scales(state))
        found = {key: names_in(key, self.names) for key in tensors}
        check_once(name, {key: (heads[0], self.names[heads[0]]) for key, heads in found.items() if heads}, tensors)
        used = set().union(*found.values())
        # the host tries every spelling of every name it is given: only those that the file has
        try:
            loaded = comfy.lora.load_lora(tensors, {head: self.names[head] for head in self.names if head in used}, log_missing=False)
        except KeyError as error:
            raise TriLoRAError(f"{name}: {error.args[0]} is missing, the other half of a layer; copy or download the file again; "
                               "nothing was applied") from None
        if not loaded:
            raise TriLoRAError(f"{name}: none of its {len(tensors)} keys fits this model (for example {next(iter(tensors), 'none')}); "
                               "it was made for another model family" + ("" if self.has_clip else ", or for a text encoder: connect CLIP"))
        for target, patch in loaded.items():
            check_shape(name, target, patch, self.shapes)
        if keep and (others := sum(not _is_low_rank(patch) for patch in loaded.values())):
            log.warning("%s: keep_rank left %d layers alone that are not low-rank", name, others)
        # the adapters of one file share the host's set of the keys it has used
        taken = next((patch.loaded_keys for patch in loaded.values() if isinstance(patch, WeightAdapterBase)), None)
        left = [key for key, heads in found.items() if heads and taken is not None and key not in taken]
        check_left(name, left)
        nowhere = {target for target in loaded if split_target(target)[0] not in self.shapes}
        unmatched = [key for key, heads in found.items() if not heads] + left + [f"{target} (the model has no such weight)" for target in nowhere]
        if unmatched:
            log.warning("%s: %d of %d keys have no place in this model%s: %s", name, len(unmatched), len(state),
                        "" if self.has_clip else " (no CLIP connected)", ", ".join(unmatched[:5]))
        return {target: _own_patch(patch, keep) if type(patch) is LoRAAdapter else linear(target, patch)
                for target, patch in loaded.items() if target not in nowhere}


def patches_from_state(state: AdapterState, model, clip, name: str, keep: int = 0) -> dict:
    """`Places.patches` of one file on a model and an optional text encoder; nothing is applied by this."""
    return Places.of(model, clip).patches(state, name, keep)


def _is_low_rank(patch) -> bool:
    # a Tucker core or DoRA's magnitudes make it more than up * down
    return type(patch) is LoRAAdapter and patch.weights[3] is None and patch.weights[4] is None


def _own_patch(patch: LoRAAdapter, keep: int) -> LowRankPatch:
    up, down, alpha, mid, dora_scale, reshape = patch.weights
    if keep and _is_low_rank(patch):
        pair = LowRank(up.flatten(1), down.flatten(1), 1.0 if alpha is None else alpha / down.shape[0])
        if keep < pair.rank:
            pair = keep_rank(pair if is_canonical(pair) else canonicalise(pair), keep)
            rows = pair.rank
            up, alpha = pair.up.reshape(up.shape[0], rows, *up.shape[2:]), pair.alpha
            down = pair.down.reshape(rows, *down.shape[1:])
    return LowRankPatch(patch.loaded_keys, (up, down, alpha, mid, dora_scale, reshape))
