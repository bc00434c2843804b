"""Captions beside images: their text, whatever encoding it is stored in, and what is made of it."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..trilora_ops.errors import TriLoRAError

MAX_CAPTION = 10_000  # characters; the longest captions that models write have about 4,000
# UTF-32 first: its little-endian mark begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LOST = frozenset("\ufffd\ufffe\uffff")  # what a converter puts in place of a character; what byte-swapped text holds
_DOCUMENTS = {r"{\rtf": "an RTF document", "<!doctype": "an HTML page", "<html": "an HTML page",
              "version https://git-lfs": "a Git LFS pointer"}


def read_caption(file: Path) -> str | None:
    """Text of a caption file, line breaks as spaces; None where it holds none.

    The file must be a regular one. Raises TriLoRAError, without the file's name, for what `decoded` refuses, for a
    file that cannot be opened and for more than `MAX_CAPTION` characters.
    """
    try:
        with file.open("rb") as stream:
            raw = stream.read(4 * MAX_CAPTION + 5)  # four bytes a character at the most, and a byte order mark
    except OSError as error:
        raise TriLoRAError(f"cannot be opened: {type(error).__name__}") from error
    if len(raw) > 4 * MAX_CAPTION + 4:
        raise TriLoRAError(f"longer than {MAX_CAPTION} characters")
    text = " ".join(decoded(raw).split())
    if len(text) > MAX_CAPTION:
        raise TriLoRAError(f"longer than {MAX_CAPTION} characters")
    seen = any(letter.isprintable() and not letter.isspace() for letter in text)
    return text if seen else None


def decoded(raw: bytes) -> str:
    """The text that bytes hold: UTF-8, and UTF-16 or UTF-32 with a byte order mark; UTF-16 without one where every
    second byte of most characters is zero.

    Encodings that cannot be told from each other (Windows-1252, Shift-JIS, GBK ...) are not guessed. Raises
    TriLoRAError, without the file's name, for these and for what is not plain text.
    """
    mark, encoding = next(((m, e) for m, e in _MARKS if raw.startswith(m)), (b"", ""))
    body = raw[len(mark):]
    encoding = encoding or _unmarked(body)
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        raise TriLoRAError(f"not {encoding[:6].rstrip('-').upper()} text") from error
    text = text.replace("\ufeff", "")
    start = text[:40].lstrip().lower()
    kind = next((kind for mark, kind in _DOCUMENTS.items() if start.startswith(mark)), "")
    if kind:
        raise TriLoRAError(f"{kind}, not plain text")
    if not _LOST.isdisjoint(text):
        raise TriLoRAError("holds the mark of characters that an earlier conversion has lost")
    if any(unicodedata.category(c) == "Cc" and not c.isspace() for c in set(text)):
        raise TriLoRAError("holds control characters, so it is not plain text or was converted wrongly")
    return text


def _unmarked(body: bytes) -> str:
    """The encoding of bytes without a byte order mark."""
    first, second = body[0::2].count(0), body[1::2].count(0)
    units = len(body) // 2
    if len(body) % 2 == 0 and second * 2 > units and not first:
        return "utf-16-le"
    if len(body) % 2 == 0 and first * 2 > units and not second:
        return "utf-16-be"
    return "utf-8"


def with_trigger(caption: str | None, trigger: str) -> str:
    """The prompt an image is trained with: "trigger, tag, tag, ..."; the trigger once, alone where there is no caption.

    A trigger that is one of the caption's tags moves to the front; one that stands in a sentence ("a photo of sks dog")
    stays where it is.
    """
    trigger = trigger.strip()
    if not trigger or not caption:
        return caption or trigger
    tags = [tag.strip() for tag in caption.split(",")]
    others = [tag for tag in tags if tag.casefold() != trigger.casefold()]
    if len(others) < len(tags):
        return ", ".join([trigger, *filter(None, others)])
    there = re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE)
    return caption if there else f"{trigger}, {caption}"


def tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """Comma-separated tag -> number of captions that hold it, most frequent first."""
    count = Counter(tag for caption in captions for tag in {t.strip() for t in caption.split(",")} if tag)
    return dict(sorted(count.items(), key=lambda item: (-item[1], item[0])))
