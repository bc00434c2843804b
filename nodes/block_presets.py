"""Block weights by name: those of the extension, and those in text files in the host's user folder.

Every `.txt` file in `user/default/trilora/presets` counts; `trilora_ops.block_preset_files` says what its lines may be. The
files are read at each call, so that a new or changed one counts at once.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import folder_paths

from ..trilora_ops.errors import TriLoRAError

_USER = "default"  # the host's only user, unless it was started for several
_FOLDER = ("trilora", "presets")


@dataclass(frozen=True)
class Preset:
    """A line of a preset file; file and line say where it stands, line from 1."""

    name: str
    text: str
    file: str
    line: int


def user_presets() -> dict[str, str]:
    """Name -> text of the extension's presets and of the user's, who win. Raises what `preset_files` raises."""
    from ..trilora_ops.block_presets import BUILT_IN

    return {**BUILT_IN, **{preset.name: preset.text for preset in preset_files()}}


def preset_files() -> list[Preset]:
    """What the user's files hold, in the order of their names.

    Raises TriLoRAError with file and line for a line that is no preset, and for a name that has two meanings.
    """
    folder = os.path.join(folder_paths.get_user_directory(), _USER, *_FOLDER)
    files = sorted(name for name in os.listdir(folder) if name.endswith(".txt")) if os.path.isdir(folder) else []
    found: dict[str, Preset] = {}
    for file in files:
        for preset in _presets(_content(os.path.join(folder, file), file), file):
            other = found.setdefault(preset.name, preset)
            if other.text != preset.text:
                raise TriLoRAError(f"presets/{file} line {preset.line}: {preset.name!r} has another meaning in presets/{other.file} line {other.line}; "
                                   "rename one of them")
    return list(found.values())


def _content(path: str, file: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as opened:
            return opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise TriLoRAError(f"presets/{file}: not readable as UTF-8 text ({error})") from None


@functools.lru_cache(maxsize=64)
def _presets(content: str, file: str) -> tuple[Preset, ...]:
    from ..trilora_ops.block_preset_files import preset_lines

    try:
        return tuple(Preset(preset.name, preset.text, file, preset.line) for preset in preset_lines(content))
    except TriLoRAError as error:
        raise TriLoRAError(f"presets/{file}: {str(error).removeprefix('presets: ')}; correct or delete the file in {'/'.join(('user', _USER, *_FOLDER))}") from None
