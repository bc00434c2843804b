"""What the training loop may ask of a model, and what a training sample is."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sample:
    """One encoded image.

    x0: (1, C, *space) clean latent in the model's own scale, fp32 on the CPU.
    conditions: what the host made of the caption, opaque to the loop.
    signature: samples with equal signatures can share a forward pass.
    repeats: how many times an epoch shows it.
    """

    name: str
    x0: Tensor
    conditions: Any
    signature: Hashable
    repeats: int = 1


class Host(Protocol):
    """A frozen diffusion model. Noise levels are `sigma` in the model's own scale; u in (0, 1) orders them, 1 = noise."""

    device: torch.device
    compute_dtype: torch.dtype
    prediction: str  # "eps", "v" or "flow": a key of objective.WEIGHTS
    sigma_data: float

    def layers(self) -> Mapping[str, nn.Module]:
        """Target key -> every linear layer and convolution of the model."""

    def weight(self, key: str) -> Tensor:
        """The layer's effective W0, (out, in, *kernel), as the forward pass uses it; read-only."""

    def frozen_weight(self, module: nn.Module, like: Tensor) -> AbstractContextManager[Tensor]:
        """The layer's weight on `like`'s device and dtype, for the length of a `with` block."""

    def blocks(self) -> Sequence[nn.Module]:
        """The modules whose activations may be recomputed instead of kept, in forward order."""

    def sigma(self, u: Tensor) -> Tensor:
        """Noise level at the place u of the model's schedule; (B,) -> (B,), fp32."""

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t from clean latents and unit noise, (B, C, *space) each; neither argument is written to."""

    def collate(self, samples: Sequence[Sample]) -> Any:
        """The conditions of samples of one signature as one batch."""

    def denoise(self, x: Tensor, sigma: Tensor, conditions: Any) -> Tensor:
        """The model's estimate of x0, (B, C, *space), fp32, differentiable with respect to adapters."""

    def session(self) -> AbstractContextManager[None]:
        """Everything the model needs to be trained through; leaves it as it was found."""

    def check_interrupt(self) -> None:
        """Raise the host's own exception when the user has asked to stop."""
