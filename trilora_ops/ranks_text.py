"""The ranks of single layers as a text of the block syntax."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .blocks import Blocks, Place


def ranks_as_text(ranks: Mapping[str, int], blocks: Blocks) -> str:
    """The shortest text we find that gives every layer its rank; other layers may get any.

    ranks: target key -> rank, 0 for layers that have none. By blocks, blocks of one rank as a range; within a block by
    kinds; what is left by name.
    """
    layers: dict[str, dict[Place, int]] = {}
    for key, rank in ranks.items():
        place = blocks.place(key)
        layers.setdefault(place.block, {})[place] = rank
    if len(set(ranks.values())) == 1:
        return f"default={next(iter(ranks.values()))}"
    runs: list[tuple[str, str, list[tuple[str, int]]]] = []  # first block, last block, what both and all between say
    single = []
    for group in blocks.groups.values():
        before = len(runs)
        for block in filter(layers.get, group):  # blocks without such layers may lie within a range
            said, by_name = _of_block(layers[block])
            single += by_name
            if len(runs) > before and runs[-1][2] == said:
                runs[-1] = (runs[-1][0], block, said)
            else:
                runs.append((block, block, said))
    items = [f"{first if first == last else f'{first}-{last}'}{kinds}={rank}" for first, last, said in runs for kinds, rank in said]
    return ", ".join(["default=0", *items, *single])


def _of_block(layers: Mapping[Place, int]) -> tuple[list[tuple[str, int]], list[str]]:
    """([(".kind" words, rank)], items for single layers), in the order in which they must stand."""
    return min((_said(layers, usual) for usual in sorted(set(layers.values()))), key=lambda found: (len(found[1]), len(found[0])))


def _said(layers: Mapping[Place, int], usual: int) -> tuple[list[tuple[str, int]], list[str]]:
    """The same, from a rank for the whole block on."""
    found, said = dict.fromkeys(layers, usual), [("", usual)] if usual else []
    shared = (frozenset.intersection(*(place.kinds for place in layers if layers[place] == rank)) for rank in set(layers.values()))
    for kinds in sorted({*shared, *(place.kinds for place in layers)} - {frozenset()}, key=lambda words: (len(words), sorted(words))):
        matched = {place: rank for place, rank in layers.items() if kinds <= place.kinds}
        exact = {rank for place, rank in matched.items() if place.kinds == kinds}
        values = set(matched.values())
        ranks = values if len(values) == 1 else exact  # a wide rule stands before a narrow one, which may correct it
        if len(ranks) == 1 and any(found[place] != layers[place] for place in matched if layers[place] in ranks):
            [rank] = ranks
            said.append(("".join(f".{word}" for word in sorted(kinds)), rank))
            found |= dict.fromkeys(matched, rank)
    return said, [f"/^{re.escape(place.name)}$/={rank}" for place, rank in layers.items() if found[place] != rank]
