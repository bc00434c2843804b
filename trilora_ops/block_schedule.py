"""How strengths change over the course of sampling, as text: one `selector: curve` a line, and the block's strength is

    strength(block, t) = strength * block weight * curve of the block at t

    text   = line {(newline | ";") line}        line = [selector {"," selector} ":"] curve
    curve  = number                             the same all the time
           | t:s {"," t:s} [easing]             through these points, level before the first and after the last
           | s -> s {"->" s} [easing]           through these strengths, evenly spread over the whole course
           | [s] {start=t | stop=t | step=t-t}  s (or 1) from start to stop, 0 outside
    t      = fraction of sampling, 0 to 1, as a decimal number or as steps: 5/20
    easing = "linear" | "cosine" | "ease_in" | "ease_out" | "step"

Selectors are those of `block_syntax`, the last line that matches a place wins; `default`, or a line without a selector,
is for every place that no line matches, text encoders too. Two points at one t are a jump there. `step` keeps a point's
strength until the next one. t is the host's percent: 0 at the most noise, 1 at none, even in the timesteps of training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .block_selectors import Selector, Selectors, quoted
from .block_syntax import CHARACTERS, NUMBER, default_and_rules, number, written
from .blocks import Blocks, Place
from .bounds import ITEMS, check_count, check_length
from .errors import TriLoRAError

# share of the way from one point to the next at x of the time between them
EASINGS = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "ease_in": lambda x: x * x,
    "ease_out": lambda x: 1 - (1 - x) ** 2,
    "step": lambda x: 0.0,
}
_CURVES = "write a number, points like 0:1, 0.4:1, 0.6:0, a change like 1 -> 0 cosine, or a window like start=0.2 stop=0.6"
_SELECTOR = re.compile(r"/(?:\\.|[^\\/\n])+/[^,:;\n]*|[^/,:;\n]+")  # a /pattern/ may hold every sign that parts others
_BLANKS = re.compile(r"[ \t]*")
_TO_THE_END = re.compile(r"[^;\n]*")
_MOST_POINTS = 500  # of a curve


@dataclass(frozen=True)
class Curve:
    """Strength over t. points: (t, strength) with t rising in [0, 1], at most two at one t; easing: one of EASINGS, between them."""

    points: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    easing: str = "linear"

    @property
    def is_constant(self) -> bool:
        return len({strength for _, strength in self.points}) == 1

    def at(self, t: float) -> float:
        """The strength at t; where it jumps, the one after the jump."""
        if t < self.points[0][0]:
            return self.points[0][1]
        for (begin, strength), (end, after) in pairwise(self.points):
            if begin <= t < end:
                return strength + (after - strength) * EASINGS[self.easing]((t - begin) / (end - begin))
        return self.points[-1][1]

    def text(self) -> str:
        """The canonical text: `read_curve` of it is equal to self."""
        if self.is_constant:
            return written(self.points[0][1])
        points = ", ".join(f"{written(t)}:{written(strength)}" for t, strength in self.points)
        return points if self.easing == "linear" else f"{points} {self.easing}"


@dataclass(frozen=True)
class Schedule:
    """default: the curve where no rule matches; rules: (selector as written, curve) in the order of the text."""

    default: Curve = Curve()
    rules: tuple[tuple[str, Curve], ...] = ()

    @property
    def curves(self) -> tuple[Curve, ...]:
        """Every curve there is, once."""
        return tuple(dict.fromkeys((self.default, *(curve for _, curve in self.rules))))

    def text(self) -> str:
        """The canonical text: `parse` of it is equal to self."""
        return "\n".join(f"{selector}: {curve.text()}" for selector, curve in (("default", self.default), *self.rules))

    def on(self, blocks: Blocks, strict: bool = True) -> "PlacedSchedule":
        """The schedule on one model. Raises TriLoRAError for a selector that names none of its blocks; not strict: without those."""
        selectors, rules = Selectors(blocks), []
        for text, curve in self.rules:
            try:
                rules.append((selectors.read(text), curve))
            except TriLoRAError as error:
                if strict:
                    raise _in_line(f"{text}: {curve.text()}", error) from None
        return PlacedSchedule(self.default, tuple(rules))


@dataclass(frozen=True)
class PlacedSchedule:
    """A schedule whose selectors have been read for one model."""

    default: Curve
    rules: tuple[tuple[Selector, Curve], ...]

    def at(self, place: Place) -> Curve:
        """The curve of the last rule that matches."""
        return next((curve for selector, curve in reversed(self.rules) if selector.matches(place)), self.default)


def parse(text: str) -> Schedule:
    """The schedule that a text means; "" is 1 everywhere, all the time.

    Raises TriLoRAError, with the line, for what is no curve. Whether the selectors match anything is asked by `Schedule.on`.
    """
    check_length(text, "schedule: the text")
    named: list[tuple[str, Curve]] = []
    for line in _lines(text.translate(CHARACTERS)):
        try:
            selectors, curve = _read_line(line)
        except TriLoRAError as error:
            raise _in_line(line, error) from None
        named += [(selector, curve) for selector in selectors]
        check_count(len(named), "schedule: selectors", ITEMS)
    default, rules = default_and_rules(named, Curve())
    return Schedule(default, tuple(rules))


def steps(curves: Sequence[Curve], switches: int) -> list[tuple[tuple[float, float], ...]]:
    """Each curve as steps ((start, strength), ...), which change at no more than `switches` times, all curves together.

    Exact where a curve jumps or is level. Where one rises or falls, the times that are left are spread so that no curve
    is ever far from its step, which is the curve's value in the middle of it. Raises TriLoRAError where the points of the
    curves alone are more than `switches`.
    """
    cuts = sorted({t for curve in curves if not curve.is_constant for t, _ in curve.points if 0 < t < 1})
    if len(cuts) > switches:
        raise TriLoRAError(f"the schedule changes at {len(cuts)} times ({', '.join(map(written, cuts[:8]))}{', ...' if len(cuts) > 8 else ''}), "
                           f"and switches={switches} allows fewer; raise it to {len(cuts)}, or leave points out")
    pieces = list(pairwise((0.0, *cuts, 1.0)))
    # within a piece every curve rises or falls all the time; nearly its end, since a jump there is the next piece's
    spreads = [max((abs(curve.at(end - 1e-9 * (end - begin)) - curve.at(begin)) for curve in curves), default=0.0) for begin, end in pieces]
    counts = [1] * len(pieces)
    for _ in range(switches - len(cuts)):
        widest = max(range(len(pieces)), key=lambda i: spreads[i] / counts[i])
        if spreads[widest] == 0:
            break
        counts[widest] += 1
    starts = [begin + (end - begin) * i / count for (begin, end), count in zip(pieces, counts, strict=True) for i in range(count)]
    return [_without_repeats((start, round(curve.at((start + end) / 2), 12)) for start, end in pairwise((*starts, 1.0))) for curve in curves]


def _without_repeats(found) -> tuple[tuple[float, float], ...]:
    kept: list[tuple[float, float]] = []
    for start, strength in found:
        if not kept or strength != kept[-1][1]:
            kept.append((start, strength))
    return tuple(kept)


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, which end with a line end or a semicolon outside a pattern."""
    position = 0
    while position < len(text):
        head = _head(text, position)
        end = _TO_THE_END.match(text, head[1] if head else position).end()
        if line := text[position:end].strip():
            yield line
        position = end + 1


