"""The numbers of a block plan's texts: block weights, in which 1 means 1 and not "as it is"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from .block_changes import split_changes, with_changes
from .block_selectors import quoted
from .block_syntax import CHARACTERS, BlockWeights, parse
from .block_tags import inner
from .block_vectors import Tokens, compact, fields, lists_of, looks_like_a_list, outside, values, without_label
from .blocks import Blocks
from .bounds import check_length
from .errors import TriLoRAError

_DEFAULT = r"(?i)(?:^|[,\n])\s*default\s*="
_AROUND = " \t\n\"',;"
_INDICES = ("train_double_block_indices", "train_single_block_indices", "train_block_indices", "train_blocks")
# sd-scripts' arguments by the text of a plan that they belong to; a whole line of them can stand in each
_ARGUMENTS = {
    "rank": ("block_dims", "conv_block_dims", "network_reg_dims", *_INDICES),
    "alpha": ("block_alphas", "conv_block_alphas"),
    "learning_rate": ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold", *_INDICES),
}
_RATES = ("network_reg_lrs", "block_lr")  # learning rates, where a plan has factors of one


def read_numbers(name: str, text: str, blocks: Blocks, presets: Mapping[str, str], neutral: float) -> BlockWeights:
    """The numbers that the text `name` of a plan gives the places of a model; neutral: where it says nothing.

    Any notation of block weights, and sd-scripts' block_dims. A list's BASE speaks of the text encoders, which are not
    trained: it gives nothing to the layers outside the blocks. Raises TriLoRAError with the text's name.
    """
    if not text.strip():
        return BlockWeights(float(neutral))
    check_length(text, f"block plan: {name}: the text")
    content = presets.get(text.strip(), text).strip().translate(CHARACTERS)
    begin, changes = split_changes(content, presets)
    try:
        if changes:
            return with_changes(read_numbers(name, begin, blocks, presets, neutral), changes, blocks)
        weights = _arguments(name, content, blocks) or _list(content, blocks) or parse(text, blocks, presets=presets)
    except TriLoRAError as error:
        raise TriLoRAError(f"block plan: {name}: {str(error).removeprefix('block weights: ').removeprefix(f'block plan: {name}: ')}") from None
    if _is_list(content, presets):
        weights = replace(weights, rules=tuple(rule for rule in weights.rules if rule[0].text not in outside(blocks)))
    # block weights are 1 where their text says nothing
    return replace(weights, default=float(neutral)) if weights.default == 1 and not re.search(_DEFAULT, content) else weights


def _is_list(text: str, presets: Mapping[str, str]) -> bool:
    """Whether a text is a list of numbers behind its label, its tag or the preset that a tag names."""
    text = inner(text)
    for mark, end in (("lbw=", ":"), ("LBW=", ";")):
        if text.startswith(mark):
            text = text[len(mark):].partition(end)[0].strip()
            text = presets.get(text, text)
    text = without_label(text)[1]
    return text.startswith("[") or looks_like_a_list(text)


def _arguments(name: str, text: str, blocks: Blocks) -> BlockWeights | None:
    """sd-scripts' arguments for the text `name`, those for the others skipped; None for a text that has none.

    What lies outside the blocks of block_dims and block_alphas has 0, as nothing is trained there.
    """
    belongs = {argument: field for field, arguments in _ARGUMENTS.items() for argument in arguments if field == name or argument not in _INDICES}
    first, *parts = re.split(rf"(?<!\w)({'|'.join((*belongs, *_RATES, *_INDICES))})\s*=", text)
    given = dict(zip(parts[::2], (part.strip(_AROUND) for part in parts[1::2]), strict=True))
    if not given:
        return None
    if first.strip(_AROUND):
        raise TriLoRAError(f"{quoted(first.strip())} stands before {parts[0]}; write either arguments of sd-scripts or selector=number")
    own = {argument: value for argument, value in given.items() if belongs.get(argument) == name}
    rates = [argument for argument in given if argument in _RATES]
    if rates and (name == "learning_rate" or not own):
        raise TriLoRAError(f"{rates[0]} has learning rates, and a plan has factors of Training Settings' rate; write selector=factor, such as {blocks.ids[-1]}=0.5")
    if not own:
        other = next(iter(given))
        raise TriLoRAError(f"{other} belongs in the text {belongs.get(other, 'rank or learning_rate')}")
    lists = {argument: (_list(value, blocks) or parse(value, blocks, "kohya")).rules for argument, value in own.items() if argument.endswith(("block_dims", "block_alphas"))}
    others = " ".join(f"{argument}={value}" for argument, value in own.items() if argument not in lists)
    rest = parse(others, blocks, "kohya") if others else None
    if not lists:
        return rest
    plain = [rule for argument, found in lists.items() if not argument.startswith("conv_") for rule in found]
    conv = [(replace(selector, text=f"{selector.text}.conv", kinds=selector.kinds | {"conv"}), value)
            for argument, found in lists.items() if argument.startswith("conv_") for selector, value in found]
    return BlockWeights(0.0, (*plain, *conv, *(rest.rules if rest else ())))


def _list(text: str, blocks: Blocks) -> BlockWeights | None:
    """A list of 25 or 23 numbers; None for any other text. `parse` leaves out its ones, which in block weights say nothing."""
    words = fields(text) if looks_like_a_list(text) else []
    for kind in lists_of(blocks):
        if kind.dialect == "kohya" and len(kind.slots) == len(words):
            numbers = values(words, kind, blocks, Tokens())
            marked = compact(float("inf"), zip(kind.slots, numbers, strict=True), blocks)  # no number of a list is infinite
            return replace(marked, default=0.0)
    return None
