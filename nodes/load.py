"""TriLoRA Loader: any LoRA-family file onto a model, with or without a text encoder."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from . import compat

BLOCK_WEIGHTS = ("A strength for each block, as text: default=1, IN04-IN08=0.5, OUT.cross=0, TE1=0.8. It multiplies the strengths of this node; "
                 "empty = 1 everywhere. Vectors and preset names of other tools are read too. Type it, or connect Block Weights.")


class TriLoRALoader(io.ComfyNode):
    """Reads a file once, checks all of it, then patches the model (and the text encoder, where one is connected)."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRALoader",
            display_name="TriLoRA Loader",
            category="TriLoRA/load",
            description="Applies an adapter file to a model: TriLoRA, LoRA, LoCon and every other kind ComfyUI knows, whole or by blocks. CLIP is optional.",
            search_aliases=["load lora", "lora loader", "svd lora", "lora block weight", "lbw"],
            inputs=[
                io.Model.Input("model", tooltip="The model to adapt. It is not changed; the output is a patched copy."),
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list("loras"),
                               tooltip="A .safetensors file from models/loras or from output/loras, where Save Adapter writes."),
                io.Float.Input("strength_model", default=1.0, min=-20.0, max=20.0, step=0.05,
                               tooltip="0 = the model as it was, 1 = as trained, and a straight line through both, for every kind of file. "
                                       "Negative values push away from the adapter."),
                io.Int.Input("keep_rank", default=0, min=0, max=1024,
                             tooltip="Keep only the strongest directions of every layer: 0 keeps all, 8 the best approximation of "
                                     "rank 8. Works on every LoRA; files saved by TriLoRA need no computation for it."),
                io.Clip.Input("clip", optional=True, tooltip="Optional: a text encoder for files that adapt it."),
                io.Float.Input("strength_clip", default=1.0, min=-20.0, max=20.0, step=0.05, optional=True,
                               tooltip="Strength on the text encoder; unused without CLIP."),
                io.String.Input("block_weights", default="", optional=True, tooltip=BLOCK_WEIGHTS),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The adapted model."),
                io.Clip.Output(display_name="CLIP", tooltip="The adapted text encoder; empty if none is connected."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name, block_weights="", **others):
        """Run again when the file itself has changed, or a preset that the block weights name."""
        from .block_strengths import presets_in
        from .files import file_stamp

        return (lora_name, file_stamp(lora_name), presets_in(block_weights))

    @classmethod
    def execute(cls, model, lora_name, strength_model, keep_rank, clip=None, strength_clip=1.0, block_weights="") -> io.NodeOutput:
        from .applying import apply_state
        from .files import read_file

        return io.NodeOutput(*apply_state(read_file(lora_name), model, clip, lora_name, strength_model, strength_clip, keep_rank, block_weights))
