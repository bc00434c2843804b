"""Pictures as training images, from a folder or from memory: checked, captioned, sized, and what was left out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.message_words import counted, few
from .buckets import bucket_size, crop_loss
from .captions import MAX_CAPTION, read_caption, with_trigger
from .folder import CAPTION_TYPE, MAX_REPEATS, Listing, listing, numbered, shown
from .pictures import from_tensor, open_picture, readable_types


@dataclass(frozen=True)
class TrainingImage:
    """One image: its file, or the picture itself; its prompt, and whether that came from a caption of its own; the size
    it is trained at and the share that is cut off for it; how many times an epoch shows it.
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
        """(1, height, width, 3) fp32 in [0, 1]: scaled to cover `size` and cropped at the centre."""
        image = self.source
        if isinstance(image, Path):
            try:
                image, _ = open_picture(image)
            except TriLoRAError as error:  # it was read before: the file has changed since
                raise TriLoRAError(f"{self.name}: cannot be read any more ({error})") from error
        image = ImageOps.fit(image, self.size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]


@dataclass(frozen=True)
class ImageSet(Sequence):
    """Training images, and in words what of their source is not used or not as it may be meant."""

    images: tuple[TrainingImage, ...]
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def read_folder(folder: Path, trigger: str, resolution: int, repeats: int = 1) -> ImageSet:
    """The images of `folders_of(folder)`, by name, each decoded once to be sure that it can be.

    resolution: training area is resolution^2 pixels at the most. repeats: how many times an epoch shows each image;
    those of a folder "25_name" 25 times as often. Raises TriLoRAError for a folder without images, images and captions
    that cannot be read, and images without a caption where neither a trigger word nor the folder's "25_name" stands in.
    """
    if not folder.is_dir():
        raise TriLoRAError(f"folder={shown(folder.name)!r}: there is no such folder; create it and put images in")
    types = readable_types()
    files = listing(folder, types)
    if not files.images:
        unread = f" that can be read (but {few(_types(files.others))})" if files.others else ""
        raise TriLoRAError(f"folder={shown(folder.name)!r}: holds no images{unread}; put files of type {', '.join(types)}"
                           " in, with a .txt caption of the same name beside each")
    return _Reader(folder, files).images(trigger, resolution, repeats)


class _Reader:
    """Reads the files of one folder and keeps account of what is wrong with them."""

    def __init__(self, folder: Path, files: Listing):
        self.folder, self.files, self.broken = folder, files, dict(files.broken)
        self.animated: list[str] = []
        self.users: dict[Path | None, list[str]] = defaultdict(list)  # caption file -> names of its images
        for place, path in files.images:
            self.users[files.caption_of(place, path)].append(self._name(path))

    def images(self, trigger: str, resolution: int, repeats: int) -> ImageSet:
        """See `read_folder`."""
        sizes = {path: self._size(path) for _, path in self.files.images}
        captions = {path: self._read(read_caption, path) for path in self.users if path}
        self._refuse_broken(set(captions))
        images, uncaptioned, promptless = [], [], []
        for place, path in self.files.images:
            times, stand_in = numbered(place.name) or (1, "")
            caption, name = captions.get(self.files.caption_of(place, path)), self._name(path)
            prompt = with_trigger(caption, trigger) or stand_in
            if caption is None:
                (uncaptioned if prompt else promptless).append(name)
            images.append(_image(name, path, prompt, caption is not None, sizes[path], resolution, repeats * times,
                                 shown(place.name)))
        if promptless:
            raise TriLoRAError(f"folder={shown(self.folder.name)!r}: {len(promptless)} of {len(images)} images have no "
                               f"caption ({few(promptless)}); add .txt files or set a trigger word")
        stand_in = "the trigger word alone" if trigger.strip() else "their folder's name"
        return ImageSet(tuple(images), (*_uncaptioned(uncaptioned, images, stand_in), *self._remarks()))

    def _name(self, path: Path) -> str:
        return shown(path.relative_to(self.folder).as_posix())

    def _read(self, read, path: Path):
        if path in self.broken:
            return None
        try:
            return read(path)
        except TriLoRAError as error:
            self.broken[path] = str(error)
            return None

    def _size(self, path: Path) -> tuple[int, int] | None:
        read = self._read(open_picture, path)
        if read is None:
            return None
        picture, more = read
        if more:
            self.animated.append(self._name(path))
        return picture.size

    def _refuse_broken(self, captions: set[Path]) -> None:
        """Raise for all images, and captions of images, that cannot be read at once."""
        texts = [path for path in self.broken if path in captions]
        images = [path for path in self.broken if path.suffix.lower() != CAPTION_TYPE]
        parts = []
        for paths, what, remedy in ((images, f"{len(self.files.images)} images", "replace or remove them"),
                                    (texts, f"{len(captions)} captions", "save them as plain text in UTF-8")):
            if paths:
                reasons = few(f"{self._name(path)}: {self.broken[path]}" for path in paths)
                parts.append(f"{len(paths)} of {what} cannot be read ({reasons}); {remedy}")
        if parts:
            raise TriLoRAError(f"folder={shown(self.folder.name)!r}: {'; and '.join(parts)}")

    def _remarks(self) -> list[str]:
        """What the folder holds and the set does not, or not as it may be meant."""
        files = self.files
        shared = [" and ".join(names[:3]) for file, names in self.users.items() if file and len(names) > 1]
        orphans = [self._name(path) for path in files.captions.values() if path not in self.users]
        said = {
            "images share one caption: {}": shared,
            "captions that belong to no image are not used: {}": orphans,
            "the first frame or page alone is used of {}": self.animated,
            "files of other types are not used: {}": _types(files.others),
            "images in other folders are not used: {}": [self._name(path) for path in files.unread],
        }
        return [text.format(few(names)) for text, names in said.items() if names]


