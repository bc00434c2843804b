"""A preset or a list with changes behind it: `SD-FACE, IN04=0.5`; a change is an item of the block syntax and counts over what stands before it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .block_syntax import BlockWeights, default_and_rules, items, split, weights
from .block_vectors import looks_like_a_list, without_label
from .blocks import Blocks
from .errors import TriLoRAError

_TAGS = ("lbw=", "LBW=")


def split_changes(text: str, presets: Mapping[str, str]) -> tuple[str, str]:
    """(preset or list, the changes behind it); ("", "") for a text that is not both."""
    if "=" not in text or text[0] in "{%@<":
        return "", ""
    parts = split(text) if re.search(r"[,\n]", text) else []
    first = len(parts)
    while first and _is_change(parts[first - 1][1]):
        first -= 1
    if first in (0, len(parts)):
        return "", ""
    begin = text[: parts[first][0]].rstrip().removesuffix(",").rstrip()
    return (begin, text[parts[first][0] :]) if _can_begin(begin, presets) else ("", "")


def with_changes(begin: BlockWeights, changes: str, blocks: Blocks) -> BlockWeights:
    """Raises TriLoRAError for changes that cannot be read, and for `default`: a list gives every block a number."""
    default, named = default_and_rules(items(changes), None)
    if default is not None:
        raise TriLoRAError(
            "block weights: default stands behind a preset or a list, where every block has its number already; leave it out"
        )
    changed = weights(begin.default, named, blocks).rules
    again = {selector for selector, _ in changed}
    return BlockWeights(begin.default, (*(rule for rule in begin.rules if rule[0] not in again), *changed))


def _is_change(item: str) -> bool:
    return (
        "=" in item and not item.startswith(_TAGS) and (item.startswith("/") or not re.search(r"[:;\[\]{}<>%]", item))
    )


def _can_begin(text: str, presets: Mapping[str, str]) -> bool:
    if text in presets:
        return True
    bare = next((text[len(tag) :].strip() for tag in _TAGS if text.startswith(tag)), text)
    return bare in presets or looks_like_a_list(without_label(bare)[1]) or (bare.startswith("[") and bare.endswith("]"))
