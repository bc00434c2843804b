"""A number for every place of a model, as one line of text: `default=1, IN04-IN08=0.5, OUT.cross=0, TE1=0.8`.

    text     = item {("," | newline) item}          item = selector "=" number
    selector = "default" | block | group | block "-" block | (one of these or nothing) {"." kind} | "/" regex "/"

The last rule that matches a place wins; `default` may stand anywhere and covers what no rule matches, text encoders
too. Strengths are written this way, and ranks, alphas or learning rates can be. What other programs write is read by
`block_dialects` and comes out in this form; only this form travels between nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from .block_presets import BUILT_IN
from .block_selectors import Selector, Selectors, quoted
from .blocks import Blocks, Place
from .bounds import ITEM, ITEMS, LARGEST, check_count, check_length
from .errors import TriLoRAError

NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
# commas, equals signs, colons, semicolons and per cent signs as East Asian keyboards write them, and the printed minus
CHARACTERS = {0xFF0C: ",", 0x3001: ",", 0xFF1D: "=", 0xFF1A: ":", 0xFF1B: ";", 0xFF05: "%", 0x2212: "-"}
_Value = TypeVar("_Value")
_BETWEEN = re.compile(r"[\s,]*")
_ITEM = re.compile(r"/(?:\\.|[^\\/\n])*/[^,\n]*|[^,\n]+")


@dataclass(frozen=True)
class BlockWeights:
    """default: where no rule matches; rules: (selector, number) in the order of the text."""

    default: float
    rules: tuple[tuple[Selector, float], ...] = ()

    def at(self, place: Place) -> float:
        """The number of the last rule that matches."""
        candidates = self._by_block.get(place.block)
        if candidates is None:
            candidates = self._by_block[place.block] = self._candidates(place)
        latest, found = self._by_name.get(place.name, (-1, self.default))
        for number, selector, value in candidates:
            if number < latest:
                break
            if selector.matches(place):
                return value
        return found

    def text(self) -> str:
        """The canonical text: `parse` of it is equal to self."""
        return ", ".join([f"default={written(self.default)}", *(f"{selector.text}={written(value)}" for selector, value in self.rules)])

    @cached_property
    def _by_name(self) -> dict[str, tuple[int, float]]:
        """The rules for single weights by name, of which there can be as many as weights: number of the rule, and its value."""
        return {selector.name: (number, value) for number, (selector, value) in enumerate(self.rules) if selector.name}

    @cached_property
    def _by_block(self) -> dict[str, list[tuple[int, Selector, float]]]:
        return {}

    def _candidates(self, place: Place) -> list[tuple[int, Selector, float]]:
        # the other rules that can match within the block, last first, as far as one that matches all of it
        found: dict[Selector, tuple[int, Selector, float]] = {}
        for number in range(len(self.rules) - 1, -1, -1):
            selector, value = self.rules[number]
            if selector.covers(place) and not selector.name:
                found.setdefault(selector, (number, selector, value))
                if selector.is_whole:
                    break
        return list(found.values())


def parse(text: str, blocks: Blocks, dialect: str = "auto", *, a: float = 1.0, b: float = 1.0, seed: int | None = None,
          presets: Mapping[str, str] = BUILT_IN) -> BlockWeights:
    """The numbers that `text` gives the places of a model; "" gives 1 everywhere.

    dialect: one of `block_dialects.DIALECTS`; "auto" takes every reading that the text has for these blocks and refuses
    where two of them differ. a, b: what the placeholders A and B (and webui's X, which is A) stand for; seed: of the
    random tokens R and U; presets: name -> text. Raises TriLoRAError for a text that has no reading, or two.
    """
    from .block_dialects import read  # the dialects build on this module

    return read(text, blocks, dialect, a=a, b=b, seed=seed, presets=presets)


def expand(text: str, blocks: Blocks, dialect: str = "auto", *, a: float = 1.0, b: float = 1.0, seed: int | None = None,
           presets: Mapping[str, str] = BUILT_IN) -> list[BlockWeights]:
    """`parse`, with one result for each line of a test where the text is one (`@NAME:17`, see `block_preset_files.lines_of_test`)."""
    text = text.strip()
    if not text.startswith("@"):
        return [parse(text, blocks, dialect, a=a, b=b, seed=seed, presets=presets)]
    from .block_preset_files import lines_of_test

    lines = lines_of_test(f"{text}:{presets[text]}" if text in presets else text, blocks)
    return [parse(line, blocks, "inspire", a=a, b=b, seed=seed, presets=presets) for _, line in lines]


def read_native(text: str, blocks: Blocks) -> BlockWeights:
    """The canonical form. Raises TriLoRAError for an item without a number and a selector that names no block."""
    default, named = default_and_rules(items(text), 1.0)
    return weights(default, named, blocks)


def weights(default: float, values: Iterable[tuple[str, float]], blocks: Blocks) -> BlockWeights:
    """The same from (selector, number) pairs, as the readers of other dialects make them."""
    selectors, named = Selectors(blocks), list(values)
    check_count(len(named), "block weights: items", ITEMS)
    return BlockWeights(default, tuple((selectors.read(name), value) for name, value in named))


def default_and_rules(named: Iterable[tuple[str, _Value]], default: _Value) -> tuple[_Value, list[tuple[str, _Value]]]:
    """What the word `default`, which may stand anywhere, was given last; and all else in its order."""
    rules = []
    for name, value in named:
        if name.lower() == "default":
            default = value
        else:
            rules.append((name, value))
    return default, rules


def items(text: str) -> list[tuple[str, float]]:
    """`name=number` items, separated by commas or newlines; a /pattern/ may hold both and "="."""
    found = []
    for _, item in split(text):
        cut = item.rpartition("=") if item.startswith("/") else item.partition("=")
        name, equals, value = (word.strip() for word in cut)
        if not name and not value:
            continue
        if not equals or not name:
            raise TriLoRAError(f"block weights: {quoted(item)} is not selector=number; write for example default=0.5")
        found.append((name, number(value, item)))
    return found


def split(text: str) -> list[tuple[int, str]]:
    """(where it begins, item) of each item of a text, separated by commas or newlines; a /pattern/ may hold a comma.

    Raises TriLoRAError for an item that is too long, and too many of them.
    """
    found, position = [], _BETWEEN.match(text).end()
    while position < len(text):
        item = _ITEM.match(text, position)
        found.append((position, item[0].strip()))
        check_length(found[-1][1], f"block weights: {quoted(item[0])}", ITEM)
        position = _BETWEEN.match(text, item.end()).end()
    check_count(len(found), "block weights: items", ITEMS)
    return found


def number(text: str, item: str) -> float:
    """A finite decimal number: 1, .5, 1., +1, -0.5, 1e-1."""
    where = quoted(text) if text == item else f"{quoted(text)} in {quoted(item)}"
    if not re.fullmatch(NUMBER, text):
        raise TriLoRAError(f"block weights: {where} is not a number; write one like 0.5, -1 or 1e-1")
    value = float(text)
    if abs(value) > LARGEST:
        raise TriLoRAError(f"block weights: {where} is too large; a number is between -{LARGEST:,.0f} and {LARGEST:,.0f}")
    return value


def written(value: float) -> str:
    """The shortest text that is read as this very number: 1, 0.5, -0.3."""
    short = f"{value + 0.0:g}"  # + 0.0: no "-0"
    return short if float(short) == value else repr(value)
