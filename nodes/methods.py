"""Method nodes: what kind of adapter is trained."""

from __future__ import annotations

from comfy_api.latest import io

from ..trilora_ops.presets import PRESETS, build_method, pairs, sizes
from ..trilora_ops.registry import Method as MethodPair
from ..trilora_ops.residuals.lora import LoraConfig
from ..trilora_ops.residuals.trilora import CORES, SIGMA_INITS, TriLoraConfig
from . import compat
from .types import Method

_RANK = "How many directions every layer may learn. More can hold more detail, costs memory and overfits sooner."
_ALPHA = "Scale of the update is alpha / rank. 0 means alpha = rank, a scale of 1."


class TriLoraMethodNode(io.ComfyNode):
    """W' = W0 + s U C Vt."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRAMethodTriLoRA",
            display_name="TriLoRA (method)",
            category="TriLoRA/train",
            description="Three trained factors, U · Σ · Vᵀ, Σ starting from the singular values of the layer's own weight (Feng et al.).",
            inputs=[
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip=_RANK),
                io.Float.Input("alpha", default=0.0, min=0.0, max=4096.0, step=0.5, tooltip=_ALPHA),
                io.Combo.Input("core", options=list(CORES), default="diagonal",
                               tooltip="diagonal: Σ holds singular values. full: a matrix between the outer factors, as in the paper's figure."),
                compat.advanced(io.Combo.Input("sigma_init", options=list(SIGMA_INITS), default="svd_relative",
                                               tooltip="Start of Σ: the weight's singular values divided by the largest, as they are, or ones. "
                                                       "Larger values learn faster at the same learning rate.")),
                compat.advanced(io.Int.Input("rank_out", default=0, min=0, max=1024,
                                             tooltip="Only for a full core: columns of U. 0 = same as rank.")),
                compat.advanced(io.Float.Input("energy", default=0.0, min=0.0, max=1.0, step=0.01,
                                               tooltip="0 = the same rank everywhere. Above 0: each layer gets the rank that holds this share of "
                                                       "its weight's energy, at most the rank above.")),
                compat.advanced(io.Float.Input("orthogonality", default=0.0, min=0.0, max=10.0, step=0.001, round=0.0001,
                                               tooltip="Weight of a penalty that keeps U and V near orthogonal. The paper uses none.")),
            ],
            outputs=[Method.Output(display_name="method", tooltip="For Train Adapter.")],
        )

    @classmethod
    def execute(cls, rank, alpha, core, sigma_init, rank_out, energy, orthogonality) -> io.NodeOutput:
        return io.NodeOutput(MethodPair(TriLoraConfig(rank, alpha, core, rank_out, sigma_init, energy, orthogonality)))


class LoraMethodNode(io.ComfyNode):
    """W' = W0 + s up down."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRAMethodLoRA",
            display_name="LoRA / LoCon (method)",
            category="TriLoRA/train",
            description="Two trained factors, up · down; with convolutions among the targets this is LoCon.",
            inputs=[
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip=_RANK),
                io.Float.Input("alpha", default=0.0, min=0.0, max=4096.0, step=0.5, tooltip=_ALPHA),
            ],
            outputs=[Method.Output(display_name="method", tooltip="For Train Adapter.")],
        )

    @classmethod
    def execute(cls, rank, alpha) -> io.NodeOutput:
        return io.NodeOutput(MethodPair(LoraConfig(rank, alpha)))


class TransformMethodNode(io.ComfyNode):
    """W' = W0 T + R, any pair of the registry."""

    @classmethod
    def define_schema(cls):
        sized = sizes()
        return compat.Schema(
            node_id="TriLoRAMethodTransform",
            display_name="Transform (method)",
            category="TriLoRA/train",
            description="A trained transform T of each layer's weight plus a trained residual R, W' = W·T + R: TLoRA, DoRA-like, OFT-like and "
                        "other pairs. Its files need this extension.",
            search_aliases=["tlora", "dora", "oft", "tensor ring"],
            inputs=[
                io.Combo.Input("pair", options=list(pairs()), default="TLoRA*",
                               tooltip="Transform + residual. " + ", ".join(f"{name}: {t} + {r}" for name, (t, r) in PRESETS.items()) + "."),
                io.Int.Input("transform_size", default=0, min=0, max=1024,
                             tooltip=f"0 = the transform's default. It sets {', '.join(sized['transform'])}. Other transforms ignore it."),
                io.Int.Input("rank", default=0, min=0, max=1024,
                             tooltip=f"0 = the residual's default. It sets {', '.join(sized['residual'])}. Without a residual it is ignored."),
                compat.advanced(io.String.Input("options", default="",
                                                tooltip="Further options of the pair, such as ring_init=paper, alpha=2, factors=4x8x10. "
                                                        "The help page lists them; a wrong name is answered with those that the pair has.")),
            ],
            outputs=[Method.Output(display_name="method", tooltip="For Train Adapter.")],
        )

    @classmethod
    def execute(cls, pair, transform_size, rank, options) -> io.NodeOutput:
        return io.NodeOutput(build_method(pair, transform_size, rank, options))
