"""Adapters as the host's patches: reading a file into them, checked before anything is applied."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.lora
import comfy.lora_convert
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor

from ..trilora_ops.adapter import LayerShape
from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.factors import LowRank, canonicalise, is_canonical, keep_rank
from ..trilora_ops.merge import add_low_rank_
from .comfy_transforms import TransformPatch

log = logging.getLogger("trilora")
_IDENTITY = (lambda a: a).__code__.co_code


class LowRankPatch(LoRAAdapter):
    """The host's LoRA adapter, merged with one addmm_ instead of forming the delta.

    Holds what its parent holds, (loaded_keys, (up, down, alpha, mid, dora_scale, reshape)), so that the host can
    rebuild it and its bypass mode works; everything but a plain low-rank merge is left to the parent.
    """

    @torch.no_grad()
    def calculate_weight(self, weight, key, strength, strength_model, offset, function,
                         intermediate_dtype=torch.float32, original_weight=None):
        """W += strength * alpha / r * up * down, in place; a `function` patch gets the delta it asks for."""
        up, down, alpha, mid, dora_scale, reshape = self.weights
        own_work = mid is None and dora_scale is None and reshape is None and _is_identity(function) and weight.element_size() > 1
        if not own_work:
            return super().calculate_weight(weight, key, strength, strength_model, offset, function, intermediate_dtype, original_weight)
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        return add_low_rank_(weight, [(LowRank(up.flatten(1), down.flatten(1), scale), strength)])


@dataclass(frozen=True)
class Patches:
    """Patches by the host's target key, and what became of the file's keys."""

    by_target: dict
    unmatched: tuple[str, ...]


def key_map(model, clip) -> dict:
    """Every name that a file may give a layer -> the host's target key, for a MODEL and an optional CLIP patcher."""
    names: dict = {}
    names = comfy.lora.model_lora_keys_unet(model.model, names)
    return names if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)


def patches_from_state(state: AdapterState, model, clip, name: str, keep: int = 0) -> Patches:
    """Every layer of a file as a patch; low-rank ones as `LowRankPatch`, other kinds as the host's own.

    model, clip: patchers (clip may be None); name: the file's, for messages; keep: directions kept of low-rank layers,
    0 = all. Raises TriLoRAError if nothing matches, or a matched layer's shape is wrong; nothing is applied by this.
    """
    names = key_map(model, clip)
    tensors = comfy.lora_convert.convert_lora(dict(state))
    loaded = comfy.lora.load_lora(tensors, names, log_missing=False)
    unmatched = tuple(key for key in tensors if not _is_matched(key, names))
    if not loaded:
        raise TriLoRAError(f"{name}: none of its {len(tensors)} keys fits this model (for example {next(iter(tensors), 'none')}); "
                           "it was made for another model family" + ("" if clip is not None else ", or for a text encoder: connect CLIP"))
    shapes = _target_shapes(model, clip)
    patches, other_kinds = {}, 0
    for target, patch in loaded.items():
        _check_shape(name, target, patch, shapes)
        if keep and not _is_low_rank(patch):
            other_kinds += 1
        patches[target] = _own_patch(patch, keep) if type(patch) is LoRAAdapter else patch
    if other_kinds:
        log.warning("%s: keep_rank left %d layers alone that are not low-rank", name, other_kinds)
    return Patches(patches, unmatched)


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


def _is_identity(function) -> bool:
    # the host puts `lambda a: a` where a patch has no function; every such lambda has this byte code
    code = getattr(function, "__code__", None)
    return function is None or (code is not None and code.co_code == _IDENTITY)


def _is_matched(key: str, names: Mapping) -> bool:
    place = len(key)
    while place > 0:
        head = key[:place]
        if head in names or head.removesuffix("_lora") in names:
            return True
        place = key.rfind(".", 0, place)
    return False


def _target_shapes(model, clip) -> dict[str, torch.Size]:
    # parameters, not the state dict: a quantised layer's state dict holds its packed storage
    shapes = {key: tensor.shape for key, tensor in model.model.named_parameters(remove_duplicate=False)}
    if clip is not None:
        shapes |= {key: tensor.shape for key, tensor in clip.cond_stage_model.named_parameters(remove_duplicate=False)}
    return shapes


def _check_shape(name: str, target, patch, shapes: Mapping[str, torch.Size]) -> None:
    key, offset = (target, None) if isinstance(target, str) else (target[0], target[1] if len(target) > 1 else None)
    if key not in shapes:
        return
    expected = list(shapes[key])
    if offset is not None:
        expected[offset[0]] = offset[2]
    if isinstance(patch, TransformPatch):
        try:
            patch.adapter(LayerShape(expected[0], expected[1], tuple(expected[2:])), torch.device("cpu"))
        except TriLoRAError as error:
            raise TriLoRAError(f"{name}: its layer for {key}: {error}; nothing was applied") from None
        return
    if isinstance(patch, LoRAAdapter):
        up, down, _, mid, _, reshape = patch.weights
        if mid is not None or reshape is not None:
            return
        got = [up.shape[0], down.flatten(1).shape[1]]
        wanted = [expected[0], torch.Size(expected[1:]).numel()]
        fits = got == wanted and up.flatten(1).shape[1] == down.shape[0]
    elif not isinstance(patch, WeightAdapterBase) and patch[0] == "diff" and isinstance(patch[1][0], Tensor):
        got, wanted = list(patch[1][0].shape), expected
        fits = got == wanted
    else:
        return
    if not fits:
        raise TriLoRAError(f"{name}: its layer for {key} is {tuple(got)}, expected {tuple(wanted)}; it was made for another model; nothing was applied")
