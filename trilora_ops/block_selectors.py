"""Which places of a model a word of the block syntax means: `IN04`, `OUT.cross`, `IN04-IN08.self`, `.mlp`, `/regex/`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

from .blocks import EMB, KINDS, TEXT_GROUPS, VISION, Blocks, Place
from .bounds import PATTERNS, check_count, quoted
from .errors import TriLoRAError
from .message_words import few
from .patterns import Pattern

__all__ = ["Selector", "Selectors", "quoted"]

# the layers that a text encoder can have which is not connected: its words are then read, and match nothing
_LAYERS = 64
# what other programs call blocks -> what they are here
_ELSEWHERE = {"M00": "MID", "BASE": "TE", "CLIP": "TE"}
_LONGEST = 80  # of a word for which near ones are looked up


@dataclass(frozen=True)
class Selector:
    """text: as it is written in canonical text; blocks: ids and groups, None = every block; kinds: words that must all
    hold; pattern: of `patterns`, searched in the name of the weight, "" = any."""

    text: str
    blocks: frozenset[str] | None = None
    kinds: frozenset[str] = frozenset()
    pattern: str = ""

    def covers(self, place: Place) -> bool:
        """Whether the place's block is among the blocks."""
        return self.blocks is None or place.block in self.blocks or place.group in self.blocks

    def matches(self, place: Place) -> bool:
        return self.covers(place) and self.kinds <= place.kinds and (not self.pattern or self.compiled.search(place.name))

    @cached_property
    def compiled(self) -> Pattern:
        return Pattern(self.pattern)

    @cached_property
    def name(self) -> str:
        """The only name that it matches, for a pattern that is one: /^diffusion_model\\.out\\.2$/; "" for any other."""
        literal = self.compiled.literal if self.pattern and self.blocks is None and not self.kinds else None
        return literal.text if literal and literal.at_begin and literal.at_end else ""

    @property
    def is_whole(self) -> bool:
        """True if it matches all that is in its blocks."""
        return not self.kinds and not self.pattern


