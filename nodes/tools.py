"""Load Adapter, Merge Adapters, Resize Adapter: tools on adapters, before any model is patched."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..trilora_ops.errors import TriLoRAError
from . import compat
from .file_inputs import fingerprint, lora_files
from .types import LoraModel


def _rank_input(optional: bool = False) -> io.Input:
    return io.Int.Input("rank", default=0, min=0, max=4096, optional=optional, tooltip="Directions kept of every layer, the strongest first; 0 keeps all.")


def _energy_input(optional: bool = False) -> io.Input:
    return io.Float.Input("energy", default=0.0, min=0.0, max=1.0, step=0.01, round=0.0001, optional=optional,
                          tooltip="Keep as few directions as hold this share of each layer's energy: 0.9 usually makes a far smaller file that looks "
                                  "the same. 0 = no such rule. With rank, the smaller counts.")


class LoadAdapter(io.ComfyNode):
    """A file as an adapter for the tools, not applied to anything."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRALoadAdapter",
            display_name="Load Adapter",
            category="TriLoRA/tools",
            description="Reads an adapter file for merging, resizing, inspecting or saving under other names; no model is needed.",
            search_aliases=["load lora model", "open lora"],
            inputs=[io.Combo.Input("lora_name", options=lora_files(),
                                   tooltip="A .safetensors file from models/loras or output/loras.")],
            outputs=[
                LoraModel.Output(display_name="adapter", tooltip="For the tools, Save Adapter, or any node that takes a LORA_MODEL."),
                io.String.Output(display_name="about", tooltip="What the file says about itself: trigger, base model, method and rank, then its layers."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name, **others):
        """Run again when the file itself has changed."""
        return fingerprint(lora_name)

    @classmethod
    def execute(cls, lora_name) -> io.NodeOutput:
        from ..trilora_ops.checkpoint import split_layers
        from ..trilora_ops.metadata import summary
        from .files import read_file

        with torch.inference_mode(False):
            state = read_file(lora_name)
            layers, rest = split_layers(state)
        about = f"{summary(state.metadata)}\nlayers: {len(layers)} low-rank" + (f", and {len(rest)} tensors of other kinds" if rest else "")
        compat.show_text(about, cls.hidden.unique_id)
        return io.NodeOutput(state, about)


class MergeAdapters(io.ComfyNode):
    """Exact weighted sum of low-rank adapters, as one adapter."""

    @classmethod
    def define_schema(cls):
        def weight(letter: str) -> io.Input:
            return io.Float.Input(f"weight_{letter}", default=1.0, min=-10.0, max=10.0, step=0.05, optional=letter in "cd",
                                  tooltip="Share of this adapter in the sum, as a strength in a loader; negative subtracts it.")

        return compat.Schema(
            node_id="TriLoRAMergeAdapters",
            display_name="Merge Adapters",
            category="TriLoRA/tools",
            description="Adds LoRA files into one that has the same effect as all of them together, exactly; rank and energy make it smaller.",
            search_aliases=["merge lora", "combine lora", "add lora"],
            is_output_node=True,
            inputs=[
                LoraModel.Input("adapter_a", tooltip="A LoRA or LoCon from Load Adapter, Train Adapter or another tool."),
                weight("a"),
                LoraModel.Input("adapter_b", tooltip="The second one; it may have other layers and ranks."),
                weight("b"),
                LoraModel.Input("adapter_c", optional=True, tooltip="A third, if you like."),
                weight("c"),
                LoraModel.Input("adapter_d", optional=True, tooltip="A fourth, if you like."),
                weight("d"),
                _rank_input(optional=True),
                _energy_input(optional=True),
                io.Model.Input("model", optional=True, tooltip="The model they are for: needed where their files spell layers differently (kohya, diffusers)."),
                io.Clip.Input("clip", optional=True, tooltip="Beside MODEL, for adapters that have layers for the text encoder."),
            ],
            outputs=[
                LoraModel.Output(display_name="adapter", tooltip="The sum, for Save Adapter or the tools."),
                io.String.Output(display_name="report", tooltip="Layers, ranks and what was lost by making it smaller."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, adapter_a, weight_a, adapter_b, weight_b, adapter_c=None, weight_c=1.0, adapter_d=None, weight_d=1.0,
                rank=0, energy=0.0, model=None, clip=None) -> io.NodeOutput:
        from ..trilora_ops.resize import merge_adapters
        from .files import as_state
        from .names import convert_names
        from .notices import collected

        given = {"a": (adapter_a, weight_a), "b": (adapter_b, weight_b), "c": (adapter_c, weight_c), "d": (adapter_d, weight_d)}
        parts = []
        with torch.inference_mode(False), collected() as said:
            for letter, (adapter, weight) in given.items():
                if adapter is None:
                    continue
                try:
                    state = as_state(adapter)
                except TriLoRAError as error:
                    raise TriLoRAError(f"adapter_{letter}: {error}") from None
                parts.append((state if model is None else convert_names(state, model, clip, "kohya", f"adapter_{letter}"), weight))
            merged, report = merge_adapters(parts, rank, energy, one_name=model is not None)
        return _report(cls, merged, "\n".join([f"{len(parts)} adapters: {report.text()}", *said]))


class ResizeAdapter(io.ComfyNode):
    """Fewer directions, or another balance between strong and weak ones."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRAResizeAdapter",
            display_name="Resize Adapter",
            category="TriLoRA/tools",
            description="Makes a LoRA smaller with the least possible error, or changes the balance of its strong and weak directions.",
            search_aliases=["resize lora", "shrink lora", "reduce rank", "spectrum"],
            is_output_node=True,
            inputs=[
                LoraModel.Input("adapter", tooltip="From Load Adapter, Train Adapter or another tool."),
                _rank_input(),
                _energy_input(),
                io.Float.Input("power", default=1.0, min=0.0, max=4.0, step=0.05,
                               tooltip="1 = as it is; below 1 lifts the weak directions towards the strongest, above 1 lowers them. The strongest stays."),
                io.Float.Input("cap", default=0.0, min=0.0, max=1.0, step=0.01,
                               tooltip="No direction stays stronger than this share of the strongest: 0.5 halves an overtrained one. 0 = no cap."),
                compat.advanced(io.String.Input("gains", default="", tooltip="Factors of each layer's first directions, strongest first: 0, 1, 1.5 takes the "
                                                                             "strongest out and lifts the third. The rest keep 1.")),
            ],
            outputs=[
                LoraModel.Output(display_name="adapter", tooltip="The resized adapter, for Save Adapter or the tools."),
                io.String.Output(display_name="report", tooltip="Ranks before and after, and the error of the layers that changed most."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, adapter, rank, energy, power, cap, gains="") -> io.NodeOutput:
        from ..trilora_ops.resize import read_gains, resize
        from .files import as_state

        factors = read_gains(gains)
        with torch.inference_mode(False):
            resized, report = resize(as_state(adapter), rank, energy, power, cap, factors)
        return _report(cls, resized, report.text())


def _report(cls, adapter, text: str) -> io.NodeOutput:
    compat.show_text(text, cls.hidden.unique_id)
    return io.NodeOutput(adapter, text, ui=ui.PreviewText(text))
