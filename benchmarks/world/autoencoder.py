"""A fixed, lossless stand-in for SD's VAE: a one-level Haar transform.

Each 2x2 block of pixels (a b / c d) of each colour becomes four latent channels
through the orthonormal matrix

    (a+b+c+d)/2, (a-b+c-d)/2, (a+b-c-d)/2, (a-b-c+d)/2

(Haar 1910; a 2x2 space-to-depth that separates mean from detail), times one fixed
scale per band, which brings the drawings' latents to about unit standard deviation.
There is nothing to train, and decode(encode(x)) == x up to rounding.
"""

import torch
import torch.nn.functional as F

#: Latent channels of a three-colour image: 4 bands x 3 colours.
LATENT_CHANNELS = 12
#: Pixels per latent position along each side.
DOWNSCALE = 2

#: Mean band and detail bands, measured on the drawings: pixels in [-1, 1] have a mean
#: band of standard deviation 1.3 and details of 0.25.  Details are kept below 1 on
#: purpose: they matter less to the eye than the mean band.
MEAN_SCALE = 0.75
DETAIL_SCALE = 2.0


def _haar(device, dtype):
    """(12, 3, 2, 2) filters; channel = 3 * band + colour."""
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], device=device, dtype=dtype) / 2
    filters = torch.zeros(4, 3, 3, 4, device=device, dtype=dtype)
    for colour in range(3):
        filters[:, colour, colour] = signs
    return filters.view(LATENT_CHANNELS, 3, 2, 2)


def _scale(device, dtype):
    scale = torch.full((1, LATENT_CHANNELS, 1, 1), DETAIL_SCALE, device=device, dtype=dtype)
    scale[:, :3] = MEAN_SCALE
    return scale


def encode(images):
    """Images (B, 3, H, W) in [0, 1] -> latents (B, 12, H/2, W/2), about unit std.

    Raises ValueError where the shape is not (B, 3, even, even).
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % 2 or images.shape[3] % 2:
        raise ValueError(
            f"images of shape {tuple(images.shape)}: must be (B, 3, H, W) with even H and W; crop or pad the image"
        )
    haar = _haar(images.device, images.dtype)
    return F.conv2d(images * 2 - 1, haar, stride=2) * _scale(images.device, images.dtype)


def decode(latents):
    """Latents (B, 12, H, W) -> images (B, 3, 2H, 2W); in [0, 1] for an image's latents, unclamped.

    Raises ValueError where the shape is not (B, 12, H, W).
    """
    if latents.ndim != 4 or latents.shape[1] != LATENT_CHANNELS:
        raise ValueError(
            f"latents of shape {tuple(latents.shape)}: must be (B, {LATENT_CHANNELS}, H, W); encode the image first"
        )
    haar = _haar(latents.device, latents.dtype)
    bands = latents / _scale(latents.device, latents.dtype)
    # The filters are orthonormal, so the transpose is the inverse.
    return (F.conv_transpose2d(bands, haar, stride=2) + 1) / 2
