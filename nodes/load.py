"""TriLoRA Loader: any LoRA-family file onto a model, with or without a text encoder."""

from __future__ import annotations

from comfy_api.latest import io

from . import compat
from .file_inputs import BLOCK_WEIGHTS, STRENGTH_MODEL, fingerprint, lora_name_input, strength_input
from .types import StackEntry


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
                lora_name_input(),
                strength_input("strength_model", STRENGTH_MODEL + " Negative values push away from the adapter."),
                io.Int.Input("keep_rank", default=0, min=0, max=1024,
                             tooltip="Keep only the strongest directions of every layer: 0 keeps all, 8 the best approximation of "
                                     "rank 8. Works on every LoRA; files saved by TriLoRA need no computation for it."),
                io.Clip.Input("clip", optional=True, tooltip="Optional: a text encoder for files that adapt it."),
                strength_input("strength_clip", "Strength on the text encoder; unused without CLIP.", optional=True),
                io.String.Input("block_weights", default="", optional=True, tooltip=BLOCK_WEIGHTS),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The adapted model."),
                io.Clip.Output(display_name="CLIP", tooltip="The adapted text encoder; empty if none is connected."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name, block_weights="", **others):
        """Run again when the file itself has changed, or a preset that the block weights name."""
        return fingerprint(lora_name, block_weights)

    @classmethod
    def execute(cls, model, lora_name, strength_model, keep_rank, clip=None, strength_clip=1.0, block_weights="") -> io.NodeOutput:
        from .applying import apply_state
        from .files import read_file
        from .notices import shown_on

        entry = StackEntry(lora_name, strength_model, strength_clip, keep_rank, block_weights)
        with shown_on(cls.hidden.unique_id):
            return io.NodeOutput(*apply_state(read_file(lora_name), entry, model, clip))
