"""Bake Adapter: strengths, block weights and whole stacks written into one ordinary file."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..trilora_ops.errors import TriLoRAError
from . import compat
from .file_inputs import BLOCK_WEIGHTS, fingerprint, strength_input
from .types import LoraModel, Stack, StackEntry


class BakeAdapter(io.ComfyNode):
    """What an adapter or a stack does on a model, as one adapter that does the same at strength 1, exactly."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRABakeAdapter",
            display_name="Bake Adapter",
            category="TriLoRA/tools",
            description="Writes strengths, block weights and whole stacks into one adapter, exactly: its file does the same at strength 1 in every loader.",
            search_aliases=["save block weights", "lora block weight save", "bake lora", "save lora stack"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model the adapters are for: it tells their blocks and the names of their layers. It is not changed."),
                LoraModel.Input("adapter", optional=True, tooltip="From Load Adapter, Train Adapter, Resize Adapter or another tool. The next three inputs are its own."),
                strength_input("strength_model", "What 1 of the new file stands for on the model: 0.7 writes an adapter that is 0.7 as strong.", optional=True),
                strength_input("strength_clip", "The same on the text encoder. 0 leaves its layers out.", optional=True),
                io.String.Input("block_weights", default="", optional=True, tooltip=BLOCK_WEIGHTS),
                Stack.Input("stack", optional=True, tooltip="Files from Adapter Stack, each with its own strengths, block weights and keep_rank, beside or instead of adapter."),
                io.Clip.Input("clip", optional=True, tooltip="Needed for adapters that have layers for the text encoder."),
            ],
            outputs=[
                LoraModel.Output(display_name="adapter", tooltip="For Save Adapter: the file does at strength 1 what was baked."),
                io.String.Output(display_name="report", tooltip="Layers by kind, how many are sums, and what was left out."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, block_weights="", **others):
        """Run again when a preset that the block weights name has changed, or a file that a stack named."""
        return fingerprint(None, block_weights)

    @classmethod
    def execute(cls, model, adapter=None, strength_model=1.0, strength_clip=1.0, block_weights="", stack=None, clip=None) -> io.NodeOutput:
        from .baking import bake_on, of_adapter, of_file
        from .notices import collected

        if adapter is None and not stack:
            raise TriLoRAError("adapter and stack: nothing is connected; connect an adapter from Load Adapter, or an Adapter Stack")
        own = {"strength_model": strength_model != 1, "strength_clip": strength_clip != 1, "block_weights": bool((block_weights or "").strip())}
        if adapter is None and any(own.values()):
            raise TriLoRAError(f"{', '.join(name for name in own if own[name])}: only for adapter, which is not connected; set them in Adapter Stack, for each file")
        with torch.inference_mode(False), collected() as said:
            given = [] if adapter is None else [of_adapter(adapter, StackEntry("adapter", strength_model, strength_clip, block_weights=block_weights))]
            given += [of_file(entry) for entry in stack or () if entry.strength_model or entry.strength_clip]
            baked, text = bake_on(model, clip, given)
        text = "\n".join([text, *said])
        compat.show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(baked, text, ui=ui.PreviewText(text))
