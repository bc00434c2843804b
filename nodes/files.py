"""Adapters as files in the host's folders, and as what travels between nodes."""

from __future__ import annotations

import logging
import os

import folder_paths
import torch

from ..trilora_ops.checkpoint import AdapterState, canonical_state, peft_state, read_adapter, write_adapter
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.peft_config import BESIDE
from .notices import notice

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


def read_file(lora_name: str) -> AdapterState:
    """The adapter of this name in the host's LoRA folders. Raises FileNotFoundError or what `read_adapter` raises."""
    state = read_adapter(folder_paths.get_full_path_or_raise("loras", lora_name))
    for note in state.notes:
        notice(f"{lora_name}: {note}")
    return state


def as_state(adapter) -> AdapterState:
    """A LORA_MODEL of any node as ours; core's has no metadata. Raises TriLoRAError for one without tensors."""
    if not adapter:
        raise TriLoRAError("adapter: holds no tensors; connect the output of Train Adapter")
    # other trainers' may be parameters, or lie on the GPU
    return AdapterState({key: tensor.detach().cpu() for key, tensor in adapter.items()}, getattr(adapter, "metadata", None))


def save_state(state: AdapterState, name: str, dtype: torch.dtype, keys: str = "kohya") -> str:
    """Write an adapter under the output folder's loras/; returns the path.

    keys: "peft" gives the tensors PEFT's endings, every other style kohya's; the layers' names stay. Low-rank layers are
    written in canonical form. Raises TriLoRAError for a name that leads elsewhere or values the dtype cannot hold; then
    nothing is written.
    """
    root = os.path.abspath(os.path.join(folder_paths.get_output_directory(), "loras"))
    path = os.path.abspath(os.path.join(root, name.strip()))
    if not path.startswith(root + os.sep):  # the folder itself is not a file name either
        raise TriLoRAError(f"name={name!r}: must be a file name, which may have subfolders inside output/loras; remove '..' and leading slashes")
    prefix = os.path.join("loras", os.path.relpath(path, root))
    with torch.inference_mode(False):
        state = peft_state(state) if keys == "peft" else canonical_state(state)
    folder, stem, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    title = {"modelspec.title": stem, "ss_output_name": stem} if state.metadata else {}
    path = write_adapter(os.path.join(folder, f"{stem}_{counter:05}_.safetensors"), AdapterState(state, {**state.metadata, **title}), dtype)
    log.info("saved %s", path)
    return str(path)
