"""What nodes have read of files that their inputs name over a link, which the host does not know before a run."""

from __future__ import annotations

from collections.abc import Callable, Hashable


class Seen:
    """Counts how often something that was read has changed since; a node runs again when the count has.

    stamp: key -> a value that is another one after a change; None where the thing is gone, which changes nothing that was read.
    """

    def __init__(self, stamp: Callable[[Hashable], object]):
        self._stamp = stamp
        self._read: dict[Hashable, object] = {}
        self._changes = 0

    def reads(self, key: Hashable) -> None:
        """To be called before the reading, so that a change in its midst is seen later."""
        self._read[key] = self._stamp(key)

    def changes(self) -> int:
        for key, before in list(self._read.items()):
            now = self._stamp(key)
            if now is not None and now != before:
                self._read[key] = now
                self._changes += 1
        return self._changes
