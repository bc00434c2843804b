"""The small world in the host: its U-Net class takes the bundled weights, and its own sampling draws the same pictures."""

import comfy.latent_formats
import comfy.model_base
import comfy.ops
import comfy.sample
import comfy.supported_models
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfyui_trilora.benchmarks.world import autoencoder
from comfyui_trilora.benchmarks.world.unet import WORLD_UNET, UNet
from comfyui_trilora.benchmarks.world.world import World
from comfyui_trilora.tests.host import tiny_models

PROMPTS = ["a red circle on a blue background, centre", "a yellow star on a black background, top left"]


@pytest.fixture(scope="module")
def world():
    return World.load()


@pytest.fixture(scope="module")
def patcher(host, world):
    """The world's U-Net as a MODEL of the host: v-prediction, latents of 12 channels taken as they are."""
    with torch.inference_mode():
        config = comfy.supported_models.SD20(WORLD_UNET)
        config.unet_config = {**WORLD_UNET, "num_head_channels": -1}
        config.latent_format = comfy.latent_formats.LatentFormat()
        config.latent_format.latent_channels = WORLD_UNET["in_channels"]
        config.set_inference_dtype(torch.float32, None)
        model_type = comfy.model_base.ModelType.V_PREDICTION
        model = comfy.model_base.BaseModel(config, model_type=model_type, device=torch.device("cpu"))
        model.diffusion_model.load_state_dict(world.unet.state_dict(), strict=True)
        return tiny_models.as_patcher(model)


@pytest.mark.parametrize(
    "change",
    [{}, {"use_scale_shift_norm": False, "channel_mult": (1, 2, 2, 2), "use_linear_in_transformer": True},
     {"num_res_blocks": [1, 2, 1, 2], "transformer_depth": [2, 0, 1, 0, 0, 1], "num_heads": 4}],
)  # fmt: skip
def test_the_unet_is_the_hosts_for_any_configuration(change):
    config = {**WORLD_UNET, **change}
    ours, theirs = UNet(**config), UNetModel(**config, operations=comfy.ops.disable_weight_init)
    tiny_models.initialise(ours, seed=3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(4)
    for height, width in ((16, 16), (18, 14)):
        x = torch.randn(3, 12, height, width, generator=generator)
        context = torch.randn(3, 16, 64, generator=generator)
        timesteps = torch.tensor([0.0, 421.0, 999.0])
        with torch.no_grad():
            expected = theirs(x, timesteps, context=context)
            torch.testing.assert_close(ours(x, timesteps, context), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.03, 0.7, 14.6])
def test_the_host_denoises_alike(world, patcher, sigma):
    x_t = (1 + sigma**2) ** 0.5 * torch.randn(2, 12, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        context = world.encode_text(PROMPTS)
        expected = patcher.model.apply_model(x_t, torch.full((2,), sigma), c_crossattn=context)
        torch.testing.assert_close(world.denoise(x_t, sigma, context), expected, rtol=1e-5, atol=2e-5)


def test_the_host_samples_the_same_pictures(world, patcher):
    ours = world.sample(PROMPTS, seed=7, steps=8, guidance=3.0)
    with torch.inference_mode():
        context, empty = world.encode_text(PROMPTS), world.encode_text([""])
        noise = torch.stack(
            [torch.randn(12, 16, 16, generator=torch.Generator().manual_seed(7 + i)) for i in range(len(PROMPTS))]
        )
        latents = torch.cat([
            comfy.sample.sample(
                patcher, noise[i : i + 1], 8, 3.0, "euler", "normal", [[context[i : i + 1], {}]], [[empty, {}]],
                torch.zeros(1, 12, 16, 16), disable_pbar=True, seed=7,
            )
            for i in range(len(PROMPTS))
        ])  # fmt: skip
    theirs = autoencoder.decode(latents).clamp(0, 1)
    # Each of the eight steps may multiply a rounding error, hence looser than a single denoising.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