def _head(text: str, position: int) -> tuple[list[str], int] | None:
    """(selectors, where the curve behind their colon begins) of a line that begins there; None for one without selectors."""
    selectors = []
    while match := _SELECTOR.match(text, _BLANKS.match(text, position).end()):
        selectors.append(match[0].strip())
        position = match.end() + 1
        mark = text[position - 1 : position]
        if mark != ",":
            return (selectors, position) if mark == ":" else None
    return None


def _read_line(line: str) -> tuple[list[str], Curve]:
    """(selectors, curve) of one line; without a selector it is for `default`."""
    head = _head(line, 0)
    # a point's time and a window's words are no selectors
    if not head or any(re.fullmatch(NUMBER, word) or ("=" in word and not word.startswith("/")) for word in head[0]):
        return ["default"], read_curve(line)
    return head[0], read_curve(line[head[1] :])


def read_curve(text: str) -> Curve:
    """One curve. Raises TriLoRAError that says what is wrong with it."""
    words = re.sub(r" ?(:|->|=) ?", r"\1", " ".join(text.split())).replace(":st", " st")
    tokens = [word for word in re.split(r"[,\s]+", words) if word]
    check_count(max(len(tokens), 1 + words.count("->")), "points of a curve", _MOST_POINTS)
    if not tokens:
        raise TriLoRAError(f"there is no curve; {_CURVES}")
    if any("=" in token for token in tokens):
        return _window(tokens)
    easing = "linear"
    if len(tokens) > 1 and re.fullmatch(r"[A-Za-z][\w-]*", tokens[-1]):
        easing = _easing(tokens.pop())
    if len(tokens) == 1 and "->" in tokens[0]:
        strengths = [_number(word) for word in tokens[0].split("->")]
        return _normal([(i / (len(strengths) - 1), strength) for i, strength in enumerate(strengths)], easing)
    if all(":" in token for token in tokens):
        return _normal([(_time(t), _number(strength)) for t, _, strength in (token.partition(":") for token in tokens)], easing)
    if len(tokens) == 1:
        return _normal([(0.0, _number(tokens[0]))], easing)
    raise TriLoRAError(f"{quoted(text.strip())} is no curve; {_CURVES}")


