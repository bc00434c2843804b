"""What lies in a training folder: images, captions, and what is neither; nothing is opened."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..trilora_ops.errors import TriLoRAError

# whether Pillow can read the last ones depends on how it was built and on its plugins
IMAGE_TYPES = (
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".bmp",
    ".dib",
    ".gif",
    ".tif",
    ".tiff",
    ".jp2",
    ".avif",
    ".heic",
    ".heif",
    ".hif",
    ".jxl",
)
CAPTION_TYPE = ".txt"
MAX_REPEATS = 10_000  # of an image in an epoch, the number in a folder's name included
_SYSTEM_NAMES = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "__macosx",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "lost+found",
    "system volume information",
    "icon\r",
}
_NUMBERED = re.compile(r"(\d{1,4})_(.+)")  # kohya's folder names, "25_name"; a longer number is a date
_LONGEST = 80  # letters of one name


@dataclass
class Listing:
    """Files of a training folder, by name.

    images: (the folder it lies in, the file). captions: by that folder and the name without its ending. broken: of
    these, the ones that are no regular files, with the reason. others: files of other types. unread: subfolders with
    images that are not part of the set.
    """

    images: list[tuple[Path, Path]] = field(default_factory=list)
    captions: dict[tuple[Path, str], Path] = field(default_factory=dict)
    broken: dict[Path, str] = field(default_factory=dict)
    others: list[Path] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)

    def add(self, place: Path, path: Path, status: os.stat_result | None, types: set[str]) -> None:
        """Put one file of a folder where it belongs; types: endings of the images that can be read."""
        ending = path.suffix.lower()
        if ending not in types and ending != CAPTION_TYPE:
            (self.unread if _is_folder(status) else self.others).append(path)
            return
        if status is None or not stat.S_ISREG(status.st_mode):
            self.broken[path] = _why_broken(status)
        if ending in types:
            self.images.append((place, path))
        elif (place, _stem(path)) not in self.captions or path.suffix == CAPTION_TYPE:
            self.captions[place, _stem(path)] = path

    def caption_of(self, place: Path, image: Path) -> Path | None:
        """The caption file of an image, if there is one."""
        return self.captions.get((place, _stem(image)))


def numbered(name: str) -> tuple[int, str] | None:
    """(repeats, what is shown) of a folder named as kohya's tools have it, "25_name"; None for any other name."""
    parts = _NUMBERED.fullmatch(name)
    return (int(parts[1]), parts[2]) if parts and int(parts[1]) else None


def belongs_to_system(name: str) -> bool:
    """Whether a file or folder is the system's own, never a person's: hidden, `._01.png`, `__MACOSX`, Thumbs.db."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES or name.endswith(":Zone.Identifier")


def entries(place: Path) -> list[tuple[Path, os.stat_result | None]]:
    """What lies in a folder, by name, links followed; None for what leads nowhere. The system's own files are left out.

    Raises TriLoRAError for a folder that cannot be read.
    """
    try:
        names = sorted(os.listdir(place))
    except OSError as error:
        raise TriLoRAError(f"folder={shown(place.name)!r}: cannot be read ({type(error).__name__})") from error
    found = []
    for name in names:
        if belongs_to_system(name):
            continue
        try:
            found.append((place / name, os.stat(place / name)))
        except OSError:  # a link to nothing or to itself, a file of a drive that is gone
            found.append((place / name, None))
    return found


def folders_of(folder: Path) -> list[Path]:
    """Where the images of a training folder are: directly in it, and in its subfolders named "25_name"."""
    inside = [(path, status) for path, status in entries(folder) if _is_folder(status) and numbered(path.name)]
    own = os.stat(folder)
    return [folder, *(path for path, status in inside if not os.path.samestat(status, own))]  # a link may lead back


def listing(folder: Path, readable: Iterable[str]) -> Listing:
    """The files of `folders_of(folder)`; readable: endings of the images that can be read."""
    found, types, places = Listing(), set(readable), folders_of(folder)
    for place in places:
        for path, status in entries(place):
            if path not in places:
                found.add(place, path, status, types)
    found.unread = [path for path in found.unread if _holds_images(path)]
    return found


def stamps(folder: Path) -> list[tuple]:
    """(folder, name, time of change, size) of everything that `listing` sees, as far as it can be looked at."""
    found = []
    for place in folders_of(folder):
        for path, status in entries(place):
            found.append((place.name, path.name, *((status.st_mtime_ns, status.st_size) if status else ())))
    return found


def shown(name: str) -> str:
    """A file's name as a sentence can hold it: of bounded length, without line breaks and what cannot be shown."""
    plain = "".join(c if c.isprintable() else "?" for c in name)
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 20]}...{plain[-17:]}"


def _stem(path: Path) -> str:
    return unicodedata.normalize("NFC", path.stem)  # macOS writes an accent as a letter of its own


def _is_folder(status: os.stat_result | None) -> bool:
    return status is not None and stat.S_ISDIR(status.st_mode)


def _why_broken(status: os.stat_result | None) -> str:
    if status is None:
        return "a link to nothing"
    return "a folder" if _is_folder(status) else "not a regular file"


def _holds_images(place: Path) -> bool:
    try:
        return any(path.suffix.lower() in IMAGE_TYPES for path, _ in entries(place))
    except TriLoRAError:
        return False
