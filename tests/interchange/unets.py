"""diffusers' U-Nets of SD1.x and SDXL with all their layers and tiny widths, in a pipeline of theirs."""

from dataclasses import dataclass

import torch
from comfyui_trilora.trilora_ops.naming import UNetLayout

RESNET = ("in_layers.2", "emb_layers.1", "out_layers.3")
TRANSFORMER = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
               "ff.net.0.proj", "ff.net.2")  # fmt: skip


@dataclass(frozen=True)
class Family:
    """channels, depths: width and number of transformers of each level, from the finest; 0 = none."""

    name: str
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int
    pipeline: str
    options: dict

    def unet(self):
        """A UNet2DConditionModel with random weights."""
        from diffusers import UNet2DConditionModel

        def kinds(with_attention: str, without: str, levels) -> tuple[str, ...]:
            return tuple(with_attention if depth else without for depth in levels)

        torch.manual_seed(3)
        return UNet2DConditionModel(
            sample_size=8, layers_per_block=2, block_out_channels=self.channels, norm_num_groups=4, cross_attention_dim=12,
            attention_head_dim=4, transformer_layers_per_block=tuple(depth or 1 for depth in self.depths),
            down_block_types=kinds("CrossAttnDownBlock2D", "DownBlock2D", self.depths),
            up_block_types=kinds("CrossAttnUpBlock2D", "UpBlock2D", reversed(self.depths)), **self.options,
        )  # fmt: skip

    def pipe(self, unet, text_encoder=None):
        """diffusers' pipeline around a U-Net, with nothing else in it but, if wanted, a text encoder."""
        import diffusers

        cls = getattr(diffusers, self.pipeline)
        parts = dict.fromkeys(("vae", "tokenizer", "scheduler", "feature_extractor", "image_encoder"))
        if self.name == "sdxl":
            return cls(unet=unet, text_encoder=text_encoder, text_encoder_2=None, tokenizer_2=None, **parts)
        return cls(unet=unet, text_encoder=text_encoder, safety_checker=None, requires_safety_checker=False, **parts)

    def keys(self) -> list[str]:
        """The target keys of the same layers in the host's spelling."""
        return [f"diffusion_model.{path}.weight" for path in self._paths()]

    def layout(self) -> UNetLayout:
        """Levels of the U-Net, read from its keys."""
        return UNetLayout.of(self.keys())

    def _paths(self) -> list[str]:
        def resnet(parent: str, shortcut: bool) -> list[str]:
            return [f"{parent}.{part}" for part in RESNET] + [f"{parent}.skip_connection"] * shortcut

        def transformer(parent: str, depth: int) -> list[str]:
            inner = [f"{parent}.transformer_blocks.{i}.{part}" for i in range(depth) for part in TRANSFORMER]
            return [f"{parent}.proj_in", f"{parent}.proj_out", *inner] if depth else []

        paths = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2"]
        paths += ["label_emb.0.0", "label_emb.0.2"] if self.name == "sdxl" else []
        number, width, last = 1, self.channels[0], len(self.channels) - 1
        for level, (channels, depth) in enumerate(zip(self.channels, self.depths, strict=True)):
            for _ in range(2):
                paths += resnet(f"input_blocks.{number}.0", width != channels) + transformer(f"input_blocks.{number}.1", depth)
                number, width = number + 1, channels
            if level < last:
                paths.append(f"input_blocks.{number}.0.op")
                number += 1
        paths += resnet("middle_block.0", False) + transformer("middle_block.1", self.middle) + resnet("middle_block.2", False)
        for number in range(3 * len(self.channels)):
            depth = self.depths[last - number // 3]
            paths += resnet(f"output_blocks.{number}.0", True) + transformer(f"output_blocks.{number}.1", depth)
            if number % 3 == 2 and number // 3 < last:
                paths.append(f"output_blocks.{number}.{2 if depth else 1}.conv")
        return paths


SD1 = Family("sd1", (8, 16, 16, 24), (1, 1, 1, 0), 1, "StableDiffusionPipeline", {})
SDXL = Family("sdxl", (8, 16, 24), (0, 1, 2), 2, "StableDiffusionXLPipeline",
              {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 20,
               "use_linear_projection": True})  # fmt: skip
FAMILIES = {family.name: family for family in (SD1, SDXL)}
