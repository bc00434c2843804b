"""What block weights say, in a line for a person."""

from __future__ import annotations

from collections import Counter

from ..trilora_ops.block_syntax import BlockWeights, written
from ..trilora_ops.blocks import Blocks, Place

_SHOWN = 6  # ranges named


def summary(weights: BlockWeights, blocks: Blocks, name: str) -> str:
    """Such as "SD1.5: 24 of 28 blocks at 1, OUT03-OUT05 at 0.5; and 2 rules for parts of blocks". name: whose blocks they are."""
    values = {block: weights.at(Place(block, group, frozenset(), "")) for group, members in blocks.groups.items() for block in members}
    (common, count), *_ = Counter(values[block] for block in _denoiser(blocks)).most_common(1)
    spans = [f"{span} at {written(value)}" for group, members in blocks.groups.items() for span, value in _spans(group, members, values) if value != common]
    more = [f"{len(spans) - _SHOWN} more ranges"] if len(spans) > _SHOWN else []
    parts = sum(not selector.is_whole for selector, _ in weights.rules)
    return (", ".join([f"{name}: {count} of {len(_denoiser(blocks))} blocks at {written(common)}", *spans[:_SHOWN], *more])
            + (f"; and {parts} rule{'s' * (parts > 1)} for parts of blocks" if parts else ""))


def other_model(blocks: Blocks, known: Blocks, family: str) -> str:
    """A hint where a model's blocks are not those of the family that was chosen; "" where they are."""
    if set(_denoiser(blocks)) == set(_denoiser(known)):
        return ""
    from ..trilora_ops.blocks import LAYOUTS

    there = [name for name in LAYOUTS if set(_denoiser(Blocks.layout(name))) == set(_denoiser(blocks))]
    is_like = f"has the blocks of {' and '.join(there)}" if there else f"has {', '.join(_span(members) for members in blocks.groups.values())}"
    return f"MODEL {is_like}; model_family says {family}, and MODEL counts" + (f": choose {there[0]} to see its blocks on the panel" if there else "")


def _denoiser(blocks: Blocks) -> list[str]:
    return [block for group, members in blocks.groups.items() if group not in blocks.encoders for block in members]


def _spans(group: str, members: tuple[str, ...], values: dict[str, float]) -> list[tuple[str, float]]:
    """(range, value) for each run of equal values in a group."""
    if len({values[block] for block in members}) == 1:
        return [(group, values[members[0]])]
    runs: list[list[str]] = []
    for block in members:
        if runs and values[runs[-1][-1]] == values[block]:
            runs[-1].append(block)
        else:
            runs.append([block])
    return [(_span(run), values[run[0]]) for run in runs]


def _span(members) -> str:
    return members[0] if len(members) == 1 else f"{members[0]}-{members[-1]}"
