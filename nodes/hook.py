"""Adapter Hook: an adapter on some conditionings only, its blocks each with a strength of their own over the course of sampling."""

from __future__ import annotations

from comfy_api.latest import io

from . import compat
from .file_inputs import BLOCK_WEIGHTS, STRENGTH_MODEL, fingerprint, keep_rank_input, lora_name_input, strength_input


class AdapterHookNode(io.ComfyNode):
    """Reads a file and its schedule; the model that they are for is met when the hooks are used."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRAAdapterHook",
            display_name="Adapter Hook",
            category="TriLoRA/load",
            description="Makes hooks of an adapter file: it then acts on the prompts they are set on, each block with its own strength over the course of sampling.",
            search_aliases=["lora hook", "scheduled lora", "lora schedule", "lora start stop", "regional lora"],
            inputs=[
                lora_name_input(),
                strength_input("strength_model", STRENGTH_MODEL),
                strength_input("strength_clip", "Strength on the text encoder; unused without Set CLIP Hooks."),
                io.String.Input("block_weights", default="", tooltip=BLOCK_WEIGHTS),
                io.String.Input("schedule", default="", multiline=True,
                                tooltip="How strengths change from the start of sampling (0) to its end (1), a line for each kind of block. IN: 1 -> 0 "
                                        "cosine, or MID: 0:1, 0.4:1, 0.6:0, or OUT: start=0.2 stop=5/20. Without 'IN:' it is for all blocks; empty = always 1."),
                compat.advanced(io.Int.Input("switches", default=10, min=1, max=200,
                                             tooltip="How often the weights may change during sampling. Changing them takes time; where a curve rises or falls, "
                                                     "more switches follow it more closely.")),
                keep_rank_input(),
                io.Hooks.Input("prev_hooks", optional=True, tooltip="Other hooks, which the output then holds too."),
            ],
            outputs=[io.Hooks.Output(display_name="HOOKS", tooltip="For Set CLIP Hooks, Cond Set Props, Set Hook Keyframes and whatever else takes hooks.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, lora_name, block_weights="", **others):
        """Run again when the file itself has changed, or a preset that the block weights name."""
        return fingerprint(lora_name, block_weights)

    @classmethod
    def execute(cls, lora_name, strength_model, strength_clip, block_weights, schedule, switches, keep_rank, prev_hooks=None) -> io.NodeOutput:
        import comfy.hooks

        from ..trilora_ops.block_schedule import parse
        from .comfy_hooks import HookedAdapter
        from .files import read_file
        from .notices import shown_on

        with shown_on(cls.hidden.unique_id) as said:
            state = read_file(lora_name)
        adapter = HookedAdapter(state, lora_name, keep_rank, block_weights, parse(schedule), cls.hidden.unique_id, said)
        hooks = adapter.hooks(switches, strength_model, strength_clip)
        return io.NodeOutput((prev_hooks or comfy.hooks.HookGroup()).clone_and_combine(hooks))