class Selectors:
    """Reads selectors for the blocks of one model. Case and leading zeros of numbers do not matter.

    A text is for a model with any of its text encoders connected, or none: words of those that are not match nothing.
    """

    def __init__(self, blocks: Blocks):
        self.blocks = blocks
        texts = dict.fromkeys((*TEXT_GROUPS, *blocks.encoders))
        self._text_ids = [block for group in texts for block in blocks.groups.get(group, _layers_of_any(group))]
        if "LLM" in blocks.encoders and (vision := f"LLM.{VISION}") not in self._text_ids:
            self._text_ids.insert(self._text_ids.index(blocks.groups["LLM"][-1]) + 1, vision)
        of_encoders = set(self._text_ids)
        self.ids = (*self._text_ids, *(block for block in blocks.ids if block not in of_encoders))
        self._encoders = frozenset(texts)
        names = dict.fromkeys((*self.ids, *texts, *blocks.groups, "TE"))
        self._exact = {name.lower(): name for name in names}
        self._loose = {_plain(name): name for name in names}
        self._positions = {block: position for position, block in enumerate(self.ids)}
        self._deepest = 1 + max(name.count(".") for name in names)  # words of a name
        self._searched = 0  # patterns read that are more than a name
        self._there = {*blocks.ids, *blocks.groups, None, *(["TE"] if blocks.encoders else [])}

    def read(self, text: str) -> Selector:
        """Raises TriLoRAError for a word that names no block, group or kind of the model, and for a bad pattern."""
        if text.startswith("/"):
            return self._pattern(text)
        if "-" in text:
            return self._range(text)
        name, rest = self._longest(text)
        if not name and not text.startswith("."):
            raise TriLoRAError(self._unknown(text))
        kinds = self._kinds(rest, text, name)
        if not name:
            return Selector(_with_kinds("", kinds), None, kinds)
        return Selector(_with_kinds(name, kinds), self._encoders if name == "TE" else frozenset({name}), kinds)

    def _range(self, text: str) -> Selector:
        left, _, right = text.partition("-")
        first = self._find(left)
        last, rest = self._longest(right)
        if first and not last:  # only the number: IN04-08
            digits, dot, rest = right.partition(".")
            last = self._find(re.sub(r"\d+$", digits.strip(), first)) if digits.strip().isdecimal() else None
            rest = dot + rest
        for word, block in ((left, first), (right, last)):
            if block not in self._positions:
                raise TriLoRAError(f"block weights: the range {quoted(text)} goes from block to block, and {self._unknown(word).partition(': ')[2]}")
        start, end = sorted((self._positions[first], self._positions[last]))
        members = self.ids[start : end + 1]
        kinds = self._kinds(rest, text, first)
        span = members[0] if start == end else f"{members[0]}-{members[-1]}"
        return Selector(_with_kinds(span, kinds), frozenset(members), kinds)

    def _pattern(self, text: str) -> Selector:
        if len(text) < 3 or not text.endswith("/"):
            raise TriLoRAError(f"block weights: the pattern {quoted(text)} has no end; write /pattern/=number, and \\/ for a slash in it")
        selector, names = Selector(text, pattern=text[1:-1]), self.blocks.names
        try:
            pattern = selector.compiled
        except TriLoRAError as error:
            raise TriLoRAError(f"block weights: {error}") from None
        if pattern.literal is None:
            self._searched += 1
            check_count(self._searched, "block weights: patterns", PATTERNS)
        if names and not pattern.is_in_any(names):
            raise TriLoRAError(f"block weights: the pattern {quoted(text)} is found in no weight's name, such as {min(names)}; correct it, or connect CLIP if it is "
                               "for the text encoder")
        return selector

    def _longest(self, text: str) -> tuple[str | None, str]:
        """The longest beginning that is a block or group, and what follows it."""
        words = text.split(".")
        for count in range(min(len(words), self._deepest), 0, -1):
            name = self._find(".".join(words[:count]))
            if name:
                return name, "".join(f".{word}" for word in words[count:])
        return None, text

    def _find(self, word: str) -> str | None:
        word = word.strip()
        return self._exact.get(word.lower()) or self._loose.get(_plain(word))

    def _kinds(self, text: str, item: str, name: str | None) -> frozenset[str]:
        kinds = frozenset(word.strip().lower() for word in text.split(".")[1:])
        if any(kind.isdecimal() for kind in kinds):  # TE1.12 of an encoder with 12 layers, IN.4
            raise TriLoRAError(self._unknown(item))
        there = self.blocks.kinds if name in self._there else frozenset(KINDS)  # what is not connected may have any kind
        for kind in sorted(kinds - there):
            raise TriLoRAError(f"block weights: {quoted(kind)} in {quoted(item)} is no kind of layer of this model; it has {', '.join(sorted(there))}")
        return kinds

    def _unknown(self, text: str) -> str:
        from difflib import get_close_matches  # for an error only

        there = [f"{members[0]}-{members[-1]}" if len(members) > 1 else members[0] for members in self.blocks.groups.values()]
        word = text.strip().upper()
        near = get_close_matches(word.replace(".", ""), sorted(self._there - {None}), 3) if len(word) <= _LONGEST else []
        first, dot, kinds = word.partition(".")
        meant = self._find(_ELSEWHERE.get(first, ""))
        hint = f"; here it is called {quoted(meant + dot + kinds.lower())}" if meant else f" (near it: {', '.join(near)})" if near else ""
        return f"block weights: {quoted(text.strip())} names no block of this model{hint}; it has {few(there, 20)}"


def _with_kinds(name: str, kinds: Iterable[str]) -> str:
    return name + "".join(f".{kind}" for kind in sorted(kinds))


@lru_cache(maxsize=4096)
def _plain(word: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", word.lower())


@cache
def _layers_of_any(group: str) -> list[str]:
    return [f"{group}.{part}" for part in (*(f"{n:02d}" for n in range(_LAYERS)), EMB, *([VISION] if group == "LLM" else []))]
