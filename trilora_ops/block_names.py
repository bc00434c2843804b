"""Blocks of a file's layers without the model: the ids of `blocks`, read from the names that files give their layers.

For reports alone. Where there is a model its keys decide (`Blocks`); a file may leave open which family it is for, and then
only what every family that fits calls the same gets that name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache
from typing import NamedTuple

from .block_families import ENCODERS, FAMILIES, TEXT_ENCODER, Family
from .blocks import BASE, EMB, TEXT_GROUPS, VISION, numbers_first

_OWN = r"(?:lora_(?:prior_)?unet_|(?:model\.)?diffusion_model\.)"  # what files put before the host's own path of the denoiser
_PREFIX = rf"^(?:{_OWN}|lora_transformer_|lycoris_|transformer\.|unet\.|base_model\.model\.)+"
# diffusers' names for what stands outside the blocks of a U-Net, and for the parts of Flux and HunyuanVideo
_UNET_STEMS = {"conv_in": "input_blocks_0_0", "conv_norm_out": "out_0", "conv_out": "out_2", "time_embedding": "time_embed", "add_embedding": "label_emb",
               "class_embedding": "label_emb"}
_FLUX_LISTS = {"single_transformer_blocks": "single_blocks", "transformer_blocks": "double_blocks",
               "context_embedder_token_refiner_refiner_blocks": "txt_in_individual_token_refiner_blocks", "x_embedder": "img_in",
               "context_embedder": "txt_in", "time_text_embed": "time_in", "norm_out": "final_layer", "proj_out": "final_layer"}
# how the layers of a text encoder are called that is no CLIP
_TEXT_PATHS = {
    "T5": r"(^|[._])encoder[._](block[._]\d|final_layer_norm)|^shared$",
    "LLM": r"^((transformer[._])?model[._])?(layers[._]\d|embed_tokens|norm$|lm_head)|^transformer\.(visual|vision_model|multi_modal)",
}
_UNTOLD = "transformer-blocks"  # SD3, Flux and Qwen-Image call their attention alike in diffusers: a list that no family has


class InFile(NamedTuple):
    """Where a file's layer lies: the block, and what is left of its name within the block."""

    block: str
    rest: str


def blocks_in_file(names: Iterable[str]) -> dict[str, InFile]:
    """Name of a layer -> where it is, in the order in which the model runs; what no family knows is in its own list, or in BASE."""
    names = list(names)
    texts = {name: place for name in names if (place := _text(name))}
    paths = _host_paths([name for name in names if name not in texts])
    fitting = _families(paths.values())
    found = texts | {name: _place(path, fitting) for name, path in paths.items()}
    order = [*TEXT_GROUPS, *(ids.rstrip("#") for family in fitting[:1] for ids in family.places)]

    def running(name: str) -> tuple:
        block = found[name].block
        group = block.partition(".")[0] if name in texts else block.rstrip("0123456789")
        return order.index(group) if group in order else len(order), numbers_first(block), numbers_first(name)

    return {name: found[name] for name in sorted(found, key=running)}


def families_in_file(names: Iterable[str]) -> list[Family]:
    """The families that the names of a file's layers for the denoiser leave open; none where no family fits."""
    return _families(_host_paths([name for name in names if _text(name) is None]).values())


def _families(paths: Collection[str]) -> list[Family]:
    """The families that have a place for the most of these paths; none where a list's name leaves them open."""
    if any(path.startswith(_UNTOLD) for path in paths):
        return []
    fits = {family: sum(_longest(path, family) is not None for path in paths) for family in FAMILIES}
    most = max(fits.values())
    return [family for family in FAMILIES if fits[family] == most > 0]


def _place(path: str, families: list[Family]) -> InFile:
    found = [place for family in families if (place := _longest(path, family))]
    nearest = {place for place in found if len(place.rest) == min(len(other.rest) for other in found)}
    if len(nearest) == 1:
        return nearest.pop()
    if match := re.match(r"(.+?)_([0-9]+)_(?!(?:weight|bias)$)(.+)", path):  # its own first list
        return InFile(f"{match[1].replace(_UNTOLD, 'transformer_blocks')}.{(match[2].lstrip('0') or '0').zfill(2)}", match[3])
    return InFile(BASE, path)


def _longest(path: str, family: Family) -> InFile | None:
    """The place in a family of a path whose dots are "_"."""
    for pattern, group, digits in _flat_patterns(family):
        if match := pattern.match(path):
            return InFile(group + (match[1].zfill(digits) if digits else ""), path[match.end():])
    return None


