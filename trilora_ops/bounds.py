"""How long, how deep and how many: the bounds of texts of people and of files, and how an error repeats a text.

Every reader of such a text works in time linear in it; the bounds keep that time under two seconds.
"""

from __future__ import annotations

import json
import re

from .errors import TriLoRAError

TEXT = 2**18  # characters of block weights, of a plan's text, of a schedule; ranks of 2,000 layers by name take 200,000
ITEM = 2000  # characters of one item of them
ITEMS = 5000  # items, of which each may ask about every weight of a model
PATTERNS = 100  # patterns of a text that are more than a name, of which each reads the names of a model
NESTING = 50  # brackets within each other
FILE = 2**20  # bytes of a file of presets, characters of JSON
LARGEST = 1e9  # of a strength, a rank, an alpha
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_SHOWN = 80  # characters of a text that an error repeats


def quoted(text: str) -> str:
    """Text as an error repeats it, in quotes, and cut where it is very long."""
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 10]} ...")


def check_length(text: str, what: str, longest: int = TEXT) -> None:
    """Raises TriLoRAError for a text longer than that. what: begins the sentence, such as "block weights: the text"."""
    if len(text) > longest:
        raise TriLoRAError(f"{what} has {len(text):,} characters; at most {longest:,} are read; write it shorter")


def check_count(count: int, what: str, most: int) -> None:
    """Raises TriLoRAError for more than that. what: the things, such as "block weights: items"."""
    if count > most:
        raise TriLoRAError(f"{what}: there are {count:,}, and at most {most:,} are read; write fewer")


def read_json(text: str):
    """What a JSON text holds. Raises ValueError for no JSON, also for JSON that is too long, too deep or has endless numbers."""
    if len(text) > FILE:
        raise ValueError(f"{len(text):,} characters, at most {FILE:,} are read")
    depth = 0
    for mark in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark[0], 0)
        if depth > NESTING:
            raise ValueError(f"more than {NESTING} brackets within each other")
    return json.loads(text, parse_int=_whole)


def _whole(digits: str) -> int:
    if len(digits) > 40:  # int() takes quadratic time
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)
