"""Adapter Stack: any number of files of any kind onto a model at once; their order does not matter."""

from __future__ import annotations

from comfy_api.latest import io

from ..trilora_ops.errors import TriLoRAError
from . import compat
from .file_inputs import BLOCK_WEIGHTS, STRENGTH_MODEL, fingerprint, keep_rank_input, lora_name_input, strength_input
from .types import LoraStack, Stack, StackEntry


class AdapterStack(io.ComfyNode):
    """One more file on a stack; nothing is read before the stack is applied."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRAAdapterStack",
            display_name="Adapter Stack",
            category="TriLoRA/load",
            description="Puts a file of any kind on a stack: TriLoRA, transforms, LoRA, LoHa, LoKr, OFT, DoRA ... Chain as many as you like.",
            search_aliases=["lora stack", "multiple loras", "lora stacker", "multi lora", "lora block weight stack"],
            inputs=[
                lora_name_input(),
                strength_input("strength_model", STRENGTH_MODEL),
                strength_input("strength_clip", "Strength on the text encoder; unused where none is connected to Apply Adapter Stack."),
                keep_rank_input(),
                Stack.Input("stack", optional=True, tooltip="The files so far. Leave it empty for the first one."),
                io.String.Input("block_weights", default="", optional=True, tooltip=BLOCK_WEIGHTS),
            ],
            outputs=[Stack.Output(display_name="stack", tooltip="The files so far and this one, for the next Adapter Stack or for Apply Adapter Stack.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, lora_name, block_weights="", **others):
        """Run again, and with it all that depends on it, when the file itself or a preset of the block weights has changed."""
        return fingerprint(lora_name, block_weights)

    @classmethod
    def execute(cls, lora_name, strength_model, strength_clip, keep_rank, stack=None, block_weights="") -> io.NodeOutput:
        return io.NodeOutput((*(stack or ()), StackEntry(lora_name, strength_model, strength_clip, keep_rank, block_weights)))


class ApplyStack(io.ComfyNode):
    """Reads all files of a stack, checks them, then gives every weight one patch that holds them all."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRAApplyStack",
            display_name="Apply Adapter Stack",
            category="TriLoRA/load",
            description="Applies all files of a stack to a model in one pass; their order does not matter. CLIP is optional.",
            search_aliases=["lora stack", "apply lora stack", "multiple loras", "cr apply lora stack"],
            inputs=[
                io.Model.Input("model", tooltip="The model to adapt. It is not changed; the output is a patched copy."),
                Stack.Input("stack", optional=True, tooltip="Files from Adapter Stack."),
                io.Clip.Input("clip", optional=True, tooltip="Optional: a text encoder for files that adapt it."),
                LoraStack.Input("lora_stack", optional=True,
                                tooltip="Files from another extension's LoRA stack node, beside or instead of those of Adapter Stack."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The adapted model."),
                io.Clip.Output(display_name="CLIP", tooltip="The adapted text encoder; empty if none is connected."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        """Run again when a file has changed that a stack of this or another extension named."""
        return fingerprint(None, None)

    @classmethod
    def execute(cls, model, stack=None, clip=None, lora_stack=None) -> io.NodeOutput:
        from .applying import apply_stack
        from .notices import shown_on

        if stack is None and lora_stack is None:
            raise TriLoRAError("stack: nothing is connected; connect an Adapter Stack, or another extension's stack to lora_stack")
        with shown_on(cls.hidden.unique_id):
            return io.NodeOutput(*apply_stack((*(stack or ()), *entries_from(lora_stack or ())), model, clip))


def entries_from(lora_stack) -> tuple[StackEntry, ...]:
    """The entries of a LORA_STACK: (file name, strength on the model, strength on CLIP) each; "None" is a slot that is off."""
    found = []
    for entry in lora_stack:
        if not isinstance(entry, (tuple, list)) or len(entry) != 3:
            raise TriLoRAError(f"lora_stack: an entry is {entry!r}, expected (file name, strength on the model, strength on CLIP)")
        name, strength_model, strength_clip = entry
        if name not in (None, "None"):
            found.append(StackEntry(name, float(strength_model), float(strength_clip)))
    return tuple(found)
