"""One picture, from a file or from memory, as a person sees it: upright, in sRGB, 8 bits, on white."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError
from torch import Tensor

from ..trilora_ops.errors import TriLoRAError
from .folder import IMAGE_TYPES

# what a file may hold, whatever its ending says; not EPS, for which Pillow starts another program
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "AVIF", "HEIF", "JXL")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ROUNDING = 1e-3
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # a TIFF tag: Pillow turns 8 bits around, not 16


def readable_types() -> list[str]:
    """Endings of `IMAGE_TYPES` that this installation of Pillow reads."""
    Image.init()
    formats = Image.registered_extensions()
    return [ending for ending in IMAGE_TYPES if formats.get(ending) in Image.OPEN]


def open_picture(path: Path) -> tuple[Image.Image, bool]:
    """(RGB picture, whether the file holds more than this first frame or page).

    The file must be a regular one. Raises TriLoRAError, without the file's name, for one that cannot be read whole.
    """
    try:
        if not path.stat().st_size:
            raise TriLoRAError("an empty file")
        with _no_half_pictures(), Image.open(path, formats=[f for f in _FORMATS if f in Image.OPEN]) as image:
            image.load()
            more = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: one photo and its previews
            return as_seen(image), bool(more)
    except TriLoRAError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for broken files, with the whole path in their words
        raise TriLoRAError(_reason(error)) from error


def as_seen(image: Image.Image) -> Image.Image:
    """An RGB copy: turned as its camera was held, colours by its profile, transparency on white.

    16 bits of grey are scaled; so are fractions from 0 to 1. Raises TriLoRAError for numbers whose white is unknown,
    and for a picture that is transparent everywhere.
    """
    turn, profile = _TURNS.get(_orientation(image)), image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image, alpha = _in_8_bits(image), None
    else:
        image, alpha = _without_alpha(image)
    image = _in_srgb(image, profile)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image.transpose(turn) if turn is not None else image


def from_tensor(picture: Tensor) -> tuple[Image.Image, float]:
    """(RGB picture, share of its values that lay outside [0, 1] and were cut off) of a (height, width, channels) tensor.

    Raises TriLoRAError, without the picture's name, for another shape, whole numbers, and values that are not finite.
    """
    if not isinstance(picture, Tensor) or picture.ndim != 3:
        found = f"has {picture.ndim} axes" if isinstance(picture, Tensor) else f"is a {type(picture).__name__}"
        raise TriLoRAError(f"{found}; must have three: height, width and channels")
    if picture.shape[-1] not in (1, 3, 4):
        raise TriLoRAError(f"has {picture.shape[-1]} channels; must have 1 (grey), 3 (RGB) or 4 (RGBA)")
    if not picture.numel():
        raise TriLoRAError(f"has no pixels (height {picture.shape[0]}, width {picture.shape[1]})")
    if not picture.is_floating_point():
        raise TriLoRAError(f"holds {str(picture.dtype).removeprefix('torch.')} values; must be fractions from 0 to 1")
    if not torch.isfinite(picture).all():
        raise TriLoRAError("holds values that are not finite; look at it, and at the VAE that decoded it")
    values = picture.detach().float().cpu()
    outside = float(((values < -0.01) | (values > 1.01)).float().mean())
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    return as_seen(image), outside


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        return value if isinstance(value, int) else 1
    except Exception:  # broken EXIF comes as half a dozen kinds of exceptions, and says nothing about the picture
        return 1


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey from a picture of numbers with more than 8 bits."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    white = _white(image, low, high)
    if white is None:
        raise TriLoRAError(f"holds numbers from {low:.6g} to {high:.6g}, so its white is unknown; save it in 8 bits")
    grey = np.rint(values.astype(np.float64).clip(0, white) * (255 / white)).astype(np.uint8)
    inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    return Image.fromarray(255 - grey if inverted else grey)


def _white(image: Image.Image, low: float, high: float) -> int | None:
    """The number that is white: 1, that of 8 bits or that of 16; None where the picture could mean several."""
    if image.mode == "F":
        return 1 if low >= -_ROUNDING and high <= 1 + _ROUNDING else None
    if low < 0 or high > 65535:
        return None
    if high <= 255:  # as 16 bits it would be black all over
        return 255
    # 10 and 12 bits, too, are stored in 16; in mode I a TIFF's numbers may be signed
    known = 32768 if image.mode == "I" and image.format == "TIFF" else 4096
    return 65535 if high >= known else None


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """(colours, transparency); a palette is looked up, premultiplied colours are divided."""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    elif image.mode == "PA" or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    if image.mode not in ("LA", "RGBA"):
        return image, None
    alpha = image.getchannel("A")
    if alpha.getextrema()[1] == 0:
        raise TriLoRAError("transparent everywhere")
    return image.convert(image.mode[:-1]), alpha


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB; a profile that is broken or belongs to other channels is not used."""
    if profile or image.mode == "LAB":
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):  # the last: no LittleCMS
            pass
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be read"
    if isinstance(error, PermissionError):
        return "may not be opened"
    return f"cut off or damaged: {type(error).__name__}"


@contextmanager
def _no_half_pictures() -> Iterator[None]:
    """Pillow's switch for grey instead of the missing rest is one for the whole program: other packs turn it on."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
