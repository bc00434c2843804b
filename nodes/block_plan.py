"""Block Plan and Plan from Adapter: which blocks are trained, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from . import compat
from .types import LoraModel, Method, Plan

if TYPE_CHECKING:  # imported when a node runs
    from ..trilora_ops.blocks import Blocks

_EXAMPLE = "default=0, IN04-IN08=16, OUT.cross=4"


class BlockPlanNode(io.ComfyNode):
    """Texts, which Train Adapter reads for its model."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRABlockPlan",
            display_name="Block Plan",
            category="TriLoRA/blocks",
            description="Which blocks Train Adapter trains, and with which rank, alpha, learning rate and method. Rank 0 = not trained: "
                        "no parameters, no time, nothing in the file.",
            search_aliases=["block-wise lora", "block dims", "layer training", "b-lora", "train blocks"],
            inputs=[
                io.String.Input("rank", default="", placeholder=_EXAMPLE,
                                tooltip=f"A rank for each block, as text: {_EXAMPLE}. 0 = not trained. What the text does not speak of has the method's rank, and so has "
                                        "1 in a text of zeros and ones: presets, block weights and kohya's lists choose blocks that way. Empty = the method's rank everywhere."),
                io.String.Input("alpha", default="", placeholder="MID=8",
                                tooltip="An alpha for each block, in the same notation; 0 = as the method says. Empty = as the method says everywhere."),
                io.String.Input("learning_rate", default="", placeholder="OUT=0.5",
                                tooltip="A factor of Training Settings' learning rate for each block; 0 = not trained. Empty = 1 everywhere."),
                Method.Input("method", optional=True, tooltip="What this plan's blocks are trained with. Without it the method of Train Adapter."),
                Plan.Input("plan", optional=True, tooltip="Another Block Plan, for the blocks to which this one gives 0: several plans in a chain train "
                                                          "different blocks with different methods."),
            ],
            outputs=[Plan.Output(display_name="plan", tooltip="For Train Adapter, or for the next Block Plan.")],
        )

    @classmethod
    def fingerprint_inputs(cls, rank="", alpha="", learning_rate="", **others):
        """Run again when a preset that a text names has changed."""
        from .block_strengths import preset_stamp

        return [(text, preset_stamp(text)) for text in (rank, alpha, learning_rate)]

    @classmethod
    def execute(cls, rank, alpha, learning_rate, method=None, plan=None) -> io.NodeOutput:
        from ..trilora_ops.block_plan import BlockPlan
        from .block_strengths import read_presets_of

        for text in (rank, alpha, learning_rate):
            read_presets_of(text)
        return io.NodeOutput(BlockPlan(rank, alpha, learning_rate, method, plan))


class PlanFromAdapter(io.ComfyNode):
    """The plan that a file was trained by; of other programs' files the ranks of their layers."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRAPlanFromAdapter",
            display_name="Plan from Adapter",
            category="TriLoRA/blocks",
            description="Reads a Block Plan from an adapter: as it was trained with, or, from files of other programs, the rank of every block.",
            search_aliases=["block dims", "lora ranks", "reuse plan"],
            inputs=[
                LoraModel.Input("adapter", tooltip="From Load Adapter or Train Adapter."),
                io.Model.Input("model", tooltip="The model that it is for, whose blocks the plan names."),
            ],
            outputs=[
                Plan.Output(display_name="plan", tooltip="For Train Adapter, or for a Block Plan that changes some blocks of it."),
                io.String.Output(display_name="text", tooltip="The plan to read, and to copy into Block Plan."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, adapter, model) -> io.NodeOutput:
        from .plan_from_adapter import describe, plan_of

        plan, target = plan_of(adapter, model)
        text = describe(plan, target)
        compat.show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(plan, text)


def blocks_of(model) -> Blocks:
    """The blocks of a host model's denoiser."""
    from ..trilora_ops.blocks import Blocks

    return Blocks.of(f"diffusion_model.{name}" for name, _ in model.diffusion_model.named_parameters(remove_duplicate=False))
