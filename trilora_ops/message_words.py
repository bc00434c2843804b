"""Names of a file and counts as messages repeat them: in one line, at bounded length."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import islice

SHOWN = 5  # names of a list
_LETTERS = 120  # of a name


def short(name: str, letters: int = _LETTERS) -> str:
    """A name in one line, cut in the middle where it is very long."""
    kept = name if len(name) <= letters else f"{name[: letters // 2]} ... {name[-letters // 3 :]}"
    return "".join(letter if letter.isprintable() else "?" for letter in kept)


def few(texts: Iterable[str], count: int = SHOWN) -> str:
    """The first of some texts, which are of bounded length, and how many more there are."""
    texts = list(texts)
    return _listed(texts[:count], len(texts) - count)


def some(names: Collection[str], count: int = SHOWN) -> str:
    """The same of names of any length."""
    shown = [short(name) for name in islice(names, count)]
    return _listed(shown, len(names) - len(shown))


def _listed(shown: list[str], left: int) -> str:
    return ", ".join(shown) + (f" and {left} more" if left > 0 else "")


def counted(count: int, word: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{count} {word}{'s' * (count != 1)}"
