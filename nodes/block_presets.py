"""Block weights by name: those of the extension, and those in text files in the host's user folder.

Every `.txt` file in `user/default/trilora/presets` counts; `trilora_ops.block_preset_files` says what its lines may be. The
files are read at each call, so that a new or changed one counts at once.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import folder_paths

from ..trilora_ops.bounds import FILE, quoted
from ..trilora_ops.errors import TriLoRAError

log = logging.getLogger("trilora")
_USER = "default"  # the host's only user, unless it was started for several
_FOLDER = ("trilora", "presets")
_MOST_FILES = 100
_SHOWN = 5  # faults that an error names


@dataclass(frozen=True)
class Preset:
    """A line of a preset file; file and line say where it stands, line from 1."""

    name: str
    text: str
    file: str
    line: int


@dataclass(frozen=True)
class PresetFiles:
    """What the user's files hold, in the order of their names.

    faults: what cannot be read, with file and line; a file that has one gives no presets. unclear: words that may be names
    in such a file, and names with two meanings; no preset has one of these.
    """

    presets: tuple[Preset, ...]
    faults: tuple[str, ...] = ()
    unclear: frozenset[str] = frozenset()


@contextmanager
def user_presets() -> Iterator[dict[str, str]]:
    """Name -> text of the extension's presets and of the user's, who win, for the reading of a text within the context.

    What is wrong with the files stops no text that can be read without them; an error that leaves the context is told it.
    """
    from ..trilora_ops.block_presets import BUILT_IN

    files = preset_files()
    texts = {**BUILT_IN, **{preset.name: preset.text for preset in files.presets}}
    try:
        yield {name: text for name, text in texts.items() if name not in files.unclear}
    except TriLoRAError as error:
        if not files.faults:
            raise
        raise TriLoRAError("; ".join([str(error).rstrip("."), *files.faults[:_SHOWN]])) from None


def preset_files() -> PresetFiles:
    """All files of the user's folder. What is wrong with them is in the log, too, once for each change."""
    folder = os.path.join(folder_paths.get_user_directory(), _USER, *_FOLDER)
    names = sorted(name for name in os.listdir(folder) if name.endswith(".txt")) if os.path.isdir(folder) else []
    found: dict[str, Preset] = {}
    faults, unclear = [], set()
    if len(names) > _MOST_FILES:
        faults.append(f"presets: the folder has {len(names):,} files, of which the first {_MOST_FILES} are read")
    for name in names[:_MOST_FILES]:
        file = _read(os.path.join(folder, name), name)
        faults += file.faults
        unclear |= file.unclear
        clashes = []
        for preset in file.presets:
            other = found.setdefault(preset.name, preset)
            if other.text != preset.text:
                unclear.add(preset.name)
                clashes.append(f"presets/{name} line {preset.line}: {quoted(preset.name)} has another meaning in presets/{other.file} line {other.line}; rename one of them")
        faults += clashes[:_SHOWN]
        if len(clashes) > _SHOWN:
            faults.append(f"presets/{name}: {len(clashes) - _SHOWN} more names have another meaning in other files")
    _tell(tuple(faults))
    return PresetFiles(tuple(preset for preset in found.values() if preset.name not in unclear), tuple(faults), frozenset(unclear))


@functools.lru_cache(maxsize=1)
def _tell(faults: tuple[str, ...]) -> None:
    if faults:
        log.warning("block weights: not all of your presets can be used: %s", "; ".join(faults[:_SHOWN]))


def _read(path: str, name: str) -> PresetFiles:
    if not os.path.isfile(path):  # a pipe would be waited for
        return PresetFiles((), (f"presets/{name}: not a file",))
    try:
        with open(path, "rb") as opened:
            return _presets(opened.read(FILE + 1), name)
    except OSError as error:
        return PresetFiles((), (f"presets/{name}: not readable ({error})",))


@functools.lru_cache(maxsize=64)
def _presets(content: bytes, name: str) -> PresetFiles:
    from ..trilora_ops.block_preset_files import file_lines, preset_lines

    try:
        if len(content) > FILE:
            raise TriLoRAError(f"larger than {FILE // 2**20} MiB")
        return PresetFiles(tuple(Preset(preset.name, preset.text, name, preset.line) for preset in preset_lines(content.decode("utf-8-sig"))))
    except UnicodeDecodeError as error:
        fault = f"not readable as UTF-8 text ({error})"
    except TriLoRAError as error:
        fault = str(error).removeprefix("presets: ")
    lines = file_lines(content.decode("utf-8-sig", "replace"))
    words = {word.strip() for line in lines for word in (line.partition(":")[0], *line.split("\t")[1:2])}
    return PresetFiles((), (f"presets/{name}: {fault}; correct or delete the file in {'/'.join(('user', _USER, *_FOLDER))}",), frozenset(words))
