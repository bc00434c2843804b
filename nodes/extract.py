"""Extract Adapter: what one model has more than another, as an adapter of any method."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..trilora_ops.targets import TARGETS
from . import compat
from .notices import collected
from .types import LoraModel, Method


class ExtractAdapter(io.ComfyNode):
    """Truncated SVD of the difference of two models, or a fit of a transform and a residual."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRAExtractAdapter",
            display_name="Extract Adapter",
            category="TriLoRA/tools",
            description="Turns the difference of two models, or everything that was applied to one, into an adapter file of the method you choose.",
            search_aliases=["extract lora", "convert lora", "merge loras", "svd", "model difference"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model_tuned", tooltip="A fine-tuned checkpoint, or a model with adapters of any kind on it."),
                io.Model.Input("model_base", tooltip="What the adapter will be applied to: the checkpoint it came from, without adapters."),
                Method.Input("method", tooltip="What comes out. TriLoRA and LoRA: the best file of that rank. Transforms are fitted, which takes longer."),
                io.Combo.Input("target", options=list(TARGETS), default="attention",
                               tooltip="Which layers to look at. Differences elsewhere are not extracted; the report counts them. "
                                       + " ".join(f"{name}: {what}." for name, what in TARGETS.items())),
                io.Float.Input("energy", default=0.0, min=0.0, max=1.0, step=0.01,
                               tooltip="0 = the method's rank everywhere. Above 0: each layer gets the smallest rank that holds this share of its "
                                       "difference, at most the method's rank."),
            ],
            outputs=[
                LoraModel.Output(display_name="adapter", tooltip="For Save Adapter, Inspect Adapter or any node that takes a LORA_MODEL."),
                io.String.Output(display_name="report", tooltip="How large the difference is, and how much of it the adapter misses."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model_tuned, model_base, method, target, energy) -> io.NodeOutput:
        from .extraction import extract

        # a fit needs tensors that autograd knows
        with collected(), torch.inference_mode(False), torch.no_grad():
            state, report = extract(model_tuned, model_base, method, target, energy, cls.hidden.unique_id)
        compat.show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(state, report, ui=ui.PreviewText(report))
