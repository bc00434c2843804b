"""Block Weights: strengths by blocks as text and as sliders, for the inputs `block_weights` of the loaders."""

from __future__ import annotations

from comfy_api.latest import io

from ..trilora_ops.block_layouts import LAYOUTS
from ..trilora_ops.errors import TriLoRAError
from . import compat

# those of trilora_ops.block_dialects, which is not imported before a node runs
DIALECTS = ("auto", "native", "webui", "inspire", "kohya", "realtime", "diffusers", "tabs")


class WeightsInput(io.String.Input):
    """The text, and for the panel in the browser what it must know of the models' blocks and the presets."""

    def as_dict(self):
        from .block_tables import tables  # when the browser asks, not at the host's start

        return {**super().as_dict(), "trilora_blocks": tables()}


class BlockWeightsNode(io.ComfyNode):
    """One text in any notation -> the canonical text, random numbers drawn, a list of them where the text means several."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRABlockWeights",
            display_name="Block Weights",
            category="TriLoRA/blocks",
            description="A strength for every block of a model, by sliders, presets or text in any notation, for TriLoRA Loader, Adapter Stack, Adapter Hook and Bake Adapter.",
            search_aliases=["lbw", "lora block weight", "block lora", "lora layers", "layer weights"],
            inputs=[
                io.Combo.Input("model_family", options=list(LAYOUTS), default="SD1.5",
                               tooltip="Whose blocks the panel shows. It must be the family of the model that the text is used for; with MODEL "
                                       "connected, that model's own blocks count."),
                io.Combo.Input("dialect", options=list(DIALECTS), default="auto",
                               tooltip="Whose notation the text is in. auto finds out, and asks where a text means two things."),
                WeightsInput("weights", default="", multiline=True, dynamic_prompts=False,
                             placeholder="default=1, IN04-IN08=0.5, OUT.cross=0, TE1=0.8",
                             tooltip="The text is all that is stored; the panel shows it and writes it. Paste what you have from other tools. Empty = 1 everywhere."),
                compat.advanced(io.Float.Input("A", default=1.0, min=-20.0, max=20.0, step=0.05, optional=True,
                                               tooltip="What A stands for in the text; a is half of it. webui's X is A too.")),
                compat.advanced(io.Float.Input("B", default=1.0, min=-20.0, max=20.0, step=0.05, optional=True, tooltip="What B stands for; b is half of it.")),
                compat.advanced(io.Int.Input("random_seed", default=0, min=0, max=2**53 - 1, optional=True,
                                             tooltip="From which R and U in the text are drawn. The numbers drawn stand in the output.")),
                io.Model.Input("model", optional=True, tooltip="Optional: the model whose blocks count, instead of those of model_family."),
            ],
            outputs=[io.String.Output(display_name="block_weights", is_output_list=True,
                                      tooltip="Canonical text. Test lines such as @NAME:17 give one text for each test, and what follows runs once for each.")],
        )

    @classmethod
    def fingerprint_inputs(cls, weights, **others):
        """Run again when a preset that the text names has changed."""
        from .block_strengths import preset_stamp

        return (weights, preset_stamp(weights))

    @classmethod
    def execute(cls, model_family, dialect, weights, A=1.0, B=1.0, random_seed=0, model=None) -> io.NodeOutput:  # noqa: N803
        from ..trilora_ops.block_syntax import expand
        from ..trilora_ops.blocks import Blocks
        from .block_presets import user_presets
        from .block_strengths import read_presets_of
        from .block_summary import other_model, summary
        from .comfy_patches import Places

        blocks, hint = Blocks.layout(model_family), ""
        if model is not None:
            known, blocks = blocks, Places.of(model, None).blocks
            hint = other_model(blocks, known, model_family)
        read_presets_of(weights)
        try:
            with user_presets() as presets:
                found = expand(weights, blocks, dialect, a=A, b=B, seed=random_seed, presets=presets)
        except TriLoRAError as error:
            raise TriLoRAError(f"{error}{hint and '; '}{hint}") from None
        texts = [one.text() for one in found]
        many = f"{len(texts)} texts, one run for each; the first: " if len(texts) > 1 else ""
        said = many + summary(found[0], blocks, model_family if model is None else "MODEL")
        # for the panel, which shows what was said of the text as long as it stands
        return io.NodeOutput(texts, ui={"weights": [weights], "block_weights": texts, "summary": ["\n".join(filter(None, (hint, said)))]})
