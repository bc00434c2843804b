"""Save Adapter: an adapter as a file, under the names that the tools of one world know."""

from __future__ import annotations

import os

import torch
from comfy_api.latest import io, ui

from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.naming import STYLES
from . import compat
from .notices import collected
from .types import LoraModel

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class SaveAdapter(io.ComfyNode):
    """Writes to the output folder's loras/, where the loaders of both hosts look."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRASaveAdapter",
            display_name="Save Adapter",
            category="TriLoRA/train",
            description="Writes the adapter to output/loras. Without a transform it is an ordinary LoRA file in SVD form, readable with "
                        "or without this extension; with one, only ComfyUI with this extension can use it.",
            search_aliases=["save lora", "export lora"],
            is_output_node=True,
            inputs=[
                LoraModel.Input("adapter", tooltip="From Train Adapter, or any LORA_MODEL."),
                io.String.Input("name", default="my_adapter", tooltip="File name without ending; a number is added, nothing is overwritten."),
                io.Combo.Input("dtype", options=list(DTYPES), default="fp16", tooltip="fp16 is what people share; fp32 rounds nothing and is twice as large."),
                io.Combo.Input("keys", options=list(STYLES), default="kohya", optional=True,
                               tooltip="Spelling of the layers' names: kohya for ComfyUI, A1111, Forge and most other tools; peft for diffusers and "
                                       "PEFT; generic as ComfyUI calls its own weights. peft and generic need MODEL."),
                io.Model.Input("model", optional=True, tooltip="The model the adapter is for. With it, all names are brought to one spelling; "
                                                               "without it they stay as they come."),
                io.Clip.Input("clip", optional=True, tooltip="Needed beside MODEL for an adapter that has layers for the text encoder."),
            ],
            # both: for our loaders' list of files, and as text
            outputs=[io.Custom("STRING,COMBO").Output(display_name="lora_name",
                                                      tooltip="The file's name as loaders list it; connect it to lora_name of TriLoRA Loader or Adapter Stack to apply it at once.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, adapter, name, dtype, keys="kohya", model=None, clip=None) -> io.NodeOutput:
        from .files import as_state, listed_name, save_state

        state = as_state(adapter)
        if model is None and keys != "kohya":
            raise TriLoRAError(f"keys={keys}: names can only be translated with the model they are for; connect MODEL, or choose kohya to keep them")
        with collected() as said:
            if model is not None:
                from .names import convert_names

                state = convert_names(state, model, clip, keys)
            path = save_state(state, name, DTYPES[dtype], keys)
        text = "\n".join([path, f"({os.path.getsize(path) / 2**20:.1f} MB, {dtype})", *said])
        compat.show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(listed_name(path), ui=ui.PreviewText(text))
