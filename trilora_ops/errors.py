"""The one public error of the pack, and the bound of what it says."""

from __future__ import annotations

import re

_LONGEST_WORD = 160  # the longest names of layers have some 120 letters
_LONGEST = 990


class TriLoRAError(ValueError):
    """Bad input, in one sentence: field, value, rule and remedy. The text is bounded, whatever a file's names are.

    Inner code states the fact; the boundary that knows the file or the node adds file, key, got and expected.
    """

    def __init__(self, message: str):
        super().__init__(bounded(message))


def bounded(text: str, longest: int = _LONGEST) -> str:
    """The text with the middle of every endless word left out, and then its own middle, so that `longest` letters hold it."""
    text = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: f"{word[0][:80]}…{word[0][-60:]}", text)
    if len(text) <= longest:
        return text
    tail = longest // 4  # the remedy stands at the end
    return f"{text[:longest - tail - 3]} … {text[-tail:]}"
