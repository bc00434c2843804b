"""Text of files, folders and captions as every front end shows it: as text, and line by line.

What a node says of itself is HTML in front end 1.27, HTML with few tags and `[[label|address]]` for links in 1.49, and
Markdown in the Nodes 2.0 of the latter. None of them offers plain text. So what one of them would act upon is parted by
a character without width, or, where Markdown leaves no other way, replaced by one that looks the same.
"""

from __future__ import annotations

import functools
import logging
import re

log = logging.getLogger("trilora")
_WORD_JOINER = "\u2060"  # no width, no line break
_LOOK_ALIKE = str.maketrans({"*": "∗", "`": "ˋ", "~": "∼"})
_LONGEST = 20_000  # characters; a node's report is whole in its output
# what stands before the place at which a tag, an entity, an escape, a link or an address has to be parted
_PARTED = re.compile(
    r"[<&\\](?=\S)"
    r"|\\$"
    r"|\[(?=\[)"
    r"|\](?=[(:\[])"
    r"|:(?=//)"
    r"|\bwww(?=\.)"
    r"|@(?=\w)",
    re.IGNORECASE | re.MULTILINE,
)
_MARKUP = re.compile(r"<[A-Za-z/!?]")
_STARTS_EMPHASIS = re.compile(r"(?<!\w)_+(?=[^\s_])")  # elsewhere, as in most file names, it means nothing


def as_text(text: str) -> str:
    """The text such that every supported front end shows these characters and these lines, and acts upon none."""
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + " …"
    # names of files may hold surrogates, which no message can
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    plain = _STARTS_EMPHASIS.sub(lambda found: "ˍ" * len(found[0]), text.translate(_LOOK_ALIKE))
    plain = _PARTED.sub(lambda found: found[0] + _WORD_JOINER, plain)
    return "  \n".join(_line(line) for line in plain.split("\n"))  # two spaces: a line break in Markdown


def _line(line: str) -> str:
    """A line that is no heading, list, quotation or code, with its indentation kept."""
    body = line.lstrip(" \t")
    return _WORD_JOINER + "\u00a0" * (len(line) - len(body)) + body.rstrip(" \t")


def without_markup(names: list[str]) -> list[str]:
    """Names for a menu: front end 1.27 takes them for HTML, so those that are HTML are left out, and named in the log."""
    left_out = tuple(name for name in names if _MARKUP.search(name))
    _tell(left_out)
    return [name for name in names if name not in left_out]


@functools.lru_cache(maxsize=8)
def _tell(left_out: tuple[str, ...]) -> None:
    for name in left_out:
        log.warning("%s is not listed: its name would be read as HTML; rename it", as_text(name[:200]))
