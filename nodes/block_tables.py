"""What the panel of Block Weights must know, so that the browser keeps no table of its own."""

from __future__ import annotations

import functools

from ..trilora_ops.block_presets import BUILT_IN
from ..trilora_ops.block_vectors import List, lists_of, spread
from ..trilora_ops.blocks import LAYOUTS, Blocks, Place
from .block_presets import preset_files
from .blocks import DIALECTS


def tables() -> dict:
    """layouts: see web/js/block_text.js; presets: [{name, text}], the user's with file and line; presets_error: why
    some of the user's cannot be."""
    files = preset_files()
    built_in = [{"name": name, "text": text} for name, text in BUILT_IN.items() if name not in files.unclear]
    return {"layouts": _layouts(), "presets": built_in + [vars(preset) for preset in files.presets], "presets_error": "; ".join(files.faults)}


@functools.cache
def _layouts() -> dict[str, dict]:
    return {name: {"name": name, **_layout(Blocks.layout(name))} for name in LAYOUTS}


def _layout(blocks: Blocks) -> dict:
    vectors = [_vector(kind, blocks) for kind in lists_of(blocks) if kind.dialect in DIALECTS and not any(slot.startswith("/") for slot in kind.slots)]
    return {"ids": blocks.ids, "groups": blocks.groups, "text": [group for group in blocks.groups if group in blocks.encoders],
            "kinds": sorted(blocks.kinds), "vectors": vectors}


def _vector(kind: List, blocks: Blocks) -> dict:
    """Which blocks each slot of a list means, found by giving each slot a number of its own."""
    first = kind.rest + 1
    weights = spread(kind, [first + slot for slot in range(len(kind.slots))], blocks)
    slots: list[list[str]] = [[] for _ in kind.slots]
    for group, members in blocks.groups.items():
        for block in members:
            if (value := weights.at(Place(block, group, frozenset(), ""))) != kind.rest:
                slots[int(value - first)].append(block)
    return {"dialect": kind.dialect, "rest": kind.rest, "slots": slots}
