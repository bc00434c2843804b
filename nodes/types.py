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
Stack = io.Custom("TRILORA_STACK")
LoraStack = io.Custom("LORA_STACK")  # other packs' stackers: [(file name, strength on the model, strength on CLIP), ...]


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


@dataclass(frozen=True)
class StackEntry:
    """One file of an Adapter Stack; a TRILORA_STACK is a tuple of them. keep_rank 0 = all directions."""

    name: str
    strength_model: float
    strength_clip: float
    keep_rank: int = 0
