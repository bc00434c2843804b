"""What names, sizes and metadata of a file tell of the model it is for and of the program that wrote it.

They describe and never decide.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from .block_families import Family
from .block_layouts import LAYOUTS, Layout
from .block_names import blocks_in_file, families_in_file
from .bounds import read_json
from .key_names import LONGEST, form, is_text

# columns of what a U-Net's cross-attention reads from the text encoder
_CONTEXTS = {768: "SD1.5", 1024: "SD2", 2048: "SDXL", 1280: "SDXL refiner"}
_TITLES = {
    "unet": "a U-Net (SD1.5, SD2, SDXL)", "sd3": "SD3", "flux": "Flux", "hunyuan_video": "HunyuanVideo", "wan": "Wan",
    "qwen_image": "Qwen-Image", "lumina2": "Lumina 2 or Z-Image", "ltx": "LTX-Video", "auraflow": "AuraFlow",
    "hidream": "HiDream", "cosmos": "Cosmos", "cosmos2": "Cosmos-Predict2 or Anima", "krea2": "Krea 2",
    "omnigen2": "OmniGen2", "kandinsky5": "Kandinsky 5", "pixart": "PixArt", "hunyuan_dit": "HunyuanDiT",
    "mochi": "Mochi", "cogvideox": "CogVideoX", "ernie_image": "Ernie-Image", "ideogram4": "Ideogram 4",
}  # fmt: skip
_SPELLED = (  # beginning of names -> whose they are
    ("lora_unet_", "kohya's"), ("lora_te", "kohya's"), ("lora_prior_", "kohya's"),
    ("lora_transformer_", "OneTrainer's"), ("lycoris_", "LyCORIS'"), ("base_model.model.", "PEFT's"),
    ("transformer.", "diffusers'"), ("unet.", "diffusers'"), ("text_encoder.", "diffusers'"),
    ("text_encoder_", "diffusers'"), ("diffusion_model.", "ComfyUI's own"), ("text_encoders.", "ComfyUI's own"),
    ("pipe.dit.", "DiffSynth's"),
)  # fmt: skip
_OPEN = 3  # models that may be named beside each other; more tell nothing
_LETTERS = 60  # of a program's name


def family_told(layers: Mapping[str, tuple[int, int] | None]) -> str:
    """The model that a file's layers are for, "" where their names leave it open.

    layers: name -> (rows, columns) of its weight, None where unknown.
    """
    own = {name[:LONGEST]: size for name, size in layers.items() if not is_text(name)}
    if not own:
        return "a text encoder alone" if layers else ""
    places = blocks_in_file(own).values()
    families = families_in_file(own)
    blocks = {place.block for place in places}
    if exact := _exactly(families, blocks):
        return " or ".join(exact)
    if len(families) > 1:
        families = _most_alike(families, [place.rest for place in places])
    names = {family.name for family in families}
    if names == {"unet"}:
        widths = {size[1] for name, size in own.items() if size and form(name).endswith(("attn2_k", "attn2_v"))}
        told = [_CONTEXTS[width] for width in widths if width in _CONTEXTS]
        return told[0] if len(told) == 1 else _TITLES["unet"]
    known = {name: layout for name, layout in LAYOUTS.items() if layout.family in names}
    titles = _with_room(known, blocks)
    if not 0 < len(titles) <= _OPEN:
        titles = [_TITLES[family.name] for family in families]
    return " or ".join(dict.fromkeys(titles)) if len(titles) <= _OPEN else ""


def spellings_told(layers: Collection[str], metadata: Mapping[str, str]) -> str:
    """Whose names the layers have, the most frequent first, and which program says that it wrote the file."""
    found = Counter(_spelled(name) for name in layers)
    names = ", ".join(whose for whose, _ in found.most_common()) or "none"
    program = program_told(metadata)
    return names + (f"; written by {program}" if program else "")


def program_told(metadata: Mapping[str, str]) -> str:
    """The program that a file's metadata name, "" where they name none."""
    if metadata.get("trilora.format"):
        return "TriLoRA"
    if any(key.startswith("ot_") for key in metadata):
        return "OneTrainer"
    if module := metadata.get("ss_network_module"):
        return f"kohya's scripts ({module[:_LETTERS]})"
    if "lora_adapter_metadata" in metadata:
        return "diffusers"
    software = metadata.get("software", "")
    try:
        return str(read_json(software)["name"])[:_LETTERS]
    except (ValueError, TypeError, KeyError):  # no JSON object with a name
        return software[:_LETTERS]


def _spelled(name: str) -> str:
    return next((whose for start, whose in _SPELLED if name.startswith(start)), "the model's own without a beginning")


def _most_alike(families: list[Family], rests: list[str]) -> list[Family]:
    """Of families that have the same lists, those whose parts the layers have."""
    layers = [f"_{form(rest)}_" for rest in rests]
    counts = {}
    for family in families:
        parts = {f"_{form(part)}_" for part in family.kinds if "#" not in part and "$" not in part}
        counts[family] = sum(any(part in layer for part in parts) for layer in layers)
    most = max(counts.values())
    return [family for family in families if counts[family] == most]


def _exactly(families: list[Family], blocks: Collection[str]) -> list[str]:
    """The known models of these families whose lists are just as long as the file's, where there are several lists to tell by."""
    names, counts = {family.name for family in families}, _lengths(blocks)
    if len(counts) < 2 or _whole(blocks) != counts:
        return []
    alike = [name for name, layout in LAYOUTS.items() if layout.family in names - {"unet"}]
    return [name for name in alike if _lists(LAYOUTS[name], counts) == counts]


def _with_room(known: Mapping[str, Layout], blocks: Collection[str]) -> list[str]:
    """The known models that have room for all of these blocks; those alone whose longest list the file fills from end to end.

    A shorter list may be a part of one that is longer in another model.
    """
    counts, whole = _lengths(blocks), _whole(blocks)
    room = [
        name
        for name, layout in known.items()
        if all(layout.blocks.get(group, 0) >= count for group, count in counts.items())
    ]
    same = {}
    for name in room:
        lists = known[name].blocks
        longest = max(lists, key=lists.get)
        same[name] = (
            sum(lists.get(group) == count for group, count in whole.items())
            if whole.get(longest) == lists[longest]
            else 0
        )
    return [name for name, lists in same.items() if lists == max(same.values())]


def _lengths(blocks: Collection[str]) -> dict[str, int]:
    """Group of numbered blocks -> how long its list is at least."""
    return {group: max(numbers) + 1 for group, numbers in _numbers(blocks).items()}


def _whole(blocks: Collection[str]) -> dict[str, int]:
    """Group of numbered blocks -> how long its list is, of those without a gap."""
    return {group: len(numbers) for group, numbers in _numbers(blocks).items() if max(numbers) + 1 == len(numbers)}


def _numbers(blocks: Collection[str]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for block in blocks:
        if match := re.fullmatch(r"(\D+)(\d+)", block):
            found.setdefault(match[1], set()).add(int(match[2]))
    return found


def _lists(layout: Layout, counts: Mapping[str, int]) -> dict[str, int]:
    return {group: layout.blocks[group] for group in counts if group in layout.blocks}
