"""What travels between our nodes beside the host's own types."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..trilora_ops.errors import TriLoRAError

Dataset = io.Custom("TRILORA_DATASET")
Method = io.Custom("TRILORA_METHOD")
Settings = io.Custom("TRILORA_SETTINGS")
Plan = io.Custom("TRILORA_PLAN")
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")
Stack = io.Custom("TRILORA_STACK")
LoraStack = io.Custom("LORA_STACK")  # other packs' stackers: [(file name, strength on the model, strength on CLIP), ...]


@dataclass(frozen=True)
class EncodedImage:
    """One training image after the host's encoders: latent (1, C, *space) as the VAE gives it, conditioning of its prompt.

    repeats: how many times an epoch shows it. folder: the name of the folder it came from, "" for none.
    """

    name: str
    prompt: str
    latent: Tensor
    conditioning: list[Any]
    repeats: int = 1
    folder: str = ""


@dataclass(frozen=True)
class EncodedDataset:
    """Encoded images, the conditioning of the empty prompt, and what the file's metadata will say about them."""

    images: tuple[EncodedImage, ...]
    empty: list[Any]
    trigger: str
    tag_frequency: dict[str, int]
    summary: str

    def folders(self) -> dict[str, dict[str, int]]:
        """Folder -> its number of images and their repeats, in the words of kohya's metadata."""
        found: dict[str, dict[str, int]] = {}
        for image in self.images:
            entry = found.setdefault(image.folder or "images", {"n_repeats": image.repeats, "img_count": 0})
            entry["img_count"] += 1
        return found


@dataclass(frozen=True)
class StackEntry:
    """One adapter and how it is applied; a TRILORA_STACK is a tuple of them.

    keep_rank: 0 = all directions; block_weights: strengths by blocks as text, empty = 1 everywhere. Raises TriLoRAError for a
    strength that is no number.
    """

    name: str
    strength_model: float
    strength_clip: float
    keep_rank: int = 0
    block_weights: str = ""

    def __post_init__(self):
        for field in ("strength_model", "strength_clip"):
            if not math.isfinite(getattr(self, field)):
                raise TriLoRAError(f"{field}={getattr(self, field)} for {self.name}: a finite number; look at what is connected to it")