def from_pictures(pictures: Sequence[Tensor], captions: Sequence[str], trigger: str, resolution: int,
                  repeats: int = 1) -> ImageSet:
    """Pictures in memory, (height, width, channels) in [0, 1] with 1, 3 or 4 channels; one caption for all or one each.

    They are taken in 8 bits, as a PNG file of them would be. Raises TriLoRAError for no pictures, pictures of another
    kind or with values that are not finite, and a number of captions that is neither 1 nor that of the pictures (none
    needs a trigger word).
    """
    if not pictures:
        raise TriLoRAError("images: there are none")
    if len(captions) not in ((0, 1, len(pictures)) if trigger.strip() else (1, len(pictures))):
        or_trigger = "" if trigger.strip() else ", or set a trigger word"
        raise TriLoRAError(f"captions: {counted(len(captions), 'line')} for {counted(len(pictures), 'image')}; give one "
                           f"line for all, or one for each{or_trigger}")
    each = captions if len(captions) == len(pictures) else [*captions, ""][:1] * len(pictures)
    images, outside = [], {}
    for number, (picture, caption) in enumerate(zip(pictures, each, strict=True), start=1):
        name = f"image {number:04}"
        try:
            image, share = from_tensor(picture)
        except TriLoRAError as error:
            raise TriLoRAError(f"image {number}: {error}") from error
        if share > 0.01:
            outside[name] = share
        prompt = with_trigger(caption, trigger)
        images.append(_image(name, image, prompt, bool(caption), image.size, resolution, repeats))
    stand_in = "the trigger word alone" if trigger.strip() else "the empty prompt"
    remarks = _uncaptioned([image.name for image in images if not image.captioned], images, stand_in)
    if outside:
        shares = few(f"{name} ({share:.0%})" for name, share in outside.items())
        remarks.append(f"values outside 0 to 1 were cut off in {len(outside)} of {len(images)} images: {shares}")
    return ImageSet(tuple(images), tuple(remarks))


def summary(images: Sequence[TrainingImage]) -> str:
    """What a person wants to know before a run: counts, captions, repeats, sizes with their crop."""
    sizes: dict[tuple[int, int], list[TrainingImage]] = {}
    numbers: dict[tuple[str, int], int] = {}
    for image in images:
        sizes.setdefault(image.size, []).append(image)
        numbers[image.folder, image.repeats] = numbers.get((image.folder, image.repeats), 0) + 1
    epoch = sum(image.repeats for image in images)
    repeated = f", an epoch shows {epoch}" if epoch != len(images) else ""
    lines = [f"{counted(len(images), 'image')}, {sum(i.captioned for i in images)} with captions{repeated}"]
    if len(numbers) > 1:
        lines += [f"  {folder}: {counted(count, 'image')} x {repeats}" for (folder, repeats), count in numbers.items()]
    for (width, height), members in sorted(sizes.items()):
        cropped = sum(m.cropped for m in members) / len(members)
        lines.append(f"  {width} x {height}: {counted(len(members), 'image')}, {cropped:.0%} cropped away")
    return "\n".join(lines)


def _uncaptioned(names: list[str], images: list[TrainingImage], stand_in: str) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} of {len(images)} images have no caption and are trained with {stand_in}: {few(names)}"]


def _types(files: list[Path]) -> list[str]:
    """How many files there are of each ending, with the name of one."""
    first = {path.suffix.lower(): path.name for path in reversed(files)}
    counts = Counter(path.suffix.lower() for path in files)
    return [f"{count} {shown(ending) or 'of no type'} ({shown(first[ending])})" for ending, count in counts.items()]


def _image(name: str, source: Path | Image.Image, prompt: str, captioned: bool, size: tuple[int, int], resolution: int,
           repeats: int, folder: str = "") -> TrainingImage:
    if not 1 <= repeats <= MAX_REPEATS:
        raise TriLoRAError(f"repeats={repeats} for {name}: must be 1 to {MAX_REPEATS}, the number in the folder's name "
                           "included")
    if len(prompt) > MAX_CAPTION:
        raise TriLoRAError(f"{name}: its caption with the trigger has {len(prompt)} characters; must be at most {MAX_CAPTION}")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise TriLoRAError(f"{name}: its caption or its folder's name holds broken characters; write it again")
    bucket = bucket_size(*size, resolution)
    return TrainingImage(name, source, prompt, captioned, bucket, crop_loss(*size, bucket), repeats, folder)
