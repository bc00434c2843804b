"""A pattern's text as a tree; `patterns` says which patterns there are."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .bounds import quoted
from .errors import TriLoRAError

LONGEST = 1000  # characters of a pattern
NESTING = 50  # groups within groups
TIMES = 9999  # of a repetition
AT_BEGIN, AT_END, AT_LAST, AT_BOUNDARY = 1, 2, 4, 8  # ^ or \A, $, \Z, \b
_HAS = "patterns here have letters, ., [...], (...), (?:...), |, * + ? {m,n}, ^ $ and the escapes d, w, s, b"
_ASSERTIONS = {"A": AT_BEGIN, "Z": AT_LAST, "b": AT_BOUNDARY}
_SIGNS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_COUNTS = re.compile(r"\{(?:([0-9]*)(,)([0-9]*)|([0-9]+))\}")


def is_word(sign: str) -> bool:
    return sign.isalnum() or sign == "_"


_CLASSES = {"d": str.isdecimal, "w": is_word, "s": str.isspace}


@dataclass(frozen=True)
class Signs:
    """The signs that one place of a pattern takes. ranges: first and last sign; classes: letters behind a backslash."""

    ranges: tuple[tuple[str, str], ...] = ()
    classes: str = ""
    negated: bool = False

    def take(self, sign: str) -> bool:
        return self.negated != (
            any(first <= sign <= last for first, last in self.ranges)
            or any(_CLASSES[letter.lower()](sign) == letter.islower() for letter in self.classes)
        )

    @property
    def single(self) -> str:
        """The only sign, "" where there are several."""
        if self.negated or self.classes or len(self.ranges) != 1 or self.ranges[0][0] != self.ranges[0][1]:
            return ""
        return self.ranges[0][0]


@dataclass(frozen=True)
class Node:
    """kind: "all" (one after the other), "any" (one of them), "repeat" (value: least and most times, None = no end), "at"
    (value: an assertion); and of an automaton's tree "position" (value: its bit), "loop" and "up to"."""

    kind: str
    parts: tuple[Node | Signs, ...] = ()
    value: int | tuple[int, int | None] = 0


def parse(text: str) -> Node:
    """Raises TriLoRAError that names what is wrong, or not of the subset."""
    if len(text) > LONGEST:
        raise TriLoRAError(
            f"the pattern {quoted(text)} has {len(text):,} characters; at most {LONGEST:,} are read; write it shorter"
        )
    parser = _Parser(text)
    tree = parser.alternatives(0)
    if parser.at < len(text):
        parser.refuse("has a ) without its (; write \\) for the sign itself")
    return tree


