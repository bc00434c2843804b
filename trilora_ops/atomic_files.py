"""Files that appear whole or not at all, under a name that nobody else took, and that leave nothing behind.

Linux: written into a file without a name (O_TMPFILE), which then gets one; a process that is killed leaves nothing.
Elsewhere, and on file systems without that: written beside its place as `.<32 hex digits>.partial`. What a killed process
leaves so is removed by the next one that writes into the folder: its lock is gone, or, where there are no such locks
(Windows), it has not changed for a day.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import TriLoRAError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# also as earlier versions named theirs, with the file's name in front
_PARTIAL = re.compile(r"\.(?:.+\.)?[0-9a-f]{32}\.partial")
_DAY = 86400.0
_REMEDIES = {
    (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)): "free some space there",
    (errno.EROFS, errno.EACCES, errno.EPERM): "make the folder writable",
    (errno.EFBIG,): "a limit of the file system or of your account allows no file of this size",
    (errno.ENOTDIR, errno.EEXIST): "a file lies where the folder should be; rename it",
    (errno.ENAMETOOLONG,): "choose a shorter name",
}


class NameTaken(TriLoRAError):
    """A file of this name exists already, perhaps since a moment ago."""


def publish(path: Path, content: bytes) -> None:
    """Create the file `path` with this content, and its folder where there is none.

    Raises NameTaken where the name is in use, whoever took it, and TriLoRAError where the file cannot be written; then nothing of it stays.
    """
    try:
        _make_folder(path.parent)
        _remove_remains(path.parent)
        if not _publish_nameless(path, content):
            _publish_named(path, content)
    except NotADirectoryError as error:
        raise unwritable(path, error) from error
    except FileExistsError:
        raise NameTaken(f"{path.name}: a file of this name exists already; choose another name") from None
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: str | os.PathLike, error: OSError) -> TriLoRAError:
    """The sentence for a file that cannot be written, with what to do."""
    path, reason = Path(path), error.strerror or type(error).__name__
    remedy = next(
        (text for codes, text in _REMEDIES.items() if error.errno in codes), "choose another folder or look at this one"
    )
    return TriLoRAError(f"{path.name[:200]}: cannot be written to {path.parent} ({reason}); {remedy}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None


def _publish_nameless(path: Path, content: bytes) -> bool:
    """Whether it was done: not every system and file system has files without names."""
    if not hasattr(os, "O_TMPFILE"):
        return False
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError:
        return False
    with open(descriptor, "wb") as file:
        _write(file, content)
        try:  # given a descriptor (of no use beside a whole path), link follows the symbolic link that /proc shows
            os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)
        except FileExistsError:
            raise
        except OSError:
            return False
    return True


def _publish_named(path: Path, content: bytes) -> None:
    with _partial_file(path.parent) as (partial, file):
        _write(file, content)
        if os.name == "nt":
            file.close()
            os.rename(partial, path)  # there it fails where the name is taken
            return
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # no hard links: FAT, some network drives
            _replace_reserved(partial, path)


def _replace_reserved(partial: Path, path: Path) -> None:
    """Take the name with an empty file, which no other writer can then take, and put the real one in its place."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        os.replace(partial, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write(file, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())  # some file systems say only here that they are full


@contextmanager
def _partial_file(folder: Path) -> Iterator[tuple[Path, object]]:
    """A new file, locked where the system can, that is gone afterwards unless it was renamed."""
    while True:
        partial = folder / f".{uuid.uuid4().hex}.partial"
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        with open(descriptor, "wb") as file:
            try:
                _lock(descriptor)
                if os.name != "nt" and os.fstat(descriptor).st_nlink == 0:
                    continue  # another process took it for a remains before it was locked
                yield partial, file
                return
            finally:
                if os.name == "nt":
                    file.close()
                with suppress(OSError):
                    partial.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
    """Whether the file is now locked by this process, for as long as it is open."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_remains(folder: Path) -> None:
    """Delete the partial files of writers that are dead."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _PARTIAL.fullmatch(entry.name):
                with suppress(OSError):
                    _remove_dead(entry.path)


def _remove_dead(path: str) -> None:
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        return
    if fcntl is None:
        if time.time() - found.st_mtime > _DAY:
            os.unlink(path)
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if _lock(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)
