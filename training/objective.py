"""The loss: squared error in x0 space times a per-sample weight, so that eps, v and flow models are one formula."""

from __future__ import annotations

import torch
from torch import Tensor

from ..trilora_ops.errors import TriLoRAError

# weight(sigma, sigma_data) that turns an x0 error into the error of what the model predicts:
#   eps:  x0 = x - sigma*eps                          -> 1/sigma^2
#   v:    x0 = c*x - v*sigma*d/sqrt(sigma^2 + d^2)    -> (sigma^2 + d^2) / (sigma*d)^2   (also EDM's F)
#   flow: x0 = x - sigma*v                            -> 1/sigma^2
WEIGHTS = {
    "eps": lambda sigma, data: sigma**-2,
    "v": lambda sigma, data: (sigma**2 + data**2) / (sigma * data) ** 2,
    "flow": lambda sigma, data: sigma**-2,
}


def loss_weight(prediction: str, sigma: Tensor, sigma_data: float = 1.0, min_snr_gamma: float = 0.0) -> Tensor:
    """Weight of the x0 error, (B,), fp32.

    sigma: (B,) noise levels > 0. min_snr_gamma > 0 caps the weight of eps and v models. For eps it is min(SNR, gamma),
    SNR = (sigma_data / sigma)^2: min-SNR (arXiv:2303.09556) written in x0 space. For v it is min(SNR + 1, gamma), which
    keeps the weight of 1 that v models give to pure noise; the paper's min(SNR, gamma) lets it vanish there, and with it
    what decides a picture's overall look (measured on the small world: twice the distance to a style).
    """
    if prediction not in WEIGHTS:
        raise TriLoRAError(f"prediction={prediction!r}: this kind of model cannot be trained yet; use an eps, v or flow model")
    weight = WEIGHTS[prediction](sigma.float(), sigma_data)
    return weight.clamp_max(min_snr_gamma / sigma_data**2) if min_snr_gamma > 0 and prediction in ("eps", "v") else weight


def x0_loss(estimate: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """weight * mean((estimate - x0)^2) over all but the batch axis: (B, C, *space) twice, (B,) -> (B,), fp32."""
    return weight * (estimate.float() - x0.float()).square().flatten(1).mean(dim=1)


def draw_u(count: int, timesteps: str, prediction: str, generator: torch.Generator) -> Tensor:
    """Places in the noise schedule, (count,) in (0, 1), 1 = noise; "auto" is logit_normal for flow, else uniform."""
    if timesteps == "logit_normal" or (timesteps == "auto" and prediction == "flow"):
        u = torch.randn(count, generator=generator).sigmoid()
    else:
        u = torch.rand(count, generator=generator)
    return u.clamp(1e-3, 1 - 1e-3)  # the ends are a clean image, and a sigma that some schedules put at infinity
