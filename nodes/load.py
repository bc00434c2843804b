"""TriLoRA Loader: any LoRA-family file onto a model, with or without a text encoder."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io

from ..trilora_ops.checkpoint import AdapterState, read_adapter
from ..trilora_ops.peft_config import BESIDE
from . import compat
from .comfy_patches import patches_from_state


class TriLoRALoader(io.ComfyNode):
    """Reads a file once, checks all of it, then patches the model (and the text encoder, where one is connected)."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRALoader",
            display_name="TriLoRA Loader",
            category="TriLoRA/load",
            description="Applies an adapter file to a model: TriLoRA, LoRA, LoCon and every other kind ComfyUI knows. CLIP is optional.",
            search_aliases=["load lora", "lora loader", "svd lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model to adapt. It is not changed; the output is a patched copy."),
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list("loras"),
                               tooltip="A .safetensors file from models/loras or from output/loras, where Save Adapter writes."),
                io.Float.Input("strength_model", default=1.0, min=-20.0, max=20.0, step=0.05,
                               tooltip="0 = the model as it was, 1 = as trained. Negative values push away from the adapter."),
                io.Int.Input("keep_rank", default=0, min=0, max=1024,
                             tooltip="Keep only the strongest directions of every layer: 0 keeps all, 8 the best approximation of "
                                     "rank 8. Works on every LoRA; files saved by TriLoRA need no computation for it."),
                io.Clip.Input("clip", optional=True, tooltip="Optional: a text encoder for files that adapt it."),
                io.Float.Input("strength_clip", default=1.0, min=-20.0, max=20.0, step=0.05, optional=True,
                               tooltip="Strength on the text encoder; unused without CLIP."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The adapted model."),
                io.Clip.Output(display_name="CLIP", tooltip="The adapted text encoder; empty if none is connected."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name, **others):
        """Run again when the file itself has changed."""
        return (lora_name, file_stamp(lora_name))

    @classmethod
    def execute(cls, model, lora_name, strength_model, keep_rank, clip=None, strength_clip=1.0) -> io.NodeOutput:
        return io.NodeOutput(*apply_state(read_file(lora_name), model, clip, lora_name, strength_model, strength_clip, keep_rank))


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
    return read_adapter(folder_paths.get_full_path_or_raise("loras", lora_name))


def apply_state(state: AdapterState, model, clip, name: str, strength_model: float, strength_clip: float, keep: int = 0):
    """(model, clip) patched with an adapter; both are clones, clip stays None where it was.

    Raises TriLoRAError before anything is patched if the adapter does not fit.
    """
    patches = patches_from_state(state, model, clip, name, keep)
    model = model.clone()
    if strength_model:
        model.add_patches(patches, strength_model)
    if clip is not None:
        clip = clip.clone()
        if strength_clip:
            clip.add_patches(patches, strength_clip)
    return model, clip
