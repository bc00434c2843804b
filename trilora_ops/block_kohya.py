"""Kohya sd-scripts' network arguments, read as block weights: learning-rate weights, block indices, regular expressions.

Blocks that the arguments do not speak of keep 1, as there. Lists of another length are refused (sd-scripts cuts or fills
them), and negative numbers stay what they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from .block_selectors import quoted
from .block_syntax import BlockWeights, number, weights
from .block_vectors import MAIN, Tokens, fields, runs
from .blocks import Blocks
from .errors import TriLoRAError

ARGUMENTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold", "train_double_block_indices", "train_single_block_indices",
             "train_block_indices", "train_blocks", "network_reg_dims", "network_reg_lrs")
_TRAINED = {"flux": {"all": ("D", "S"), "double": ("D",), "single": ("S",)},
            "lumina2": {"all": ("L", "NR", "CR"), "transformer": ("L",), "refiners": ("NR", "CR"), "noise_refiner": ("NR",), "context_refiner": ("CR",)}}


def arguments(text: str) -> dict[str, str]:
    """Name -> value of `name=value` arguments with spaces, line ends or quotes between them; {} where there are none."""
    _, *parts = re.split(rf"(?<!\w)({'|'.join(ARGUMENTS)})\s*=", text)
    return {name: value.strip(" \t\n\"',;") for name, value in zip(parts[::2], parts[1::2], strict=True)}


def read(text: str, blocks: Blocks, tokens: Tokens) -> BlockWeights | None:
    given = arguments(text)
    if not given:
        return None
    if any(name.endswith("lr_weight") for name in given) and blocks.family != "unet":
        raise TriLoRAError(f"block weights: down_, mid_ and up_lr_weight are for U-Nets; this model has {', '.join(blocks.groups)}")
    rules: list[tuple[str, float]] = []
    for name in ("network_reg_dims", "network_reg_lrs"):
        rules += _patterns(name, given[name], blocks) if name in given else []
    for name, group in (("down_lr_weight", "IN"), ("mid_lr_weight", "MID"), ("up_lr_weight", "OUT")):
        if name in given:
            rules += _learning_rates(name, given, blocks.groups.get(group, ()), group)
    trained = _TRAINED.get(blocks.family, {})
    if "train_blocks" in given:
        if given["train_blocks"] not in trained:
            raise TriLoRAError(f"block weights: train_blocks={quoted(given['train_blocks'])}: this model knows {', '.join(trained) or 'no train_blocks'}")
        rules += [(group, 0.0) for group in trained["all"] if group not in trained[given["train_blocks"]] and group in blocks.groups]
    for name, group in (("train_double_block_indices", "D"), ("train_single_block_indices", "S"), ("train_block_indices", MAIN.get(blocks.family, ("",))[0])):
        if name in given:
            if group not in blocks.groups or (name == "train_block_indices" and len(MAIN[blocks.family]) > 1):
                raise TriLoRAError(f"block weights: {name} names no blocks of this model; it has {', '.join(blocks.groups)}")
            chosen = _indices(name, given[name], len(blocks.groups[group]))
            rules += [(selector, value) for selector, value in runs(group, blocks.groups[group], chosen) if value == 0.0]
    return weights(1.0, rules, blocks)


def _learning_rates(name: str, given: dict[str, str], members: Sequence[str], group: str) -> list[tuple[str, float]]:
    word, _, base = given[name].partition("+")
    n, last = len(members), max(len(members) - 1, 1)
    if not members:
        raise TriLoRAError(f"block weights: {name} names no blocks of this model")
    rising = {"sine": [math.sin(math.pi / 2 * i / last) for i in range(n)], "linear": [i / last for i in range(n)], "zeros": [0.0] * n}
    curves = rising | {"cosine": rising["sine"][::-1], "reverse_linear": rising["linear"][::-1]}
    if word.strip() in curves and group != "MID":
        numbers = [value + (number(base.strip(), given[name]) if base else 0.0) for value in curves[word.strip()]]
    else:
        numbers = [number(value, f"{name}={given[name]}") for value in fields(given[name])]
    if group == "MID" and len(numbers) == 1:  # SD1.x: one number for the middle
        numbers *= n
    if len(numbers) != n:
        raise TriLoRAError(f"block weights: {name} has {len(numbers)} numbers and this model has {n} blocks {members[0]}-{members[-1]}; give {n} numbers"
                           + ("" if group == "MID" else f", or {', '.join(curves)} with +base"))
    if "block_lr_zero_threshold" in given:
        threshold = number(given["block_lr_zero_threshold"], f"block_lr_zero_threshold={given['block_lr_zero_threshold']}")
        numbers = [value if value > threshold else 0.0 for value in numbers]
    return [(selector, value) for selector, value in runs(group, members, numbers) if value != 1.0]


def _indices(name: str, text: str, count: int) -> list[float]:
    """1 for the blocks of `0,1,8-12`, `all` or `none`, 0 for the others."""
    if text in ("all", "none", ""):
        return [float(text == "all")] * count
    chosen = [0.0] * count
    for part in fields(text):
        found = re.fullmatch(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not first <= last < count:
            raise TriLoRAError(f"block weights: {quoted(part)} in {name} is no block or range of blocks; this model has 0 to {count - 1}")
        chosen[first : last + 1] = [1.0] * (last + 1 - first)
    return chosen


def _patterns(name: str, text: str, blocks: Blocks) -> list[tuple[str, float]]:
    """`pattern=number` pairs; in sd-scripts the first pattern that matches wins, so the last of our rules is its first."""
    if blocks.family == "unet":
        raise TriLoRAError(f"block weights: {name} is not for U-Nets, whose layers have other names there; write for example OUT.cross=0.5")
    rules = []
    for pair in filter(None, map(str.strip, text.split(","))):
        pattern, equals, value = pair.partition("=")
        if not equals or not pattern:
            raise TriLoRAError(f"block weights: {quoted(pair)} in {name} is not pattern=number; a pattern there can hold neither a comma nor '='")
        rules.append((f"/{_target_pattern(pattern.strip(), blocks)}/", number(value.strip(), pair)))
    return rules[::-1]


def _target_pattern(pattern: str, blocks: Blocks) -> str:
    """The same pattern for target keys. For Anima it must match the whole path; elsewhere it is searched in a name in
    which every dot has become "_", behind lora_unet_ or lora_te1_."""
    if blocks.family == "cosmos2":
        found = rf"^diffusion_model\.(?:{pattern})$"
    else:
        found, inside = "", False  # inside a character class
        for part in re.findall(r"\\.|[^\\]", pattern):
            inside = part != "]" if inside else part == "["
            found += ("._" if inside else "[._]") if part in ("_", r"\_") else part
        for prefix, path in (("unet", r"diffusion_model\."), ("te1", r"clip_l\.transformer\."), ("te2", r"clip_g\.transformer\.")):
            found = found.replace(f"lora[._]{prefix}[._]", path)
    return re.sub(r"(?<!\\)/", r"\/", found)


