"""The small world as a checkpoint of ComfyUI: MODEL, CLIP and VAE that the host's own nodes take. Imports the host."""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
import torch.nn.functional as F
from torch import Tensor

from . import autoencoder
from .unet import WORLD_UNET
from .world import World

# pixels of the host's pictures to one of the world's: 64 is the smallest training size the dataset node has
PIXELS = 2


def world_model(world: World):
    """The U-Net in the host's own class, v-prediction, latents of 12 channels taken as they are."""
    config = comfy.supported_models.SD20(WORLD_UNET)
    config.unet_config = {**WORLD_UNET, "num_head_channels": -1}
    config.latent_format = comfy.latent_formats.LatentFormat()
    config.latent_format.latent_channels = WORLD_UNET["in_channels"]
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.V_PREDICTION, device=torch.device("cpu"))
    model.diffusion_model.load_state_dict(world.unet.state_dict(), strict=True)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(model, load_device=comfy.model_management.get_torch_device(), offload_device=comfy.model_management.unet_offload_device())


class WorldClip:
    """The world's text encoder with the calls that the host makes of a CLIP; adapters of the world leave it alone."""

    def __init__(self, world: World):
        self.world, self.cond_stage_model = world, world.text_encoder

    def tokenize(self, text: str) -> list[str]:
        """The prompt itself; words become rows in the encoder."""
        return [text]

    def encode_from_tokens_scheduled(self, tokens: list[str]) -> list:
        """CONDITIONING with one entry, (1, 16, 64)."""
        return [[self.world.encode_text(tokens), {"pooled_output": None}]]

    def clone(self) -> "WorldClip":
        """Itself: nothing of it can be patched."""
        return self

    def add_patches(self, patches: dict, strength: float = 1.0) -> list:
        """No key of a patch is this encoder's."""
        return []


class WorldVae:
    """The fixed autoencoder on the host's pictures, (B, H, W, 3) in [0, 1], at `PIXELS` times the world's size."""

    def encode(self, pixels: Tensor) -> Tensor:
        """-> latents (B, 12, H/4, W/4)."""
        return autoencoder.encode(F.avg_pool2d(pixels[..., :3].permute(0, 3, 1, 2).float().cpu(), PIXELS))

    def decode(self, latents: Tensor, **options) -> Tensor:
        """-> pictures (B, 4H, 4W, 3)."""
        images = autoencoder.decode(latents.float().cpu()).clamp(0, 1)
        return F.interpolate(images, scale_factor=PIXELS, mode="nearest").permute(0, 2, 3, 1)


class WorldLoader:
    """A node that stands where a workflow loads a checkpoint."""

    NODE_ID = "TriLoRADemoWorld"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "TriLoRA/demo"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """No inputs."""
        return {"required": {}}

    def load(self) -> tuple:
        """MODEL, CLIP, VAE."""
        world = World.load().requires_grad_(False)
        return world_model(world), WorldClip(world), WorldVae()
