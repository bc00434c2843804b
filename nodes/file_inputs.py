"""What the nodes that take an adapter file have in common: their inputs, and what makes them run again."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from . import compat
from .shown_text import without_markup

STRENGTH_MODEL = "0 = the model as it was, 1 = as trained, and a straight line through both, for every kind of file."
BLOCK_WEIGHTS = ("A strength for each block, as text: default=1, IN04-IN08=0.5, OUT.cross=0, TE1=0.8. It multiplies the strengths of this node; "
                 "empty = 1 everywhere. Vectors and preset names of other tools are read too. Type it, or connect Block Weights.")


def lora_files() -> list[str]:
    """The LoRA files that the host lists."""
    return without_markup(folder_paths.get_filename_list("loras"))


def lora_name_input() -> io.Input:
    return io.Combo.Input("lora_name", options=lora_files(),
                          tooltip="A .safetensors file from models/loras or from output/loras, where Save Adapter writes.")


def strength_input(name: str, tooltip: str, **options) -> io.Input:
    return io.Float.Input(name, default=1.0, min=-20.0, max=20.0, step=0.05, tooltip=tooltip, **options)


def keep_rank_input() -> io.Input:
    return compat.advanced(io.Int.Input("keep_rank", default=0, min=0, max=1024,
                                        tooltip="Keep only the strongest directions of every low-rank layer: 0 keeps all, 8 the best approximation of rank 8."))


def fingerprint(lora_name: str | None, block_weights: str | None = "") -> tuple:
    """Another value when the file itself has changed, or a preset that the block weights name.

    None is what comes over a link; then a change of any file that was read counts.
    """
    from .block_strengths import preset_stamp
    from .files import file_stamp, files_changed

    file = files_changed() if lora_name is None else file_stamp(lora_name)
    return (lora_name, file, preset_stamp(block_weights))
