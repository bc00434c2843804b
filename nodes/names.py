"""Names of a file's layers against a model: what each is for, told by the host's own key map, and other spellings of it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import comfy.lora
import comfy.model_base
import comfy.utils

from ..trilora_ops.bounds import read_json
from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.key_names import Spellings, parts_of_qkv
from ..trilora_ops.message_words import counted, short, some
from ..trilora_ops.naming import PREFIX, UNetLayout, peft_name, peft_spellings, public_name, split_target
from .comfy_host import family_of
from .matching import match, target_shapes, title_of
from .notices import notice


def layer_names(model, clip) -> dict:
    """Every name that a file may give a layer -> the host's target: a key, or a tuple of key, slice and function.

    model, clip: patchers (clip may be None). The host's own map, the names that PEFT and diffusers write today, which it
    does not know for the attention layers of U-Nets and for text encoders, and those of q, k and v in one weight.
    """
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    names_of_today(names if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names))
    shapes = {key: tuple(weight.shape) for key, weight in model.model.named_parameters()}
    if isinstance(model.model, comfy.model_base.HunyuanVideo):  # blocks as in Flux, for which alone the host knows diffusers' names
        found = comfy.utils.flux_to_diffusers(model.model.model_config.unet_config, output_prefix=PREFIX)
        for name, target in found.items():
            if name.endswith(".weight") and "transformer_blocks" in name and split_target(target)[0] in shapes:
                names.setdefault("transformer." + name.removesuffix(".weight"), target)
    parts = parts_of_qkv(shapes)
    for name, target in list(names.items()):
        key, part, _ = split_target(target)
        if part and key in shapes and sum(part[1:]) > shapes[key][part[0]]:  # Lumina 2: the host takes k and v for as large as q
            names[name] = parts.get(f"{key.removesuffix('qkv.weight')}to_{name[-1]}", target)
    known = {target[:2] for target in names.values() if isinstance(target, tuple)}
    for name, target in parts.items():
        if target not in known:
            names.setdefault(name, target)
    return names


def names_of_today(names: dict) -> dict:
    """A map of the host's, with PEFT's and diffusers' spellings of today added to it."""
    for name, target in list(names.items()):
        for other in peft_spellings(name):
            names.setdefault(other, target)
    return names


def convert_names(state: AdapterState, model, clip, style: str, name: str = "adapter") -> AdapterState:
    """The same adapter with every layer's name in one style; endings and tensors stay.

    style: one of `naming.STYLES`; model, clip: patchers (clip may be None); name: the adapter's, for messages. What has no
    place in the model is left out and told in a notice. Raises TriLoRAError where too little has one
    (`Diagnosis.refusal`), for layers of a text encoder without CLIP, and for two names of one place, of which the host
    would drop one.
    """
    spell = Speller(model, clip)
    matched = match(state, spell.spellings, name, title_of(model), clip is not None)
    diagnosis = matched.diagnosis
    if refusal := diagnosis.refusal():
        raise TriLoRAError(refusal)
    if clip is None and (text := diagnosis.left_text):
        raise TriLoRAError(f"{name}: {counted(len(text), 'layer')} for a text encoder ({some(text, 1)}), and clip is not connected; connect it")
    renamed = {layer: spell.name(matched.names[layer], style) for layer in matched.layers}
    tensors = {renamed[layer] + ending: tensor for layer, found in matched.layers.items() for ending, tensor in found.items()}
    if text := diagnosis.notice():
        notice(text)
    places: dict = {}
    for layer in renamed:
        if (other := places.setdefault(matched.names[layer], layer)) != layer:
            raise TriLoRAError(f"{name}: {short(layer)} and {short(other)} are two names of one layer of this model; the adapter is broken, since only one of them "
                               "would be applied")
    return AdapterState(tensors, _with_plan(getattr(state, "metadata", {}), renamed))


class Speller:
    """The name of a target in every style, as the host's map for one MODEL and CLIP knows it."""

    def __init__(self, model, clip):
        self.names = layer_names(model, clip)
        self.spellings = Spellings(self.names, target_shapes(model, clip))
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


def _with_plan(metadata: Mapping[str, str], renamed: Mapping[str, str]) -> dict[str, str]:
    try:
        plan = read_json(metadata["trilora.plan"])
        return {**metadata, "trilora.plan": json.dumps({renamed.get(name, name): rank for name, rank in plan.items()}, sort_keys=True)}
    except (KeyError, ValueError, AttributeError):  # no plan, or not one of ours
        return dict(metadata)
