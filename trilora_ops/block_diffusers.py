"""The dictionary that diffusers' `set_adapters` takes, read as block weights.

{"text_encoder": 0.5, "unet": {"down": 0.9, "mid": 1, "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1.0]}}}; what it does
not name keeps 1. A number for a block is for each of its attentions; a down- or up-sampler counts as attention 0, as
diffusers looks it up (an upsampler stands in the block of attention 2 here, and is named by its layer). What has no
attention cannot be named there and keeps 1, the middle block's residual layers among them.
"""

from __future__ import annotations

from collections.abc import Mapping

from .block_selectors import quoted
from .block_syntax import BlockWeights
from .block_vectors import Tokens, compact
from .blocks import Blocks
from .bounds import LARGEST, read_json
from .errors import TriLoRAError

# text_encoder, text_encoder_2, text_encoder_3
_ENCODERS = {"unet": ("TE1", "TE2"), "sd3": ("TE1", "TE2", "T5"), "flux": ("TE1", "T5"), "hunyuan_video": ("LLM", "TE1"), "hidream": ("TE1", "TE2", "T5", "LLM")}
# number of input blocks -> the down and up blocks that have attentions, of two and three
_ATTENTIONS = {12: {"down": (0, 1, 2), "up": (1, 2, 3)}, 9: {"down": (1, 2), "up": (0, 1)}}


def read(text: str, blocks: Blocks, tokens: Tokens) -> BlockWeights | None:
    if not text.startswith("{"):
        return None
    try:
        scales = read_json(text)
    except ValueError as error:
        raise TriLoRAError(f"block weights: {quoted(text)} is no JSON dictionary ({error}); write names and keys in double quotes") from None
    places: list[tuple[str, float]] = []
    encoders = _encoders(blocks)
    for name, scale in scales.items():
        if name in encoders:
            places.append((encoders[name], _number(scale, name)))
        elif name not in ("unet", "transformer"):
            raise TriLoRAError(f"block weights: {quoted(name)} is no part of this pipeline; it has {', '.join(['unet' if blocks.family == 'unet' else 'transformer', *encoders])}")
        elif isinstance(scale, Mapping):
            places += _unet(scale, blocks)
        else:
            places += [(group, _number(scale, name)) for group in blocks.groups if group not in blocks.encoders]
    return compact(1.0, places, blocks)


def _encoders(blocks: Blocks) -> dict[str, str]:
    there = blocks.encoders
    order = [group for group in _ENCODERS.get(blocks.family, ()) if group in there or not there] if len(there) != 1 else there
    return {f"text_encoder_{n}" if n > 1 else "text_encoder": group for n, group in enumerate(order or ["TE"], 1)}


def _unet(scales: Mapping, blocks: Blocks) -> list[tuple[str, float]]:
    attentions = _ATTENTIONS.get(len(blocks.groups.get("IN", ())))
    if blocks.family != "unet" or attentions is None:
        raise TriLoRAError('block weights: a dictionary of down, mid and up is for SD1.x, SD2 and SDXL; give "unet" or "transformer" one number')
    places: list[tuple[str, float]] = []
    for part, scale in scales.items():
        if part == "mid":
            places.append(("MID1", _number(scale[0] if isinstance(scale, list) and len(scale) == 1 else scale, "mid")))
        elif part not in attentions:
            raise TriLoRAError(f"block weights: {quoted(part)} in \"unet\": it has down, mid and up")
        elif isinstance(scale, Mapping):
            for block, inner in scale.items():
                places += _block(part, block, inner, attentions[part], blocks)
        else:
            for index in attentions[part]:
                places += _block(part, f"block_{index}", scale, attentions[part], blocks)
    return places


def _block(part: str, name: str, scale, there: tuple[int, ...], blocks: Blocks) -> list[tuple[str, float]]:
    if name not in [f"block_{index}" for index in there]:
        raise TriLoRAError(f"block weights: {quoted(name)} in {quoted(part)} has no attentions; there are {', '.join(f'block_{index}' for index in there)}")
    count, index = {"down": 2, "up": 3}[part], int(name.removeprefix("block_"))
    listed = scale if isinstance(scale, list) else [scale] * count
    listed = listed * count if len(listed) == 1 else listed
    if len(listed) != count:
        raise TriLoRAError(f"block weights: {part} {name} has {count} attentions, not {len(listed)}")
    numbers = [_number(value, f"{part} {name}") for value in listed]
    if part == "up":
        last = 3 * index + 2
        sampler = rf"/^diffusion_model\.output_blocks\.{last}\.2\.conv$/"
        has_one = last + 1 < len(blocks.groups["OUT"]) and (not blocks.names or f"diffusion_model.output_blocks.{last}.2.conv" in blocks.names)
        return [*((f"OUT{3 * index + n:02d}", value) for n, value in enumerate(numbers)), *([(sampler, numbers[0])] if has_one and numbers[0] != numbers[2] else [])]
    first = 3 * index + 1
    sampler = f"IN{first + 2:02d}"
    return [*((f"IN{first + n:02d}", value) for n, value in enumerate(numbers)), *([(sampler, numbers[0])] if sampler in blocks.groups["IN"] else [])]


def _number(value, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        got = quoted(value) if isinstance(value, str) else {dict: "a dictionary", list: "a list"}.get(type(value)) or str(value)
        raise TriLoRAError(f"block weights: {quoted(name)} has {got} in the dictionary, where a number from -{LARGEST:,.0f} to {LARGEST:,.0f} belongs")
    return float(value)
