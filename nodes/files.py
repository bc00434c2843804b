"""Adapters as files in the host's folders, and as what travels between nodes."""

from __future__ import annotations

import itertools
import logging
import os

import folder_paths
import torch

from ..trilora_ops.atomic_files import NameTaken, unwritable
from ..trilora_ops.block_selectors import quoted
from ..trilora_ops.checkpoint import AdapterState, canonical_state, peft_state, read_adapter, write_adapter
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.file_names import ENDING, good_file_name
from ..trilora_ops.peft_config import BESIDE
from . import compat
from .matching import converted
from .notices import notice
from .seen import Seen

log = logging.getLogger("trilora")


def file_stamp(lora_name: str | None) -> tuple[int, ...] | None:
    """Times of change and sizes of a LoRA file and of PEFT's configuration beside it; None where there is no file, as for
    a name that comes over a link."""
    path = lora_name and folder_paths.get_full_path("loras", lora_name)
    if not path:
        return None
    beside = BESIDE.get(os.path.basename(path))
    paths = [path, *([os.path.join(os.path.dirname(path), beside)] if beside else [])]
    return tuple(n for p in paths if os.path.exists(p) for n in (os.stat(p).st_mtime_ns, os.stat(p).st_size))


_seen = Seen(file_stamp)


def files_changed() -> int:
    """Another number when a file that was read has changed: what a link brings in has no name before a run."""
    return _seen.changes()


def read_file(lora_name: str) -> AdapterState:
    """The adapter of this name in the host's LoRA folders, under the names that the host gives it (`matching.converted`).

    What `read_adapter` notes of it becomes a notice. Raises TriLoRAError where there is none, and what `read_adapter` raises.
    """
    if not isinstance(lora_name, str) or not lora_name:
        raise TriLoRAError("lora_name: no file is chosen; choose one from the list, or connect lora_name of Save Adapter")
    path = folder_paths.get_full_path("loras", lora_name)
    if path is None:
        raise TriLoRAError(f"lora_name={quoted(lora_name)}: there is no such file in ComfyUI's LoRA folders; choose one from the list")
    _seen.reads(lora_name)
    state = read_adapter(path)
    for note in state.notes:
        notice(f"{lora_name}: {note}")
    try:
        return converted(state)
    except TriLoRAError as error:
        raise TriLoRAError(f"{os.path.basename(lora_name)}: {error}") from None


def as_state(adapter) -> AdapterState:
    """A LORA_MODEL of any node as ours; core's has no metadata. Raises TriLoRAError for one without tensors."""
    if not adapter:
        raise TriLoRAError("adapter: holds no tensors; connect the output of Train Adapter")
    # other trainers' may be parameters, or lie on the GPU
    return converted(AdapterState({key: tensor.detach().cpu() for key, tensor in adapter.items()}, getattr(adapter, "metadata", None)))


def save_state(state: AdapterState, name: str, dtype: torch.dtype, keys: str = "kohya") -> str:
    """`write_state`, of which the page is told, so that its lists have the file."""
    path = write_state(state, name, dtype, keys)
    announce_saved(path)
    return path


def announce_saved(path: str) -> None:
    """Tell the page of a new file."""
    compat.announce("trilora.saved", {"file": listed_name(path)})


def write_state(state: AdapterState, name: str, dtype: torch.dtype, keys: str = "kohya") -> str:
    """Write an adapter under the output folder's loras/; returns the path.

    keys: "peft" gives the tensors PEFT's endings, every other style kohya's; the layers' names stay. Low-rank layers are
    written in canonical form. The file's name below its folder is one that no folder of LoRA files has, so that it leads to
    this file. Raises TriLoRAError for a name that leads elsewhere or values the dtype cannot hold; then nothing is written.
    """
    prefix = _prefix(name)
    with torch.inference_mode(False):
        state = peft_state(state) if keys == "peft" else canonical_state(state)
    path, stem = _free_path(prefix)
    title = {"modelspec.title": stem, "ss_output_name": stem} if state.metadata else {}
    state = AdapterState(state, {**state.metadata, **title})
    while True:
        try:
            path = str(write_adapter(path, state, dtype))
            break
        except NameTaken:  # by another writer, since the names were read
            path, _ = _free_path(prefix)
    log.info("saved %s", path)
    return path


def listed_name(path: str) -> str:
    """The name under which loaders list a file that `save_state` wrote."""
    return os.path.relpath(path, _root())


def _root() -> str:
    return os.path.abspath(os.path.join(folder_paths.get_output_directory(), "loras"))


def _prefix(name: str) -> str:
    """Where the files of this name go, below output/loras. Raises TriLoRAError for a name that leads elsewhere."""
    root = _root()
    if not isinstance(name, str):
        raise TriLoRAError("name: must be a text, the file's name; type one, or connect a text")
    path = os.path.abspath(os.path.join(root, name.replace("\0", "_").strip()))  # some Pythons end a path at a NUL
    if not path.startswith(root + os.sep):  # the folder itself is not a file name either
        raise TriLoRAError(f"name={quoted(name)}: must be a file name, which may have subfolders inside output/loras; remove '..' and leading slashes")
    given = os.path.relpath(path, root).split(os.sep)
    good = good_file_name(given)
    if good != [*given[:-1], given[-1].removesuffix(ENDING)]:
        notice(f"name: saved as {'/'.join(good)}, because not every system takes the name as it was given")
    return os.path.join(*good)


def _free_path(prefix: str) -> tuple[str, str]:
    """(path, its name without number and ending) of the first number that no LoRA folder has a file for."""
    root = _root()
    folder = os.path.dirname(prefix)
    folder = "" if "%" in folder else folder  # ComfyUI fills in the date
    # where a link leads, because newer versions refuse a link to another disk
    real = os.path.realpath(os.path.join(root, folder))
    try:
        found, stem, counter, _, _ = folder_paths.get_save_image_path(os.path.relpath(prefix, folder or "."), real)
    except OSError as error:
        raise unwritable(os.path.join(root, prefix), error) from error
    folder = os.path.normpath(os.path.join(root, folder, os.path.relpath(found, real)))
    for number in itertools.count(max(counter, 1)):
        path = os.path.join(folder, f"{stem}_{number:05}_{ENDING}")
        places = [path, *(os.path.join(place, listed_name(path)) for place in folder_paths.get_folder_paths("loras"))]
        if not any(map(os.path.lexists, places)):
            return path, stem
