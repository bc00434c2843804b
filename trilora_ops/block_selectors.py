"""Which places of a model a word of the block syntax means: `IN04`, `OUT.cross`, `IN04-IN08.self`, `.mlp`, `/regex/`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .blocks import KINDS, Blocks, Place
from .errors import TriLoRAError

TEXT_ENCODERS = ("TE1", "TE2", "T5", "LLM")
# the layers that a text encoder can have where none is connected: its words are then read, and match nothing
_LAYERS = 64


@dataclass(frozen=True)
class Selector:
    """text: as it is written in canonical text; blocks: ids and groups, None = every block; kinds: words that must all
    hold; pattern: a regular expression searched in the name of the weight, "" = any."""

    text: str
    blocks: frozenset[str] | None = None
    kinds: frozenset[str] = frozenset()
    pattern: str = ""

    def covers(self, place: Place) -> bool:
        """Whether the place's block is among the blocks."""
        return self.blocks is None or place.block in self.blocks or place.group in self.blocks

    def matches(self, place: Place) -> bool:
        return self.covers(place) and self.kinds <= place.kinds and (not self.pattern or bool(re.search(self.pattern, place.name)))

    @property
    def is_whole(self) -> bool:
        """True if it matches all that is in its blocks."""
        return not self.kinds and not self.pattern


class Selectors:
    """Reads selectors for the blocks of one model. Case and leading zeros of numbers do not matter."""

    def __init__(self, blocks: Blocks):
        self.blocks = blocks
        self.has_text_encoder = any(group in blocks.groups for group in TEXT_ENCODERS)
        self.ids = blocks.ids if self.has_text_encoder else (*_layers_of_any_text_encoder(), *blocks.ids)
        groups = (*blocks.groups, "TE") if self.has_text_encoder else (*blocks.groups, "TE", *TEXT_ENCODERS)
        self._exact = {name.lower(): name for name in (*self.ids, *groups)}
        self._loose = {_plain(name): name for name in (*self.ids, *groups)}
        self._positions = {block: position for position, block in enumerate(self.ids)}

    def read(self, text: str) -> Selector:
        """Raises TriLoRAError for a word that names no block, group or kind of the model, and for a bad pattern."""
        if text.startswith("/"):
            return _pattern(text, self.blocks.names)
        if "-" in text:
            return self._range(text)
        name, rest = self._longest(text)
        if not name and not text.startswith("."):
            raise TriLoRAError(self._unknown(text))
        kinds = self._kinds(rest, text, name)
        if not name:
            return Selector(_with_kinds("", kinds), None, kinds)
        members = frozenset(TEXT_ENCODERS) if name == "TE" else frozenset({name})
        return Selector(_with_kinds(name, kinds), members, kinds)

    def _range(self, text: str) -> Selector:
        left, _, right = text.partition("-")
        first = self._find(left)
        last, rest = self._longest(right)
        if first and not last:  # only the number: IN04-08
            digits, dot, rest = right.partition(".")
            last = self._find(re.sub(r"\d+$", digits.strip(), first)) if digits.strip().isdigit() else None
            rest = dot + rest
        for word, block in ((left, first), (right, last)):
            if block not in self._positions:
                raise TriLoRAError(f"block weights: the range {text!r} goes from block to block, and {self._unknown(word).partition(': ')[2]}")
        start, end = sorted((self._positions[first], self._positions[last]))
        members = self.ids[start : end + 1]
        kinds = self._kinds(rest, text, first)
        span = members[0] if start == end else f"{members[0]}-{members[-1]}"
        return Selector(_with_kinds(span, kinds), frozenset(members), kinds)

    def _longest(self, text: str) -> tuple[str | None, str]:
        """The longest beginning that is a block or group, and what follows it."""
        words = text.split(".")
        for count in range(len(words), 0, -1):
            name = self._find(".".join(words[:count]))
            if name:
                return name, "".join(f".{word}" for word in words[count:])
        return None, text

    def _find(self, word: str) -> str | None:
        word = word.strip()
        return self._exact.get(word.lower()) or self._loose.get(_plain(word))

    def _kinds(self, text: str, item: str, name: str | None) -> frozenset[str]:
        kinds = frozenset(word.strip().lower() for word in text.split(".")[1:])
        # a text encoder that is not connected may have any kind
        there = self.blocks.kinds if self.has_text_encoder or not name or not name.startswith(("TE", *TEXT_ENCODERS)) else frozenset(KINDS)
        for kind in sorted(kinds - there):
            raise TriLoRAError(f"block weights: {kind!r} in {item!r} is no kind of layer of this model; it has {', '.join(sorted(there))}")
        return kinds

    def _unknown(self, text: str) -> str:
        from difflib import get_close_matches  # for an error only

        there = [f"{members[0]}-{members[-1]}" if len(members) > 1 else members[0] for members in self.blocks.groups.values()]
        near = get_close_matches(text.strip().upper(), [*self._exact.values()], 3)
        near_words = f" (near it: {', '.join(near)})" if near else ""
        return f"block weights: {text.strip()!r} names no block of this model{near_words}; it has {', '.join(there)}"


def _pattern(text: str, names: Collection[str]) -> Selector:
    """names: of the model's weights, empty = unknown."""
    pattern = text[1:-1]
    if len(text) < 3 or not text.endswith("/"):
        raise TriLoRAError(f"block weights: the pattern {text!r} has no end; write /pattern/=number, and \\/ for a slash in it")
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise TriLoRAError(f"block weights: the pattern {text!r} is no regular expression ({error})") from None
    if names and not any(map(search, names)):
        raise TriLoRAError(f"block weights: the pattern {text!r} is found in no weight's name, such as {min(names)}; correct it, or connect CLIP if it is "
                           "for the text encoder")
    return Selector(text, pattern=pattern)


def _with_kinds(name: str, kinds: Iterable[str]) -> str:
    return name + "".join(f".{kind}" for kind in sorted(kinds))


def _plain(word: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", word.lower())


def _layers_of_any_text_encoder() -> list[str]:
    return [f"{group}.{layer}" for group in TEXT_ENCODERS for layer in (*(f"{n:02d}" for n in range(_LAYERS)), "EMB")]