class _Parser:
    def __init__(self, text: str):
        self.text, self.at = text, 0

    def refuse(self, why: str) -> None:
        raise TriLoRAError(f"the pattern {quoted(self.text)} {why}")

    def take(self) -> str:
        self.at += 1
        return self.text[self.at - 1]

    def begins(self, beginning: str) -> bool:
        return self.text.startswith(beginning, self.at)

    def alternatives(self, depth: int) -> Node:
        if depth > NESTING:
            self.refuse(f"has more than {NESTING} groups within each other; write fewer")
        branches = [self.branch(depth)]
        while self.begins("|"):
            self.at += 1
            branches.append(self.branch(depth))
        return branches[0] if len(branches) == 1 else Node("any", tuple(branches))

    def branch(self, depth: int) -> Node:
        parts: list[Node | Signs] = []
        while self.at < len(self.text) and not self.begins("|") and not self.begins(")"):
            parts.append(self.repeated(self.atom(depth)))
        return Node("all", tuple(parts))

    def repeated(self, atom: Node | Signs) -> Node | Signs:
        counts = self.counts()
        if counts is None:
            return atom
        if isinstance(atom, Node) and atom.kind == "at":
            self.refuse("repeats ^, $ or another mark that takes no sign; leave the repetition out")
        if self.begins("+"):
            self.refuse(f"has a possessive repetition ({self.text[self.at - 1]}+), which is not supported; {_HAS}")
        if self.begins("?"):
            self.at += 1
        if self.counts() is not None:
            self.refuse("repeats a repetition; put the inner one into (?:...)")
        return Node("repeat", (atom,), counts)

    def counts(self) -> tuple[int, int | None] | None:
        """Reads a repetition, if there is one."""
        for sign, found in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.begins(sign):
                self.at += 1
                return found
        match = _COUNTS.match(self.text, self.at)
        if not match:
            return None
        self.at = match.end()
        least, most = (match[1], match[3]) if match[2] else (match[4], match[4])
        if any(len(count.lstrip("0")) > len(str(TIMES)) for count in (least, most)):
            self.refuse(f"repeats a part more than {TIMES} times; write *")
        low, high = int(least or 0), int(most) if most else None
        if high is not None and high < low:
            self.refuse(f"has {quoted(match[0])}, where the second number must not be smaller than the first")
        return low, high

    def atom(self, depth: int) -> Node | Signs:
        if self.begins("{") and _COUNTS.match(self.text, self.at):
            self.refuse("repeats nothing: a repetition stands behind a sign or a group; write \\{ for the sign itself")
        sign = self.take()
        if sign == "(":
            return self.group(depth)
        if sign == "[":
            return self.sign_class()
        if sign == ".":
            return Signs((("\n", "\n"),), negated=True)
        if sign in "^$":
            return Node("at", value=AT_BEGIN if sign == "^" else AT_END)
        if sign in "*+?":
            self.refuse(f"repeats nothing: {sign} stands behind a sign or a group; write \\{sign} for the sign itself")
        if sign != "\\":
            return Signs(((sign, sign),))
        if self.at < len(self.text) and self.text[self.at] in _ASSERTIONS:
            return Node("at", value=_ASSERTIONS[self.take()])
        return self.escaped()

    def group(self, depth: int) -> Node:
        if self.begins("?"):
            if not self.begins("?:"):
                self.refuse(f"has {quoted('(' + self.text[self.at : self.at + 2])}, which is not supported; {_HAS}")
            self.at += 2
        inside = self.alternatives(depth + 1)
        if not self.begins(")"):
            self.refuse("has a ( without its ); write \\( for the sign itself")
        self.at += 1
        return Node("all", (inside,))

    def escaped(self) -> Signs:
        """Behind a backslash."""
        if self.at == len(self.text):
            self.refuse("ends with a backslash; write \\\\ for the sign itself")
        sign = self.take()
        if sign.lower() in _CLASSES:
            return Signs(classes=sign)
        if sign in _SIGNS:
            return Signs(((_SIGNS[sign], _SIGNS[sign]),))
        if sign.isascii() and sign.isalnum():
            self.refuse(f"has {quoted(chr(92) + sign)}, which is not supported; {_HAS}")
        return Signs(((sign, sign),))

    def sign_class(self) -> Signs:
        """Behind [."""
        negated = self.begins("^")
        self.at += negated
        ranges, classes, begin = [], "", self.at
        while not self.begins("]") or self.at == begin:
            first = self.member()
            if not self.begins("-") or self.text.startswith("-]", self.at):
                ranges += first.ranges
                classes += first.classes
                continue
            self.at += 1
            last = self.member()
            if not first.single or not last.single or last.single < first.single:
                self.refuse(
                    "has [...] with a range that goes from no sign to no later one; write \\- for the sign itself"
                )
            ranges.append((first.single, last.single))
        self.at += 1
        return Signs(tuple(ranges), classes, negated)

    def member(self) -> Signs:
        if self.at >= len(self.text):
            self.refuse("has a [ without its ]; write \\[ for the sign itself")
        sign = self.take()
        if sign != "\\":
            return Signs(((sign, sign),))
        if self.begins("b"):
            self.at += 1
            return Signs((("\b", "\b"),))
        return self.escaped()
