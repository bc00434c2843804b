"""What travels between our nodes beside the host's own types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

Dataset = io.Custom("TRILORA_DATASET")
Method = io.Custom("TRILORA_METHOD")
Settings = io.Custom("TRILORA_SETTINGS")
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")


@dataclass(frozen=True)
class EncodedImage:
    """One training image after the host's encoders: latent (1, C, *space) as the VAE gives it, conditioning of its prompt."""

    name: str
    prompt: str
    latent: Tensor
    conditioning: list[Any]


@dataclass(frozen=True)
class EncodedDataset:
    """Encoded images, the conditioning of the empty prompt, and what the file's metadata will say about them."""

    images: tuple[EncodedImage, ...]
    empty: list[Any]
    trigger: str
    tag_frequency: dict[str, int]
    summary: str