@cache
def _flat_patterns(family: Family) -> list[tuple[re.Pattern, str, int]]:
    paths = [(path, ids) for ids, paths in family.places.items() for path in paths.split()]
    return [(re.compile(re.escape(path.replace(".", "_")).replace(r"\#", r"(\d+)") + "(?:_|$)"), ids.rstrip("#"), ids.count("#"))
            for path, ids in sorted(paths, key=lambda place: -len(place[0]))]


def _host_paths(names: list[str]) -> dict[str, str]:
    """Name -> the host's path with "_" for ".", as far as diffusers' names can be told."""
    flat = {name: re.sub(_PREFIX, "", name).replace(".", "_") for name in names}
    lists = _diffusers_lists(set(flat.values()), own=all(re.match(_OWN, name) for name in names))
    return {name: _renamed(_original_unet(path), lists) for name, path in flat.items()}


def _diffusers_lists(paths: set[str], own: bool) -> dict[str, str]:
    """What diffusers calls its lists and stems -> the host's names, by what else there is; own: the names are the host's."""
    if any(re.match(r"(down|up)_blocks_\d_(attentions|resnets)|mid_block_", path) for path in paths):
        return _UNET_STEMS
    lists = {match[1] for path in paths if (match := re.match(r"((?:single_|joint_)?transformer_blocks)_\d+_", path))}
    if "joint_transformer_blocks" in lists:  # AuraFlow
        return {"joint_transformer_blocks": "double_layers", "single_transformer_blocks": "single_layers"}
    if "single_transformer_blocks" in lists:  # Flux, HunyuanVideo
        return _FLUX_LISTS
    layers = {re.sub(r"^transformer_blocks_\d+_", "", path) for path in paths}
    if own or not lists or any(re.match(r"(img|txt)_(mlp|mod)_|attn1_", layer) for layer in layers):  # Qwen-Image, LTX-Video, PixArt
        return {}
    if {"attn_to_q", "attn2_to_q"} <= layers:  # SD3.5 Medium
        return {"transformer_blocks": "joint_blocks"}
    return {"transformer_blocks": _UNTOLD}


def _renamed(path: str, names: dict[str, str]) -> str:
    return next((new + path.removeprefix(old) for old, new in names.items() if path == old or path.startswith(f"{old}_")), path)


def _original_unet(path: str) -> str:
    """The original path of a layer of a U-Net that diffusers calls by level and index; two ResBlocks a level, as all but KOALA have."""
    if match := re.match(r"(down|up)_blocks_(\d)_(attentions|resnets|downsamplers|upsamplers)_(\d)(.*)", path):
        side, level, kind, index = match[1], int(match[2]), match[3], int(match[4])
        index = {"downsamplers": 2, "upsamplers": 2}.get(kind, index)
        slot = {"attentions": 1, "upsamplers": 2}.get(kind, 0)
        return (f"input_blocks_{3 * level + index + 1}" if side == "down" else f"output_blocks_{3 * level + index}") + f"_{slot}{match[5]}"
    if match := re.match(r"mid_block_(attentions|resnets)_(\d)(.*)", path):
        return f"middle_block_{1 if match[1] == 'attentions' else 2 * int(match[2])}{match[3]}"
    return path


def _text(name: str) -> InFile | None:
    """Where a text encoder's layer lies; None for a layer of the denoiser. `lora_te_` is CLIP-L, which only the SDXL refiner has not."""
    if match := re.match(r"text_encoders\.(\w+?)\.(transformer\..+)", name):  # the host's own key
        path, group = match[2], next(group for mark, group in ENCODERS if mark in match[1])
    elif match := re.match(r"(?:text_encoders\.|(lora_prior_te_|lora_te2_|text_encoder_2\.)|lora_te(?:_|\d_)|text_encoder(?:_3)?\.)(.+)", name):
        path, group = match[2], next((group for group, layers in _TEXT_PATHS.items() if re.search(layers, match[2])), "TE2" if match[1] else "TE1")
    else:
        return None
    path = re.sub(r"^(transformer_)?(text_model_|bert_)?", "", path.replace(".", "_"))
    if place := next((match for pattern in _text_patterns() if (match := pattern.match(path))), None):
        return InFile(f"{group}.{int(place[1]):02d}", path[place.end():])
    return InFile(f"{group}.{VISION if re.match('visual_|vision_|multi_modal_', path) else EMB}", path)


@cache
def _text_patterns() -> list[re.Pattern]:
    """Of the numbered lists of text encoders, without what some files leave out of the beginning."""
    lists = {re.sub(r"^(transformer\.)?(text_model\.|bert\.)?", "", path) for path in TEXT_ENCODER.places["##"].split()}
    return [re.compile(re.escape(path.replace(".", "_")).replace(r"\#", r"(\d{1,9})") + "_") for path in sorted(lists, key=len, reverse=True)]
