"""Names of a file's layers against a model: what each is for, told by the host's own key map, and other spellings of it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import comfy.lora
import comfy.lora_convert

from ..trilora_ops.bounds import read_json
from ..trilora_ops.checkpoint import ALPHA, AdapterState
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.files.low_rank import PAIRS
from ..trilora_ops.naming import PREFIX, UNetLayout, peft_name, peft_spellings, public_name
from .comfy_host import family_of


def layer_names(model, clip) -> dict:
    """Every name that a file may give a layer -> the host's target: a key, or a tuple of key, slice and function.

    model, clip: patchers (clip may be None). The host's own map, and the names that PEFT and diffusers write today,
    which it does not know for the attention layers of U-Nets and for text encoders.
    """
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    return names_of_today(names if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names))


def names_of_today(names: dict) -> dict:
    """A map of the host's, with PEFT's and diffusers' spellings of today added to it."""
    for name, target in list(names.items()):
        for other in peft_spellings(name):
            names.setdefault(other, target)
    return names


def names_in(key: str, names: Mapping) -> list[str]:
    """The names in `names` that a file's key may begin with, the longest first: cut off at any of its dots, with or without "_lora"."""
    heads, place = [], len(key)
    while place > 0:
        head = key[:place]
        heads += [name for name in dict.fromkeys((head, head.removesuffix("_lora"))) if name in names]
        place = key.rfind(".", 0, place)
    return heads


def convert_names(state: AdapterState, model, clip, style: str) -> AdapterState:
    """The same adapter with every layer's name in one style; endings and tensors stay.

    style: one of `naming.STYLES`; model, clip: patchers (clip may be None). Raises TriLoRAError for layers that have no
    place in the model, and for two names of one place, of which the host would drop one.
    """
    spell = Speller(model, clip)
    tensors, renamed, lost = {}, {}, {}  # lost: an ordered set
    for key, tensor in comfy.lora_convert.convert_lora(dict(state)).items():
        name = next(iter(names_in(key, spell.names)), None)
        if name is None:
            lost[_layer_of(key)] = None
            continue
        renamed[name] = renamed.get(name) or spell.name(spell.names[name], style)
        tensors[renamed[name] + key[len(name):]] = tensor
    if lost:
        raise TriLoRAError(f"{len(lost)} layers have no place in this model ({', '.join(list(lost)[:5])}); connect the model the adapter "
                           "was made for" + ("" if clip is not None else ", and its CLIP if they are a text encoder's"))
    places: dict = {}
    for name in renamed:
        if (other := places.setdefault(spell.names[name], name)) != name:
            raise TriLoRAError(f"{name} and {other} are two names of one layer of this model; the adapter is broken, since only one of them would be applied")
    return AdapterState(tensors, _with_plan(getattr(state, "metadata", {}), renamed))


class Speller:
    """The name of a target in every style, as the host's map for one MODEL and CLIP knows it."""

    def __init__(self, model, clip):
        self.names = layer_names(model, clip)
        self.family = family_of(model.model)
        self.layout = UNetLayout.of(model.model.state_dict())
        self._known: dict = {}
        for name, target in self.names.items():
            self._known.setdefault(target, []).append(name)
        self._encoders = {target.split(".")[0] for target in self._known if isinstance(target, str) and not target.startswith(PREFIX)}

    def name(self, target, style: str) -> str:
        """The first name in the style's order of preference that the host's map leads back to this target."""
        return next(name for name in (*self._wanted(target, style), *self._known[target]) if self.names.get(name) == target)

    def _wanted(self, target, style: str) -> list[str]:
        known = self._known[target]
        if not isinstance(target, str):  # a slice of a fused weight, or one with its halves swapped: diffusers' name
            return [name for name in known if name.startswith("transformer.")]
        if target.startswith(PREFIX):
            own = {"kohya": public_name, "peft": peft_name}.get(style)
            return ([own(target, self.family, self.layout)] if own else []) + [public_name(target, "generic")]
        if style == "kohya":  # lora_te_ for the only encoder; of two numbers the higher one (T5: lora_te3_)
            names = sorted((name for name in known if name.startswith("lora_te")), reverse=True)
            return sorted(names, key=lambda name: name.startswith("lora_te_") == (len(self._encoders) > 1))
        return [name for name in known if style == "peft" and name.startswith(("text_encoder.", "text_encoder_2."))]


def _layer_of(key: str) -> str:
    ends = [ALPHA, *(end for pair in PAIRS for end in pair)]
    return next((key.removesuffix(end) for end in ends if key.endswith(end)), key)


def _with_plan(metadata: Mapping[str, str], renamed: Mapping[str, str]) -> dict[str, str]:
    try:
        plan = read_json(metadata["trilora.plan"])
        return {**metadata, "trilora.plan": json.dumps({renamed.get(name, name): rank for name, rank in plan.items()}, sort_keys=True)}
    except (KeyError, ValueError, AttributeError):  # no plan, or not one of ours
        return dict(metadata)
