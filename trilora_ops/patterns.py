r"""Regular expressions of a stated subset, matched in time linear in the text whatever the pattern is.

    pattern = branch {"|" branch}               branch = {atom [repeat]}
    repeat  = ("*" | "+" | "?" | "{m}" | "{m,}" | "{,n}" | "{m,n}") ["?"]
    atom    = sign | "." | "[...]" | "[^...]" | "(" pattern ")" | "(?:" pattern ")" | "\d" | "\D" | "\w" | "\W" | "\s" | "\S"
            | "\n" "\t" "\r" "\f" "\v" "\a" | "\" sign that is no letter and no digit | "^" | "$" | "\A" | "\Z" | "\b"

A pattern finds what Python's `re` finds without flags. What else `re` has (look-around, back references, flags, names of
groups, possessive forms) is refused by name. Matched by Glushkov's automaton (1961), whose states are bits of a number, as
Navarro and Raffinot have it (Flexible Pattern Matching in Strings, 2002); sets of states are kept, so that a sign that was
met before costs one look into a table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .bounds import quoted
from .errors import TriLoRAError
from .pattern_syntax import AT_BEGIN, AT_BOUNDARY, AT_END, AT_LAST, Node, Signs, is_word, parse

LARGEST = 600  # signs, marks and groups of a pattern, those of a repeated part once for each time
_KEPT = 20_000  # transitions that are remembered
_END, _LAST_LINE_END = "", "\n$"  # after the last sign; a line end that is the last sign, before which $ holds too
_BEGIN, _WORD, _OTHER = range(3)  # what was read before


class Pattern:
    """A pattern that can be searched in texts. steps: work done so far, in looks into a table and transitions computed."""

    def __init__(self, text: str):
        """Raises TriLoRAError for a pattern that is not of the subset, or too large."""
        self.text = text
        tree = parse(text)
        self.literal = _literal(tree)
        self._count = 0
        self._where: dict[Signs, int] = {}  # the positions that take these signs, as bits
        self._size = 0
        self._has_assertions = False
        parts = (
            (Signs(), tree, Signs()) if self.literal is None else ()
        )  # before and behind it a position that takes nothing
        self._tree = Node("all", tuple(map(self._numbered, parts)))
        self._match = 1 << max(self._count - 1, 0)
        self._links: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        self._accepting: dict[str, int] = {}
        self._states: dict[tuple[int, int, bool], _State] = {}
        self._kept = self.steps = 0

    def search(self, text: str) -> bool:
        """Whether the pattern matches somewhere in the text, as `re.search` does."""
        if self.literal is not None:
            return self.literal.is_in(text)
        return self._run(self._state(1, True, _BEGIN), text)

    def is_in_any(self, texts: frozenset[str]) -> bool:
        """Whether the pattern is found in one of the texts."""
        if self.literal is not None and self.literal.at_begin and self.literal.at_end and self.literal.text in texts:
            return True
        return any(map(self.search, texts))

    def fullmatch(self, text: str) -> bool:
        """Whether the pattern matches the whole text, as `re.fullmatch` does."""
        if self.literal is not None:
            return text == self.literal.text
        return self._run(self._state(1, False, _BEGIN), text)

    def _run(self, state: _State, text: str) -> bool:
        last = (_LAST_LINE_END,) if text.endswith("\n") else text[-1:]
        self.steps += len(text) + 1
        for sign in (*text[:-1], *last, _END):
            state = state.following.get(sign) or self._advance(state, sign)
            if state.answer is not None:
                return state.answer
        raise AssertionError("every text has an end")

    def _advance(self, state: _State, sign: str) -> _State:
        shifted, pairs = self._links_for(state.before, sign)
        reached = (state.mask & shifted) << 1
        for last, first in pairs:
            if state.mask & last:
                reached |= first
        self.steps += len(pairs) + 1
        matched = reached & self._match
        if sign == _END or (matched and state.searching):
            following = _FOUND if matched else _NOT_FOUND
        else:
            mask = reached & self._that_take(sign[0]) | state.searching
            before = (_WORD if is_word(sign[0]) else _OTHER) if self._has_assertions else _OTHER
            following = self._state(mask, state.searching, before) if mask else _NOT_FOUND
        self._kept += 1
        if self._kept > _KEPT:
            self._states.clear()
            self._accepting.clear()
            self._kept = 0
        state.following[sign] = following
        return following

    def _state(self, mask: int, searching: bool, before: int) -> _State:
        key = (mask, before, searching)
        return self._states.get(key) or self._states.setdefault(key, _State(mask, before, searching))

    def _that_take(self, sign: str) -> int:
        """The positions that take a sign, as bits."""
        if sign not in self._accepting:
            self._accepting[sign] = _union(where for signs, where in self._where.items() if signs.take(sign))
        return self._accepting[sign]

    def _links_for(self, before: int, sign: str) -> tuple[int, list[tuple[int, int]]]:
        """What follows what between two signs: positions followed by the next one alone, and (any of these, all of these)."""
        true = self._true(before, sign) if self._has_assertions else 0
        if true not in self._links:
            pairs: list[tuple[int, int]] = []
            _glushkov(self._tree, true, pairs)
            merged: dict[int, int] = {}
            for last, first in pairs:
                if last and first:
                    merged[last] = merged.get(last, 0) | first
            shifted = sum(last for last, first in merged.items() if first == last << 1 and not last & (last - 1))
            self._links[true] = shifted, [(last, first) for last, first in merged.items() if last & ~shifted]
        return self._links[true]

    @staticmethod
    def _true(before: int, sign: str) -> int:
        """The assertions that hold between what was read before and the sign, as bits."""
        is_boundary = (before == _WORD) != (len(sign) == 1 and is_word(sign))
        return (
            AT_BEGIN * (before == _BEGIN)
            | AT_END * (sign in (_END, _LAST_LINE_END))
            | AT_LAST * (sign == _END)
            | AT_BOUNDARY * is_boundary
        )

    def _numbered(self, node: Node | Signs) -> Node:
        """The tree with its repetitions written out and every sign with a position of its own."""
        self._size += 1
        if self._size > LARGEST:
            raise TriLoRAError(
                f"the pattern {quoted(self.text)} is too large: with its repetitions written out it has more than {LARGEST} signs; "
                "write smaller numbers, or * for any number"
            )
        if isinstance(node, Signs):
            position = 1 << self._count
            self._count += 1
            self._where[node] = self._where.get(node, 0) | position
            return Node("position", value=position)
        if node.kind == "at":
            self._has_assertions = True
            return node
        if node.kind != "repeat":
            return Node(node.kind, tuple(map(self._numbered, node.parts)))
        return self._repeated(node)

    def _repeated(self, node: Node) -> Node:
        (part,), (least, most) = node.parts, node.value
        if most == 0:
            return Node("all")
        before = self._count
        first = self._numbered(part)
        if self._count == before:  # takes no sign: once is as good as often
            return first if least else Node("up to", (first,))
        rest = (self._numbered(part) for _ in range((least if most is None else most) - 1))
        copies = [first, *rest]
        if most is None:
            loop = Node("all", (*copies[:-1], Node("loop", copies[-1:])))
            return loop if least else Node("up to", (loop,))
        return Node("all", (*copies[:least], Node("up to", tuple(copies[least:]))))


@dataclass(eq=False, slots=True)
class _State:
    """mask: positions whose sign was read last; answer: where the text need not be read further."""

    mask: int = 0
    before: int = _BEGIN
    searching: bool = False
    answer: bool | None = None
    following: dict[str, _State] = field(default_factory=dict)


_FOUND, _NOT_FOUND = _State(answer=True), _State(answer=False)


@dataclass(frozen=True)
class _Literal:
    """Signs as they are: at the beginning, at the end, or anywhere."""

    text: str
    at_begin: bool
    at_end: bool

    def is_in(self, text: str) -> bool:
        if not self.at_end:
            return text.startswith(self.text) if self.at_begin else self.text in text
        ends = (self.text, f"{self.text}\n")  # $ holds before a last line end, too
        return text in ends if self.at_begin else text.endswith(ends)


def _literal(tree: Node) -> _Literal | None:
    parts = list(tree.parts) if tree.kind == "all" else [tree]
    at_begin = bool(parts) and parts[0] == Node("at", value=AT_BEGIN)
    at_end = len(parts) > at_begin and parts[-1] == Node("at", value=AT_END)
    signs = parts[at_begin : len(parts) - at_end]
    if not all(isinstance(part, Signs) and part.single for part in signs):
        return None
    return _Literal("".join(part.single for part in signs), at_begin, at_end)


def _glushkov(node: Node, true: int, pairs: list[tuple[int, int]]) -> tuple[bool, int, int]:
    """(can be empty, positions that can be first, that can be last) where the assertions `true` hold; adds to `pairs`."""
    if node.kind == "position":
        return False, node.value, node.value
    if node.kind == "at":
        return bool(node.value & true), 0, 0
    parts = [_glushkov(part, true, pairs) for part in node.parts]
    if node.kind == "any":
        return (
            any(empty for empty, _, _ in parts),
            _union(first for _, first, _ in parts),
            _union(last for _, _, last in parts),
        )
    if node.kind == "loop":
        [(empty, first, last)] = parts
        pairs.append((last, first))
        return empty, first, last
    return (_up_to if node.kind == "up to" else _all)(parts, pairs)


def _all(parts: list[tuple[bool, int, int]], pairs: list[tuple[int, int]]) -> tuple[bool, int, int]:
    """Parts one after the other."""
    empty, first, last = True, 0, 0
    for part_empty, part_first, part_last in parts:
        pairs.append((last, part_first))
        first |= part_first if empty else 0
        last = part_last | (last if part_empty else 0)
        empty = empty and part_empty
    return empty, first, last


def _up_to(parts: list[tuple[bool, int, int]], pairs: list[tuple[int, int]]) -> tuple[bool, int, int]:
    """Parts one after the other, of which any number at the end may be left out."""
    first = last = 0
    for part_empty, part_first, part_last in reversed(parts):
        pairs.append((part_last, first))
        first = part_first | (first if part_empty else 0)
        last |= part_last
    return True, first, last


def _union(masks: Iterable[int]) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found
