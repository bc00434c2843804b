"""Inspect Adapter: pictures and a text about what an adapter holds."""

from __future__ import annotations

import comfy.model_management
import numpy as np
import torch
from comfy_api.latest import io, ui

from ..trilora_ops.errors import TriLoRAError
from . import compat
from .types import LoraModel


class InspectAdapter(io.ComfyNode):
    """Spectra, energy, effective rank and size of an adapter."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRAInspectAdapter",
            display_name="Inspect Adapter",
            category="TriLoRA/tools",
            description="Draws what an adapter holds: singular values of every layer, share of energy by block, effective rank and size. With a model, "
                        "it says whether the adapter fits.",
            search_aliases=["lora info", "lora metadata", "spectrum", "singular values"],
            is_output_node=True,
            inputs=[
                LoraModel.Input("adapter", tooltip="From Load Adapter, Train Adapter, Extract Adapter or any node that gives a LORA_MODEL."),
                io.Model.Input("model", optional=True, tooltip="With it the report says which layers have a place in this model, and what the others may be."),
                io.Clip.Input("clip", optional=True, tooltip="Beside MODEL, for adapters that have layers for the text encoder."),
            ],
            outputs=[
                io.Image.Output(display_name="pictures", tooltip="One picture of 1600 x 1200 for each subject, as a batch."),
                io.String.Output(display_name="report", tooltip="Method, base, trigger, ranks, size, blocks, strongest layers and kinds of layers; with MODEL, what has a place in it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, adapter, model=None, clip=None) -> io.NodeOutput:
        from ..trilora_ops.inspection import describe_adapter, inspect, picture_title
        from .comfy_patches import Places
        from .files import as_state
        from .inspect_plots import draw

        if model is None and clip is not None:
            raise TriLoRAError("clip: is only used beside MODEL, which is not connected; connect it too")
        with torch.inference_mode(False), torch.no_grad():
            state = as_state(adapter)
            metadata = state.metadata
            layers = inspect(state)
            places = {} if model is None else Places.of(model, clip).match(state, "adapter").diagnosis.report()
            report = describe_adapter(layers, metadata, state, places)
            comfy.model_management.throw_exception_if_processing_interrupted()
            pictures = draw(layers, picture_title(layers, metadata))
            batch = torch.from_numpy(np.stack([np.asarray(picture, dtype=np.float32) / 255.0 for picture in pictures]))
        compat.show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(batch, report, ui=ui.PreviewImage(batch, cls=cls))
