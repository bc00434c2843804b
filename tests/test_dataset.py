"""A folder of images as a dataset: what is read, how it is sized, what is refused."""

import re

import numpy as np
import pytest
import torch
from comfyui_trilora.training.buckets import STEP, bucket_size, crop_loss
from comfyui_trilora.training.captions import tag_frequency, with_trigger
from comfyui_trilora.training.dataset import read_folder, summary
from comfyui_trilora.training.folder import IMAGE_TYPES
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from PIL import Image

SIZES = [(512, 512), (640, 480), (1000, 700), (3000, 2000), (300, 301), (1920, 1080), (2000, 500), (1200, 400), (777, 1234), (4000, 600), (64, 64)]
TURN_BY_90 = 6  # EXIF orientation: the camera was held upright, the file lies on its side


def picture(width, height, color=(200, 30, 60)) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def folder_with(tmp_path, captions: dict, size=(96, 80)):
    """A folder of PNG files, name -> caption or None."""
    folder = tmp_path / "photos"
    folder.mkdir(exist_ok=True)
    for name, caption in captions.items():
        picture(*size).save(folder / f"{name}.png")
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def refusal(action, *words) -> None:
    with pytest.raises(TriLoRAError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not re.search(r"\.\s+[A-Z]", message), f"more than one sentence: {message}"


def test_images_captions_and_order(tmp_path):
    folder = folder_with(tmp_path, {"b": "a dog,\n on grass \n", "a": "a cat", "c": "  \n"})
    (folder / "notes.md").write_text("no image")
    (folder / "more").mkdir()
    picture(8, 8).save(folder / "more" / "deep.png")
    images = read_folder(folder, "sks", 512)
    assert [i.name for i in images] == ["a.png", "b.png", "c.png"]
    assert [i.prompt for i in images] == ["sks, a cat", "sks, a dog, on grass", "sks"]
    assert [i.captioned for i in images] == [True, True, False]


@pytest.mark.parametrize("ending", [".png", ".PNG", ".jpg", ".JPEG", ".webp", ".bmp", ".gif", ".tif", ".tiff"])
def test_every_type_is_read(tmp_path, ending):
    picture(40, 30).save(tmp_path / f"x{ending}")
    (image,) = read_folder(tmp_path, "sks", 256)
    pixels = image.pixels()
    assert pixels.shape == (1, image.size[1], image.size[0], 3) and pixels.dtype == torch.float32
    assert (pixels - torch.tensor([200, 30, 60]) / 255).abs().max() < 0.06 and ending.lower() in IMAGE_TYPES


def test_pixels_cover_the_bucket_and_crop_the_centre(tmp_path):
    """Left third red, middle green, right blue: a square crop of a 3:1 image is the middle third, scaled up."""
    wide = np.zeros((50, 150, 3), np.uint8)
    for i in range(3):
        wide[:, 50 * i:50 * (i + 1), i] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (image,) = read_folder(tmp_path, "sks", 64)
    assert image.size == (64, 64) and image.cropped == pytest.approx(2 / 3)
    pixels = image.pixels()[0]
    assert pixels.shape == (64, 64, 3) and 0 <= pixels.min() and pixels.max() <= 1
    assert pixels[:, 8:-8, 1].min() > 0.95 and pixels[:, 8:-8, [0, 2]].max() < 0.05


def test_exif_rotation(tmp_path):
    """A photo that lies on its side in the file is sized and read upright."""
    lying = np.zeros((40, 80, 3), np.uint8)
    lying[:, :40] = 255  # the white half is to the left in the file, on top once turned
    exif = Image.Exif()
    exif[0x0112] = TURN_BY_90
    Image.fromarray(lying).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    (image,) = read_folder(tmp_path, "sks", 256)
    assert image.size[1] > image.size[0]
    pixels = image.pixels()[0]
    middle = image.size[1] // 2
    assert pixels[: middle - 16].min() > 0.9 and pixels[middle + 16 :].max() < 0.1


def transparent(kind: str) -> Image.Image:
    """Left half opaque dark blue, right half transparent over black."""
    rgba = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    rgba.paste((10, 20, 90, 255), (0, 0, 32, 64))
    if kind == "LA":
        return rgba.convert("LA")
    if kind == "palette":
        flat = Image.new("P", (64, 64), 0)
        flat.putpalette([0, 0, 0, 10, 20, 90])
        flat.paste(1, (0, 0, 32, 64))
        flat.info["transparency"] = 0
        return flat
    return rgba


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette"])
def test_transparency_becomes_white(tmp_path, kind):
    transparent(kind).save(tmp_path / "x.png")
    pixels = read_folder(tmp_path, "sks", 64)[0].pixels()[0]
    assert pixels[:, 36:].min() > 0.99 and pixels[:, :28].max() < 0.4


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16"])
def test_other_modes_keep_their_colours(tmp_path, mode):
    """Half grey everywhere; 16-bit pictures are scaled, not cut off at white."""
    if mode == "I;16":
        image = Image.fromarray(np.full((40, 40), 32768, np.uint16))
    else:
        image = Image.new("RGB", (40, 40), "white" if mode == "1" else (128, 128, 128)).convert(mode, palette=Image.Palette.ADAPTIVE)
    name = "x.tif" if mode == "CMYK" else "x.png"
    image.save(tmp_path / name)
    with Image.open(tmp_path / name) as stored:
        assert stored.mode.split(";")[0] == mode.split(";")[0]
    pixels = read_folder(tmp_path, "sks", 64)[0].pixels()
    assert (pixels - (1.0 if mode == "1" else 0.5)).abs().max() < 0.03


def test_missing_captions_are_counted_and_named(tmp_path):
    folder = folder_with(tmp_path, {f"{i}": None for i in range(7)} | {"x": "a cat"})
    images = read_folder(folder, "sks", 512)
    (remark,) = images.remarks
    assert remark.startswith("7 of 8 images have no caption and are trained with the trigger word alone")
    assert remark.endswith(": 0.png, 1.png, 2.png, 3.png, 4.png and 2 more")
    assert summary(images).splitlines() == ["8 images, 1 with captions", f"  {images[0].size[0]} x {images[0].size[1]}: 8 images, {images[0].cropped:.0%} cropped away"]
    assert not read_folder(folder_with(tmp_path / "photos", {"only": "a cat"}), "sks", 512).remarks


def test_bad_folders_are_refused(tmp_path):
    refusal(lambda: read_folder(tmp_path / "gone", "sks", 512), "folder='gone'", "no such folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("a cat")
    refusal(lambda: read_folder(tmp_path / "empty", "sks", 512), "folder='empty'", "holds no images")
    folder = folder_with(tmp_path, {"a": None, "b": "a cat", "c": None})
    for trigger in ("", "  "):
        refusal(lambda trigger=trigger: read_folder(folder, trigger, 512), "folder='photos'", "2 of 3 images have no caption", "a.png, c.png", "trigger")
    assert len(read_folder(folder_with(tmp_path / "photos", {"only": "a cat"}), "", 512)) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "an empty file"), (b"a shopping list", "not an image that can be read"), (None, "cut off or damaged")],
    ids=["empty", "text", "cut off"],
)
def test_an_unreadable_image_is_named(tmp_path, content, reason):
    folder = folder_with(tmp_path, {"a": "a cat", "b": "a dog"})
    file = folder / "b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:2000] if content is None else content)
    refusal(lambda: read_folder(folder, "sks", 512), f"1 of 2 images cannot be read (b.png: {reason}", "replace or remove")


