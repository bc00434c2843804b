"""A folder of images as training images: found, checked, captioned, resized."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..trilora_ops.errors import TriLoRAError
from .buckets import bucket_size, crop_loss
from .captions import read_caption, with_trigger

log = logging.getLogger("trilora")
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class TrainingImage:
    """One image of a folder: file, prompt, whether the prompt came from a caption file, and the size it is trained at."""

    path: Path
    prompt: str
    captioned: bool
    size: tuple[int, int]
    cropped: float

    def pixels(self) -> Tensor:
        """(1, height, width, 3) fp32 in [0, 1]: scaled to cover `size`, cropped at the centre, transparency on white."""
        with _open(self.path) as image:
            image = ImageOps.fit(_flatten(image), self.size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]


def read_folder(folder: Path, trigger: str, resolution: int) -> list[TrainingImage]:
    """The images directly in `folder`, by name, each decoded once to be sure that it can be.

    resolution: training area is resolution^2 pixels at the most. Raises TriLoRAError for a folder without images, an
    image that cannot be read, and images without a caption where no trigger word stands in.
    """
    if not folder.is_dir():
        raise TriLoRAError(f"folder={folder.name!r}: there is no such folder in ComfyUI's input folder; create it and put images in")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_TYPES)
    if not files:
        raise TriLoRAError(f"folder={folder.name!r}: holds no images; put files of type {', '.join(IMAGE_TYPES)} in, "
                           "with a .txt caption of the same name beside each")
    images, uncaptioned = [], []
    for path in files:
        with _open(path) as image:
            width, height = ImageOps.exif_transpose(image).size
        caption = read_caption(path)
        if caption is None:
            uncaptioned.append(path.name)
        size = bucket_size(width, height, resolution)
        images.append(TrainingImage(path, with_trigger(caption, trigger), caption is not None, size, crop_loss(width, height, size)))
    if uncaptioned:
        first = ", ".join(uncaptioned[:5])
        if not trigger.strip():
            raise TriLoRAError(f"folder={folder.name!r}: {len(uncaptioned)} of {len(files)} images have no caption ({first}); "
                               "add .txt files or set a trigger word")
        log.warning("%d of %d images have no caption and are trained with the trigger word alone: %s", len(uncaptioned), len(files), first)
    return images


def summary(images: list[TrainingImage]) -> str:
    """What a person wants to know before a run: counts, captions, sizes with their crop."""
    sizes: dict[tuple[int, int], list[TrainingImage]] = {}
    for image in images:
        sizes.setdefault(image.size, []).append(image)
    lines = [f"{len(images)} images, {sum(i.captioned for i in images)} with captions"]
    for (width, height), members in sorted(sizes.items()):
        cropped = sum(m.cropped for m in members) / len(members)
        lines.append(f"  {width} x {height}: {len(members)} images, {cropped:.0%} cropped away")
    return "\n".join(lines)


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # Pillow raises a dozen kinds for broken files, with the whole path in their words
        raise TriLoRAError(f"{path.name}: cannot be read as an image ({type(error).__name__}); replace or remove it") from error
    return image


def _flatten(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")
