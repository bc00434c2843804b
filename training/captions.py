"""Captions beside images, and what is made of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path


def read_caption(image: Path) -> str | None:
    """Text of the `.txt` file beside the image (UTF-8, line breaks become spaces), or None where there is none or it is empty."""
    file = image.with_suffix(".txt")
    if not file.is_file():
        return None
    return " ".join(file.read_text(encoding="utf-8-sig", errors="replace").split()) or None


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