@pytest.mark.parametrize(
    ("caption", "trigger", "prompt"),
    [("a cat", "sks", "sks, a cat"), (None, "sks", "sks"), ("", " sks ", "sks"), ("a cat", "", "a cat"), (None, "", ""),
     ("sks, a cat", "sks", "sks, a cat"), ("a photo of SKS", "sks", "a photo of SKS"), ("one sks, two", "sks", "one sks, two"),
     ("a photo of sks dog on grass", "sks dog", "a photo of sks dog on grass"), ("asks why", "sks", "sks, asks why"), ("sks-like", "sk", "sk, sks-like"),
     ("c++ (style)", "c++", "c++ (style)"), ("a cat", "a cat", "a cat"),
     ("1girl, smile", "sks", "sks, 1girl, smile"), ("1girl,sks,smile", "sks", "sks, 1girl, smile"), ("sks,1girl,smile", "sks", "sks, 1girl, smile"),
     ("1girl, SKS , smile, sks", " sks ", "sks, 1girl, smile"), ("sks", "sks", "sks"), ("sks,, a cat,", "sks", "sks, a cat"),
     ("1girl, sks hair", "sks", "1girl, sks hair"), ("1girl, sks dog", "SKS Dog", "SKS Dog, 1girl"), ("1girl, a, b", "a, b", "1girl, a, b")],
)  # fmt: skip
def test_the_trigger_comes_once(caption, trigger, prompt):
    assert with_trigger(caption, trigger) == prompt


def test_tag_frequency():
    """Number of captions that hold a tag, however often, most frequent first, then by name."""
    found = tag_frequency(["cat, grass, cat", " grass ,dog", "zebra,, grass", ""])
    assert list(found.items()) == [("grass", 3), ("cat", 1), ("dog", 1), ("zebra", 1)]


@pytest.mark.parametrize("resolution", [64, 256, 512, 768, 1000, 1024])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_buckets(size, resolution):
    """Multiples of 64 within the area; the shape within one step of the image's; turned images alike."""
    width, height = bucket_size(*size, resolution)
    assert width % STEP == height % STEP == 0 and min(width, height) >= STEP and width * height <= resolution**2
    longer, shorter, wanted = max(width, height), min(width, height), max(size) / min(size)
    if (width, height) != (STEP, STEP):
        assert abs(shorter - longer / wanted) <= STEP
    if wanted <= 3 and resolution >= 512:
        assert width * height >= 0.75 * resolution**2 and crop_loss(*size, (width, height)) <= 0.12
    assert bucket_size(size[1], size[0], resolution) == (height, width)


@pytest.mark.parametrize(
    ("size", "resolution", "bucket"),
    [((800, 800), 512, (512, 512)), ((1500, 1000), 512, (576, 384)), ((1000, 1500), 512, (384, 576)), ((1920, 1080), 1024, (1344, 768)),
     ((1200, 400), 512, (832, 256)), ((400, 1200), 512, (256, 832)), ((5000, 100), 64, (64, 64)), ((10, 10), 32, (64, 64))],
)  # fmt: skip
def test_known_buckets(size, resolution, bucket):
    assert bucket_size(*size, resolution) == bucket


def test_crop_loss():
    assert crop_loss(800, 400, (512, 256)) == pytest.approx(0) and crop_loss(300, 100, (64, 64)) == pytest.approx(2 / 3)
    assert crop_loss(100, 200, (64, 64)) == pytest.approx(1 / 2)
