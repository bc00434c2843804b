"""The numbers of a block plan's texts: block weights, in which 1 means 1 and not "as it is"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from .block_syntax import BlockWeights, parse
from .block_vectors import Tokens, compact, fields, lists_of, looks_like_a_list, outside, values
from .blocks import Blocks
from .errors import TriLoRAError

_DEFAULT = r"(?i)(?:^|[,\n])\s*default\s*="
_LISTS = r"\b((?:conv_)?block_(?:dims|alphas))\s*="
_AROUND = " \t\n\"',;"


def read_numbers(name: str, text: str, blocks: Blocks, presets: Mapping[str, str], neutral: float) -> BlockWeights:
    """The numbers that the text `name` of a plan gives the places of a model; neutral: where it says nothing.

    Any notation of block weights, and sd-scripts' block_dims. A list's BASE speaks of the text encoders, which are not
    trained: it gives nothing to the layers outside the blocks. Raises TriLoRAError with the text's name.
    """
    if not text.strip():
        return BlockWeights(float(neutral))
    try:
        weights = _kohya(text, blocks) or parse(text, blocks, presets=presets)
    except TriLoRAError as error:
        raise TriLoRAError(f"block plan: {name}: {str(error).removeprefix('block weights: ')}") from None
    if looks_like_a_list(re.sub(r"(?i)^\s*lbw=|;\s*$", "", presets.get(text.strip(), text))):
        weights = replace(weights, rules=tuple(rule for rule in weights.rules if rule[0].text not in outside(blocks)))
    # block weights are 1 where their text says nothing
    return replace(weights, default=float(neutral)) if weights.default == 1 and not re.search(_DEFAULT, text) else weights


def _kohya(text: str, blocks: Blocks) -> BlockWeights | None:
    """sd-scripts' block_dims or block_alphas, by that name or as the bare list, and those of the convolutions.

    What lies outside the listed blocks has 0, as nothing is trained there.
    """
    first, *parts = re.split(_LISTS, text)
    if not parts:
        return _list(text, blocks)
    if first.strip(_AROUND):
        raise TriLoRAError(f"{first.strip()!r} stands before {parts[0]}; write either those lists or selector=number")
    rules = {name: (_list(found.strip(_AROUND), blocks) or parse(found.strip(_AROUND), blocks, "kohya")).rules
             for name, found in zip(parts[::2], parts[1::2], strict=True)}
    plain = [rule for name, found in rules.items() if not name.startswith("conv_") for rule in found]
    conv = [(replace(selector, text=f"{selector.text}.conv", kinds=selector.kinds | {"conv"}), value)
            for name, found in rules.items() if name.startswith("conv_") for selector, value in found]
    return BlockWeights(0.0, (*plain, *conv))


def _list(text: str, blocks: Blocks) -> BlockWeights | None:
    """A list of 25 or 23 numbers; None for any other text. `parse` leaves out its ones, which in block weights say nothing."""
    words = fields(text) if looks_like_a_list(text) else []
    for kind in lists_of(blocks):
        if kind.dialect == "kohya" and len(kind.slots) == len(words):
            numbers = values(words, kind, Tokens())
            marked = compact(float("inf"), zip(kind.slots, numbers, strict=True), blocks)  # no number of a list is infinite
            return replace(marked, default=0.0)
    return None