def _window(tokens: Sequence[str]) -> Curve:
    strength, times = 1.0, {"start": 0.0, "stop": 1.0}
    for position, token in enumerate(tokens):
        word, equals, value = token.partition("=")
        if not equals and position == 0:
            strength = _number(token)
        elif word.lower() in times:
            times[word.lower()] = _time(value)
        elif word.lower() == "step" and len(ends := value.split("-")) == 2:
            times["start"], times["stop"] = map(_time, ends)
        else:
            raise TriLoRAError(f"{quoted(token)} is not a part of a window; write for example 0.8 start=0.2 stop=0.6, or step=0.2-0.6; "
                               "to rise and fall slowly, write points: 0.2:1, 0.6:0 cosine")
    if times["start"] >= times["stop"]:
        raise TriLoRAError(f"start={written(times['start'])} is not before stop={written(times['stop'])}, so the window is empty; exchange them, or write 0")
    return _normal([(0.0, 0.0), (times["start"], strength), (times["stop"], 0.0)], "step")


def _normal(points: list[tuple[float, float]], easing: str) -> Curve:
    """The curve without the points that change nothing, so that curves that are the same are equal."""
    for (before, _), (after, _) in pairwise(points):
        if after < before:
            raise TriLoRAError(f"the points go back from {written(before)} to {written(after)}; write them in the order of time")
    kept: list[tuple[float, float]] = []
    for t in dict.fromkeys(t for t, _ in points):
        here = [point for point in points if point[0] == t]
        # of several at one t only the first and the last count; before 0 and after 1 there is no sampling
        kept += here[-1:] if t == 0 else here[:1] if t == 1 or len(here) == 1 else [here[0], here[-1]]
    if easing == "step":
        kept = [point for i, point in enumerate(kept) if i == 0 or (point[0] < 1 and point[1] != kept[i - 1][1])]
    for i in range(len(kept) - 1, -1, -1):  # what lies between equals, or has only equals on one side
        around = {point[1] for point in kept[max(i - 1, 0) : i + 2]}
        if len(around) == 1 and len(kept) > 1:
            del kept[i]
    return Curve(((0.0, kept[0][1]),)) if len(kept) == 1 else Curve(tuple(kept), easing)


def _time(text: str) -> float:
    t = _number(text)
    if not 0 <= t <= 1:
        raise TriLoRAError(f"{quoted(text)} is not a fraction of sampling, 0 to 1; write a step with the number of steps: 5 of 20 is 5/20")
    return t


def _number(text: str) -> float:
    above, slash, below = text.partition("/")
    value = number(above, text)
    if slash and not re.fullmatch(r"0*[1-9]\d*", below):
        raise TriLoRAError(f"{quoted(text)} is no step of so many, such as 5/20")
    return value / number(below, text) if slash else value


def _easing(text: str) -> str:
    name = {"ease_in_out": "cosine"}.get(text.lower().replace("-", "_"), text.lower().replace("-", "_"))
    if name not in EASINGS:
        raise TriLoRAError(f"{quoted(text)} is no easing; choose one of {', '.join(EASINGS)}")
    return name


def _in_line(line: str, error: TriLoRAError) -> TriLoRAError:
    return TriLoRAError(f"schedule, in the line {quoted(line)}: {str(error).removeprefix('block weights: ')}")
