"""Writes small model files that the host's stock loaders take: an SD1.5 checkpoint and a TAESD pair.

The checkpoint has SD1.5's key layout and widths with little depth, so names, shapes and text encoder are the real ones.
It is written in fp16, about 400 MB; on the CPU the host reads the U-Net back as fp32 and keeps the text encoder in fp16.
"""

from pathlib import Path

import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import comfy.sd1_clip
import comfy.supported_models
import comfy.taesd.taesd
import torch
from comfyui_trilora.tests.host.tiny_models import initialise
from safetensors.torch import save_file

# One residual block a level and no widening: 74 million parameters instead of 860.
SD15_UNET = {
    "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True, "legacy": False,
    "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 1, 1, 1],
    "num_res_blocks": [1, 1, 1, 1], "transformer_depth": [1, 1, 1, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1, "context_dim": 768,
    "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
}  # fmt: skip
SD15_SCALE = 0.18215  # the factor between SD1.5's raw latents and unit variance


def sd15_unet(seed: int) -> torch.nn.Module:
    config = comfy.supported_models.SD15(SD15_UNET)
    unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **config.unet_config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    initialise(unet, seed)
    return unet


def clip_l(seed: int) -> torch.nn.Module:
    """SD1.5's text encoder at full depth (12 layers): the host's loader cannot be told of fewer."""
    clip = comfy.sd1_clip.SD1ClipModel(device="cpu", dtype=torch.float32)
    initialise(clip, seed)
    return clip


def taesd(seed: int) -> comfy.taesd.taesd.TAESD:
    """A TAESD whose latents have unit variance after the host's scaling, and whose pictures are neither black nor white."""
    model = comfy.taesd.taesd.TAESD()
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("conv.4.weight"):  # the end of a residual branch: a dozen at full size would explode
                parameter.mul_(0.3)
        images = torch.rand((2, 3, 64, 64), generator=generator)
        encoder, decoder = model.taesd_encoder, model.taesd_decoder
        encoder[-1].weight.div_(encoder(images).std())
        decoder[-1].weight.mul_(0.2 / decoder(torch.randn((2, 4, 8, 8), generator=generator)).std())
        decoder[-1].bias.copy_(0.5 - decoder(torch.randn((2, 4, 8, 8), generator=generator)).mean(dim=(0, 2, 3)))
        model.vae_scale.fill_(SD15_SCALE)
    return model


def halved(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().half().contiguous() for key, value in state_dict.items()}


def write_sd15(path: Path, seed: int = 10) -> None:
    """Writes U-Net, text encoder and a TAESD in the VAE's place; every output of CheckpointLoaderSimple works."""
    config = comfy.supported_models.SD15(SD15_UNET)
    vae = taesd(seed + 2).state_dict()
    state_dict = halved(
        {
            **config.process_unet_state_dict_for_saving(sd15_unet(seed).state_dict()),
            **config.process_clip_state_dict_for_saving(clip_l(seed + 1).state_dict()),
            **config.process_vae_state_dict_for_saving(vae),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, path)


def write_taesd(folder: Path, seed: int = 12) -> None:
    """Writes taesd_encoder and taesd_decoder; the host's VAELoader lists the pair as "taesd"."""
    model = taesd(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(halved(model.taesd_encoder.state_dict()), folder / "taesd_encoder.safetensors")
    save_file(halved(model.taesd_decoder.state_dict()), folder / "taesd_decoder.safetensors")
