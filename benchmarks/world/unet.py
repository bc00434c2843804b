"""Stable Diffusion 1.x's U-Net in plain PyTorch, with its parameter names.

Architecture: Rombach et al., "High-Resolution Image Synthesis with Latent
Diffusion Models" (arXiv:2112.10752), after Dhariwal & Nichol (arXiv:2105.05233).
``UNet(**WORLD_UNET)`` and the host's ``UNetModel(**WORLD_UNET)`` take the same
configuration, have the same state dict keys and compute the same function.

Two things differ from SD1.x's configuration, both forced by the width of 32:

* GroupNorm has 32 groups in SD, so 32 channels make it an instance norm, which
  would subtract the timestep bias that SD adds in front of it.  The timestep
  therefore scales and shifts *after* the norm (``use_scale_shift_norm``, as in
  arXiv:2105.05233), which the host's class offers as well.
* The channel multipliers are smaller, to keep the file under 4 MiB.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .attention import NORM_GROUPS, SpatialTransformer

WORLD_UNET = {
    "image_size": 16,
    "in_channels": 12,
    "out_channels": 12,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 1, 2, 1),
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 64,
    "num_heads": 2,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_scale_shift_norm": True,
}


def timestep_embedding(timesteps, dim, max_period=10000.0):
    """Sinusoids of the timestep: (cos(t w_0..), sin(t w_0..)), w_i = max_period^(-i / (dim/2)).

    Source: Vaswani et al. (arXiv:1706.03762) in the cos-first order of SD.

    timesteps: (B,), 0..999, may be fractional.  dim: even.  Returns (B, dim) float32.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponent)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """h = conv(silu(norm(x))), modulated by the timestep, plus a (1x1-projected) skip."""

    def __init__(self, channels, emb_channels, out_channels, scale_shift):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(),
            nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels),
        )
        # The Identity stands where SD has its (zero) dropout, so that the conv is number 3.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, out_channels),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.in_layers(x)
        modulation = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + modulation)
        return self.skip_connection(x) + h


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        # To the skip's size rather than by 2: odd latents come back odd, as in the host.
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Sequential):
    """A numbered block; each part gets the timestep, the text or the size it needs."""

    def forward(self, x, emb, context, size=None):
        for part in self:
            if isinstance(part, ResBlock):
                x = part(x, emb)
            elif isinstance(part, SpatialTransformer):
                x = part(x, context)
            elif isinstance(part, Upsample):
                x = part(x, size)
            else:
                x = part(x)
        return x


class UNet(nn.Module):
    """SD1.x's U-Net.  The arguments bear the names of the host's ``UNetModel``.

    channel_mult: width of each level in units of model_channels; every width must
    be a multiple of 32, and channel_mult[0] must be 1 because SD's last convolution
    takes model_channels.  transformer_depth counts from the input side,
    transformer_depth_output too (the decoder reads it from its end), 0 = none.

    Raises ValueError for a width that GroupNorm(32) or the heads cannot divide.
    """

    def __init__(
        self,
        *,
        image_size,
        in_channels,
        out_channels,
        model_channels,
        num_res_blocks,
        channel_mult,
        transformer_depth,
        transformer_depth_output,
        transformer_depth_middle,
        context_dim,
        num_heads,
        use_spatial_transformer=True,
        use_linear_in_transformer=False,
        use_scale_shift_norm=False,
    ):
        super().__init__()
        if not use_spatial_transformer:
            raise ValueError(
                "use_spatial_transformer=False: this U-Net is text-conditioned; "
                "pass True and set transformer depths to 0 where none is wanted"
            )
        if isinstance(num_res_blocks, int):
            num_res_blocks = [num_res_blocks] * len(channel_mult)
        for mult in channel_mult:
            width = mult * model_channels
            if width % NORM_GROUPS or width % num_heads:
                raise ValueError(
                    f"channel_mult {mult} x model_channels {model_channels} = {width}: must be a "
                    f"multiple of {NORM_GROUPS} (GroupNorm) and of num_heads {num_heads}; "
                    "choose model_channels as a multiple of 32"
                )
        if channel_mult[0] != 1:
            raise ValueError(
                f"channel_mult[0] = {channel_mult[0]}: must be 1, as SD's output "
                "convolution takes model_channels; scale model_channels instead"
            )
        self.image_size = image_size
        self.model_channels = model_channels
        emb_dim = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))

        def res(channels, out):
            return ResBlock(channels, emb_dim, out, use_scale_shift_norm)

        def transformer(channels, depth):
            return SpatialTransformer(channels, num_heads, depth, context_dim, use_linear_in_transformer)

        depths = list(transformer_depth)
        ch = model_channels
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(in_channels, ch, 3, padding=1))])
        skips = [ch]
        last = len(channel_mult) - 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks[level]):
                parts = [res(ch, mult * model_channels)]
                ch = mult * model_channels
                depth = depths.pop(0)
                if depth:
                    parts.append(transformer(ch, depth))
                self.input_blocks.append(Block(*parts))
                skips.append(ch)
            if level != last:
                self.input_blocks.append(Block(Downsample(ch)))
                skips.append(ch)

        middle = [res(ch, ch), transformer(ch, transformer_depth_middle), res(ch, ch)]
        self.middle_block = Block(*(middle if transformer_depth_middle else middle[::2]))

        depths = list(transformer_depth_output)
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks[level] + 1):
                parts = [res(ch + skips.pop(), mult * model_channels)]
                ch = mult * model_channels
                depth = depths.pop()
                if depth:
                    parts.append(transformer(ch, depth))
                if level and i == num_res_blocks[level]:
                    parts.append(Upsample(ch))
                self.output_blocks.append(Block(*parts))

        self.out = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, ch), nn.SiLU(), nn.Conv2d(model_channels, out_channels, 3, padding=1)
        )

    def forward(self, x, timesteps, context):
        """x: (B, in_channels, H, W); timesteps: (B,) in 0..999; context: (B, T, context_dim).

        Returns (B, out_channels, H, W).
        """
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        skips = []
        h = x
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb, context, size=skips[-1].shape[-2:] if skips else None)
        return self.out(h)
