"""What a run leaves out or finds doubtful, in words: in the log, and on the node that is running."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..trilora_ops.errors import bounded
from . import compat

log = logging.getLogger("trilora")
_current: ContextVar[list[str] | None] = ContextVar("notices", default=None)
_told: set[str] = set()  # nodes that show a notice of an earlier run


def notice(text: str) -> None:
    """Log a warning, and keep it for the node that is running, once however often it is given. Its length is bounded."""
    text = bounded(text)
    log.warning("%s", text)
    said = _current.get()
    if said is not None and text not in said:
        said.append(text)


def given() -> list[str]:
    """The notices given so far in the block of `collected` that is running; none outside of one."""
    return list(_current.get() or [])


@contextmanager
def collected() -> Iterator[list[str]]:
    """The notices given inside the block, in order; those of an inner block are the inner block's alone."""
    said: list[str] = []
    token = _current.set(said)
    try:
        yield said
    finally:
        _current.reset(token)


@contextmanager
def shown_on(node_id: str | None) -> Iterator[list[str]]:
    """Show the notices given inside the block on a node when the block ends well; a node without any loses those of its last run."""
    with collected() as said:
        yield said
    if said:
        compat.show_text("\n".join(said), node_id)
        _told.add(node_id)
    elif node_id in _told:
        compat.show_text("nothing was left out", node_id)
        _told.discard(node_id)
