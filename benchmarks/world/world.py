"""``World``: text encoder, U-Net and fixed autoencoder together, with the bundled weights."""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from . import autoencoder
from .diffusion import guided, sample_euler, sampling_sigmas, scale_input, sigma_to_timestep, x0_from_v
from .text import TextEncoder, tokenize
from .unet import WORLD_UNET, UNet

WEIGHTS = Path(__file__).with_name("world.safetensors")
#: Key prefixes in the file, as in an SD1.x checkpoint.
UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model."


class World(nn.Module):
    """The small world's diffusion model.

    ``world.unet`` (a ``UNet``) and ``world.text_encoder`` (a ``TextEncoder``) are
    ordinary modules: an adapter may patch either in place, and ``sample`` follows.
    """

    def __init__(self):
        super().__init__()
        self.unet = UNet(**WORLD_UNET)
        self.text_encoder = TextEncoder()

    @classmethod
    def load(cls, path=WEIGHTS):
        """The model with the weights of ``path`` (default: the bundled ones), float32, eval mode.

        Raises FileNotFoundError where there is no such file and ValueError where its keys
        or shapes are not this model's.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"world weights {str(path)!r}: no such file; make it with "
                "python -m comfyui_trilora.benchmarks.world.pretrain"
            )
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}
        world = cls()
        renamed = {
            key.replace(UNET_PREFIX, "unet.", 1).replace(TEXT_PREFIX, "text_encoder.", 1): t
            for key, t in tensors.items()
        }
        try:
            world.load_state_dict(renamed, strict=True)
        except RuntimeError as error:
            raise ValueError(
                f"world weights {str(path)!r}: not this model's ({error}); use the file that belongs to this version"
            ) from error
        return world.eval()

    def save(self, path):
        """Write the weights as float16 safetensors with SD1.x's key prefixes."""
        tensors = {UNET_PREFIX + k: t for k, t in self.unet.state_dict().items()}
        tensors.update({TEXT_PREFIX + k: t for k, t in self.text_encoder.state_dict().items()})
        save_file({k: t.detach().half().contiguous() for k, t in tensors.items()}, str(path))

    def encode_text(self, prompts):
        """Prompts (list of B strings) -> context (B, 16, 64).  "" is the unconditional one."""
        device = self.text_encoder.token_embedding.weight.device
        return self.text_encoder(tokenize(prompts).to(device))

    def denoise(self, x_t, sigma, context):
        """Estimate x0 from x_t = x0 + sigma * noise.

        x_t: latents (B, 12, H, W); sigma: (B,) or a number, in latent units, 0.029..14.6;
        context: (B, 16, 64).  Returns x0, shaped as x_t.  Differentiable: the adapter's
        training loss is mean(loss_weight(sigma) * (denoise(...) - x0)^2).
        """
        sigma = torch.as_tensor(sigma, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))
        v = self.unet(scale_input(x_t, sigma), sigma_to_timestep(sigma), context)
        return x0_from_v(x_t, v, sigma)

    @torch.no_grad()
    def sample(self, prompts, seed=0, steps=20, guidance=2.0, size=32):
        """Draw pictures: (B, 3, size, size) float32 in [0, 1].

        Picture i starts from the noise of seed + i, whatever the batch.  steps: Euler
        steps; guidance: classifier-free guidance scale, 1 = none; size: pixels, even.
        Raises ValueError for an odd or non-positive size.
        """
        if size < 2 or size % 2:
            raise ValueError(f"size = {size}: must be even and positive; 32 is the world's size")
        side = size // autoencoder.DOWNSCALE
        shape = (autoencoder.LATENT_CHANNELS, side, side)
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(prompts))]
        )
        sigmas = sampling_sigmas(steps)
        # The variance that the schedule's last step would have, data included.
        x = noise.to(next(self.parameters()).device) * (1 + sigmas[0] ** 2).sqrt()
        context, uncond = self.encode_text(prompts), self.encode_text([""] * len(prompts))
        x0 = sample_euler(guided(self.denoise, context, uncond, guidance), x, sigmas)
        return autoencoder.decode(x0).clamp(0, 1).float()


def to_tensor(pictures):
    """List of (H, W, 3) uint8 arrays -> images (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def picture_grid(images, columns, scale=4, gap=2):
    """Images (B, 3, H, W) in [0, 1] -> one (.., .., 3) uint8 array, row by row.

    Each pixel becomes a square of ``scale``; ``gap`` pixels of white lie between pictures.
    """
    pixels = (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.permute(0, 2, 3, 1).numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = pixels.shape[1:3]
    rows = -(-len(pixels) // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = picture
    return grid
