"""Names of layers in files: from the model's own key to the name other tools know, per family.

A target key is the weight's key in the host's state dict, `diffusion_model.<path>.weight`. SD1.x/SD2.x files use the
diffusers-derived names that kohya's trainer writes (`lora_unet_down_blocks_0_attentions_0_...`), SDXL files the
original ones (`lora_unet_input_blocks_4_1_...`), every other family the host's generic form (the key without `.weight`).
PEFT and diffusers call a U-Net's layers by diffusers' module path, `unet.down_blocks.0.attentions.0. ...`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import TriLoRAError

FAMILIES = ("sd1", "sd2", "sdxl", "generic")
STYLES = ("kohya", "peft", "generic")  # spellings of a file's keys
PREFIX = "diffusion_model."

_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
           "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
_STEM = {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
         "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
# diffusers' parent of the pooled-text embedding, by family
_LABEL = {"sdxl": "add_embedding", "sd2": "class_embedding", "sd1": "class_embedding"}
# how files begin a layer's name; the first that fits
_ORIGINAL = r"(input_blocks|output_blocks|middle_block|time_embed_|label_emb|out_[02]$)"
_DIFFUSERS = r"(down_blocks|up_blocks|mid_block|conv_|time_embedding|add_embedding|class_embedding)"
_SPELLINGS = (
    ("text encoder", r"lora_te_"), ("text encoder", r"lora_te\d_"), ("text encoder", r"text_encoder(_\d)?\."),
    ("text encoder", r"text_encoders\."), ("text encoder", r"lora_prior_te_"), ("denoiser", rf"lora_unet_{_ORIGINAL}"),
    ("denoiser", rf"lora_unet_{_DIFFUSERS}"), ("denoiser", r"lora_unet_"), ("denoiser", r"lora_transformer_"),
    ("denoiser", r"lora_prior_unet_"), ("denoiser", r"lycoris_"), ("denoiser", r"unet\..*\.processor\."), ("denoiser", r"unet\."),
    ("denoiser", r"diffusion_model\."), ("denoiser", r"transformer\."), ("denoiser", r"base_model\.model\."),
)


def split_target(target) -> tuple:
    """(key, slice (axis, start, length) or None, function or None) of a target of the host's: a key, or a tuple of these."""
    return (target, None, None) if isinstance(target, str) else (*target, None, None)[:3]


@dataclass(frozen=True)
class UNetLayout:
    """Where an LDM U-Net's numbered blocks stand in diffusers' levels.

    inputs/outputs: block number -> (level, index within the level).
    """

    inputs: dict[int, tuple[int, int]]
    outputs: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, keys: Iterable[str]) -> "UNetLayout":
        """Read from the model's keys: an `input_blocks.n.0.op` closes a level on the way down, an upsampling `conv` on the way up."""
        keys = list(keys)
        down = _blocks(keys, "input_blocks")
        up = _blocks(keys, "output_blocks")
        ends_down = {n for n in down if any(k.startswith(f"{PREFIX}input_blocks.{n}.0.op.") for k in keys)}
        ends_up = {n for n in up if any(re.match(rf"{re.escape(PREFIX)}output_blocks\.{n}\.[12]\.conv\.", k) for k in keys)}
        return cls(_levels([n for n in down if n > 0], ends_down), _levels(up, ends_up))


def public_name(key: str, family: str, layout: UNetLayout | None = None) -> str:
    """The layer's name in a file, without `.lora_up.weight`.

    key: target key ending in `.weight`; layout: needed for the families "sd1" and "sd2". Raises TriLoRAError for an unknown family.
    """
    path = key.removesuffix(".weight")
    if family == "generic" or not path.startswith(PREFIX):
        return path
    path = path.removeprefix(PREFIX)
    if family in ("sd1", "sd2"):
        path = _diffusers_path(path, layout)
    elif family != "sdxl":
        raise TriLoRAError(f"family={family!r}: choose one of {', '.join(FAMILIES)}")
    return "lora_unet_" + path.replace(".", "_")


def peft_name(key: str, family: str, layout: UNetLayout | None = None) -> str:
    """The layer's name in a PEFT file, without `.lora_A.weight`: `unet.<diffusers' module path>`, else the generic name.

    key: target key ending in `.weight`; layout: needed for every family but "generic".
    """
    path = key.removesuffix(".weight")
    if family == "generic" or not path.startswith(PREFIX):
        return path
    path = path.removeprefix(PREFIX)
    match = re.fullmatch(r"label_emb\.0\.([02])", path)
    return "unet." + (f"{_LABEL[family]}.linear_{int(match[1]) // 2 + 1}" if match else _diffusers_path(path, layout))


def peft_spellings(name: str) -> tuple[str, ...]:
    """What PEFT and diffusers write today for a layer that the host knows by diffusers' older name; () for any other.

    The host still looks for attention processors: `unet.X.attn1.processor.to_q` is `unet.X.attn1.to_q` today,
    `unet.X.attn1.processor.to_out` is `unet.X.attn1.to_out.0`; PEFT's own files say `base_model.model.` for `unet.`.
    transformers 5 has left the `text_model` out of its text encoder.
    """
    if name.startswith("text_encoder.text_model."):
        return ("text_encoder." + name.removeprefix("text_encoder.text_model."),)
    if not name.startswith("unet."):
        return ()
    today = re.sub(r"\.processor\.(to_out$)?", lambda m: ".to_out.0" if m[1] else ".", name)
    own = "base_model.model." + today.removeprefix("unet.")
    return (own,) if today == name else (today, own)


def spelling(name: str) -> tuple[str, str]:
    """(part of the model, how its layers are spelled) of a layer's name in a file, told from the name alone.

    part: "denoiser" or "text encoder". Two files with one spelling call a layer by one name; with different ones they
    may not, and only the model's own keys can tell.
    """
    for part, pattern in _SPELLINGS:
        if re.match(pattern, name):
            return part, pattern
    return "denoiser", ""


def _diffusers_path(path: str, layout: UNetLayout) -> str:
    for stem, name in _STEM.items():
        if path == stem:
            return name
    match = re.match(r"(input_blocks|output_blocks)\.(\d{1,9})\.(\d{1,9})\.(.+)", path)
    if match:
        side, number, slot, rest = match[1], int(match[2]), int(match[3]), match[4]
        level, index = (layout.inputs if side == "input_blocks" else layout.outputs)[number]
        parent = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
        if rest == "op":
            return f"{parent}.downsamplers.0.conv"
        if rest == "conv":
            return f"{parent}.upsamplers.0.conv"
        return f"{parent}.resnets.{index}.{_RESNET.get(rest, rest)}" if slot == 0 else f"{parent}.attentions.{index}.{rest}"
    match = re.match(r"middle_block\.(\d{1,9})\.(.+)", path)
    if match:
        slot, rest = int(match[1]), match[2]
        return f"mid_block.attentions.0.{rest}" if slot == 1 else f"mid_block.resnets.{slot // 2}.{_RESNET.get(rest, rest)}"
    return path  # diffusers has no name for it (an unCLIP label_emb): every loader also knows the original one


def _blocks(keys: list[str], side: str) -> list[int]:
    pattern = re.compile(rf"{re.escape(PREFIX)}{side}\.(\d{{1,9}})\.")
    return sorted({int(m[1]) for k in keys if (m := pattern.match(k))})


def _levels(numbers: list[int], ends: set[int]) -> dict[int, tuple[int, int]]:
    places, level, index = {}, 0, 0
    for number in numbers:
        places[number] = (level, index)
        level, index = (level + 1, 0) if number in ends else (level, index + 1)
    return places
