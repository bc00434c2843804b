"""Names that people type for a file, as names that every system takes."""

from __future__ import annotations

import re

from .block_selectors import quoted
from .errors import TriLoRAError

ENDING = ".safetensors"
# Of the 255 bytes that file systems give a name; the rest is for the number, the ending and what an unfinished file is called.
_LONGEST = 200
_LONGEST_PATH = 1000
_BAD = re.compile(r'[\x00-\x1f\x7f<>:"|?*/\\]')  # control characters, and what Windows has for other uses
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(?=\.|$)", re.IGNORECASE)


def good_file_name(parts: list[str]) -> list[str]:
    """Folders and a file's name without ending, each as a name that Linux, macOS and Windows take.

    Characters that one of them has not become _, dots and spaces at the end go, and so does an ending .safetensors; what is
    too long is cut. Raises TriLoRAError where nothing of a name is left, and for more than 1000 letters of folders.
    """
    last = parts[-1]
    while last.lower().rstrip(". ").endswith(ENDING):
        last = last.rstrip(". ")[: -len(ENDING)]
    good = [_good(part) for part in (*parts[:-1], last)]
    if not all(good):
        raise TriLoRAError(f"name={quoted('/'.join(parts))}: must be a file name with at least one letter or digit")
    if len("/".join(good[:-1])) > _LONGEST_PATH:
        raise TriLoRAError(
            f"name={quoted('/'.join(parts))}: must have at most {_LONGEST_PATH} letters of subfolders; it has more"
        )
    return good


def _good(part: str) -> str:
    # a lone surrogate is half a character, and becomes a question mark
    cleaned = _BAD.sub("_", part.encode("utf-8", "replace").decode("utf-8"))
    cut = cleaned.encode("utf-8")[:_LONGEST].decode("utf-8", "ignore").strip().rstrip(". ")
    return _RESERVED.sub(r"\1_", cut, count=1) if _RESERVED.match(cut) else cut
