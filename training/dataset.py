"""Pictures as training images, from a folder or from memory: found, checked, captioned, resized."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
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
MAX_REPEATS = 10_000
_NUMBERED = re.compile(r"(\d{1,4})_(.+)")  # kohya's folder names, "25_name"; a longer number is a date


@dataclass(frozen=True)
class TrainingImage:
    """One image: its file, or the picture itself; its prompt, and whether that came from a caption of its own; the size it
    is trained at and the share that is cut off for it; how many times an epoch shows it.
    """

    name: str
    source: Path | Image.Image
    prompt: str
    captioned: bool
    size: tuple[int, int]
    cropped: float
    repeats: int = 1
    folder: str = ""

    def pixels(self) -> Tensor:
        """(1, height, width, 3) fp32 in [0, 1]: scaled to cover `size`, cropped at the centre, transparency on white."""
        image = _open(self.source) if isinstance(self.source, Path) else self.source
        image = ImageOps.fit(_flatten(image), self.size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]


def numbered(name: str) -> tuple[int, str] | None:
    """(repeats, what is shown) of a folder named as kohya's tools have it, "25_name"; None for any other name."""
    found = _NUMBERED.fullmatch(name)
    return (int(found[1]), found[2]) if found and int(found[1]) else None


def folders_of(folder: Path) -> list[Path]:
    """Where the images of a training folder are: directly in it, and in its subfolders named "25_name"."""
    return [folder, *sorted(p for p in folder.iterdir() if p.is_dir() and numbered(p.name))]


def read_folder(folder: Path, trigger: str, resolution: int, repeats: int = 1) -> list[TrainingImage]:
    """The images of `folders_of(folder)`, by name, each decoded once to be sure that it can be.

    resolution: training area is resolution^2 pixels at the most. repeats: how many times an epoch shows each image; those
    of a folder "25_name" 25 times as often. Raises TriLoRAError for a folder without images, an image that cannot be
    read, and images without a caption where neither a trigger word nor the folder's "25_name" stands in.
    """
    if not folder.is_dir():
        raise TriLoRAError(f"folder={folder.name!r}: there is no such folder in ComfyUI's input folder; create it and put images in")
    files = [(place, file) for place in folders_of(folder) for file in sorted(place.iterdir()) if file.suffix.lower() in IMAGE_TYPES]
    if not files:
        raise TriLoRAError(f"folder={folder.name!r}: holds no images; put files of type {', '.join(IMAGE_TYPES)} in, "
                           "with a .txt caption of the same name beside each")
    images, uncaptioned, promptless = [], [], []
    for place, path in files:
        with _open(path) as image:
            size = ImageOps.exif_transpose(image).size
        times, shown = numbered(place.name) or (1, "")
        caption, name = read_caption(path), path.relative_to(folder).as_posix()
        prompt = with_trigger(caption, trigger) or shown
        if caption is None:
            (uncaptioned if prompt else promptless).append(name)
        images.append(_image(name, path, prompt, caption is not None, size, resolution, repeats * times, place.name))
    if promptless:
        raise TriLoRAError(f"folder={folder.name!r}: {len(promptless)} of {len(files)} images have no caption ({', '.join(promptless[:5])}); "
                           "add .txt files or set a trigger word")
    if uncaptioned:
        stand_in = "the trigger word alone" if trigger.strip() else "their folder's name"
        log.warning("%d of %d images have no caption and are trained with %s: %s", len(uncaptioned), len(files), stand_in,
                    ", ".join(uncaptioned[:5]))
    return images


def from_pictures(pictures: Sequence[Tensor], captions: Sequence[str], trigger: str, resolution: int, repeats: int = 1) -> list[TrainingImage]:
    """Pictures in memory, (height, width, channels) in [0, 1] with 1, 3 or 4 channels each, with one caption for all or one each.

    They are taken in 8 bits, as a PNG file of them would be. Raises TriLoRAError for no pictures, values that are not
    finite, and a number of captions that is neither 1 nor that of the pictures (none needs a trigger word).
    """
    if not pictures:
        raise TriLoRAError("images: there are none")
    if len(captions) not in ((0, 1, len(pictures)) if trigger.strip() else (1, len(pictures))):
        raise TriLoRAError(f"captions: {len(captions)} lines for {len(pictures)} images; give one line for all, or one for each"
                           + ("" if trigger.strip() else ", or set a trigger word"))
    each = captions if len(captions) == len(pictures) else [*captions, ""][:1] * len(pictures)
    images = []
    for number, (picture, caption) in enumerate(zip(pictures, each, strict=True), start=1):
        if not torch.isfinite(picture).all():
            raise TriLoRAError(f"image {number}: holds values that are not finite; look at it, and at the VAE that decoded it")
        pixels = (picture.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        images.append(_image(f"image {number:04}", image, with_trigger(caption, trigger), bool(caption), image.size, resolution, repeats))
    return images


def summary(images: list[TrainingImage]) -> str:
    """What a person wants to know before a run: counts, captions, repeats, sizes with their crop."""
    sizes: dict[tuple[int, int], list[TrainingImage]] = {}
    numbers: dict[tuple[str, int], int] = {}
    for image in images:
        sizes.setdefault(image.size, []).append(image)
        numbers[image.folder, image.repeats] = numbers.get((image.folder, image.repeats), 0) + 1
    epoch = sum(image.repeats for image in images)
    repeated = f", an epoch shows {epoch}" if epoch != len(images) else ""
    lines = [f"{len(images)} images, {sum(i.captioned for i in images)} with captions{repeated}"]
    if len(numbers) > 1:
        lines += [f"  {folder}: {count} images x {repeats}" for (folder, repeats), count in numbers.items()]
    for (width, height), members in sorted(sizes.items()):
        cropped = sum(m.cropped for m in members) / len(members)
        lines.append(f"  {width} x {height}: {len(members)} images, {cropped:.0%} cropped away")
    return "\n".join(lines)


def _image(name: str, source: Path | Image.Image, prompt: str, captioned: bool, size: tuple[int, int], resolution: int,
           repeats: int, folder: str = "") -> TrainingImage:
    if not 1 <= repeats <= MAX_REPEATS:
        raise TriLoRAError(f"repeats={repeats} for {name}: 1 to {MAX_REPEATS}, the number in the folder's name included")
    bucket = bucket_size(*size, resolution)
    return TrainingImage(name, source, prompt, captioned, bucket, crop_loss(*size, bucket), repeats, folder)


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
