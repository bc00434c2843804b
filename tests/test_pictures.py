"""One picture, from a file or from memory, is what a person sees of it, or is refused in one sentence."""

import numpy as np
import pytest
import torch
from comfyui_trilora.training.dataset import from_pictures, read_folder
from comfyui_trilora.training.pictures import as_seen
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from .test_dataset import picture, refusal


def pixels(folder, resolution=64):
    """Pixels of the only image of a folder, (height, width, 3)."""
    (image,) = read_folder(folder, "sks", resolution)
    return image.pixels()[0]


def saved(folder, name, image, **options):
    image.save(folder / name, **options)
    return folder


def gradient(low=0.0, high=1.0) -> np.ndarray:
    """64 x 64, dark to the left."""
    return np.broadcast_to(np.linspace(low, high, 64), (64, 64)).copy()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("x.tif", gradient().astype(np.float32)),
        ("x.tif", gradient(0, 65535).astype(np.uint16)),
        ("x.png", gradient(0, 65535).astype(np.uint16)),
        ("x.tif", gradient(0, 65535).astype(">u2")),
        ("x.tif", gradient(0, 65535).astype(np.int32)),
        ("x.tif", gradient(0, 255).astype(np.int32)),
        ("x.tif", gradient(0, 255).astype(np.uint16)),
        ("x.tif", gradient(0, 255).astype(np.uint8)),
    ],
    ids=["fractions", "16 bits", "16 bits PNG", "16 bits big-endian", "32 bits of 16", "32 bits of 8", "16 bits of 8", "8 bits"],
)
def test_numbers_of_every_width_are_the_same_picture(tmp_path, name, values):
    found = pixels(saved(tmp_path, name, Image.fromarray(values)))
    assert (found - torch.from_numpy(gradient()).float()[..., None]).abs().max() < 0.01


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (gradient(0, 255).astype(np.float32), "numbers from 0 to 255"),
        (gradient(-1, 1).astype(np.float32), "numbers from -1 to 1"),
        (np.full((64, 64), np.nan, np.float32), "numbers from nan to nan"),
        (gradient(0, 2**31 - 1).astype(np.int32), "numbers from 0 to 2.14748e+09"),
        (gradient(-5, 5).astype(np.int32), "numbers from -5 to 5"),
        (gradient(0, 4095).astype(np.uint16), "numbers from 0 to 4095"),
        (gradient(0, 32767).astype(np.int32), "numbers from 0 to 32767"),
    ],
)
def test_numbers_whose_white_is_unknown_are_refused(tmp_path, values, reason):
    refusal(lambda: pixels(saved(tmp_path, "x.tif", Image.fromarray(values))), "x.tif: holds", reason, "white is unknown")


def test_a_negative_of_16_bits_is_turned_around(tmp_path):
    """TIFF's WhiteIsZero, which Pillow heeds for 8 bits alone."""
    file = tmp_path / "x.tif"
    Image.fromarray(np.full((64, 64), 65535, np.uint16)).save(file, tiffinfo={262: 0})
    with Image.open(file) as stored:
        assert stored.tag_v2[262] == 0, "Pillow has written another tag"
    assert pixels(tmp_path).max() < 0.01


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGBa", "La"])
def test_transparency_is_white_in_every_mode(mode):
    """Left half grey, right half transparent; a palette's transparent colour, and premultiplied colours, too."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((128, 128, 128, 255), (0, 0, 32, 64))
    if mode == "P":
        image = image.convert("RGB").quantize(4)
        image.info["transparency"] = image.getpixel((60, 5))
    elif mode == "PA":
        palette = Image.new("PA", (64, 64), (0, 0))
        palette.putpalette([0, 0, 0, 128, 128, 128])
        palette.paste((1, 255), (0, 0, 32, 64))
        image = palette
    else:
        image = (image.convert("LA") if mode == "La" else image).convert(mode)
    assert image.mode == mode
    found = np.asarray(as_seen(image)) / 255
    assert found[:, 36:].min() > 0.99 and np.abs(found[:, :28] - 0.5).max() < 0.05


def test_an_image_without_any_opaque_pixel_is_refused(tmp_path):
    saved(tmp_path, "x.png", Image.new("RGBA", (64, 64), (200, 0, 0, 0)))
    refusal(lambda: pixels(tmp_path), "x.png: transparent everywhere")


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_the_first_frame_of_an_animation_is_used_and_that_is_said(tmp_path, ending):
    frames = [picture(64, 64, color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:])
    (image,) = images = read_folder(tmp_path, "sks", 64)
    assert image.pixels()[0, 30, 30, 0] > 0.9 and image.pixels()[0, 30, 30, 1:].max() < 0.1
    assert f"the first frame or page alone is used of x.{ending}" in images.remarks


def profile_with_red_and_green_exchanged() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"tmpZ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tmpZ", b"gXYZ", 1)


def test_colours_follow_the_images_profile(tmp_path):
    """A profile in which the first channel is green: what a viewer shows is green."""
    saved(tmp_path, "x.png", picture(64, 64, (255, 0, 0)), icc_profile=profile_with_red_and_green_exchanged())
    found = pixels(tmp_path)[30, 30]
    assert found[1] > 0.9 and found[0] < 0.2


@pytest.mark.parametrize("profile", [b"broken", b"", None])
def test_srgb_and_broken_profiles_change_nothing(tmp_path, profile):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() if profile is None else profile
    for mode in ("RGB", "L"):  # the profile belongs to colours, not to grey
        saved(tmp_path, "x.png", picture(64, 64, (200, 30, 60)).convert(mode), icc_profile=profile)
        expected = np.asarray(picture(64, 64, (200, 30, 60)).convert(mode).convert("RGB"))[0, 0] / 255
        np.testing.assert_allclose(pixels(tmp_path)[30, 30].numpy(), expected, atol=1.5 / 255)


def test_a_lab_tiff_is_its_colours(tmp_path):
    lab = ImageCms.profileToProfile(picture(64, 64, (200, 30, 60)), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    found = pixels(saved(tmp_path, "x.tif", lab))[30, 30]
    np.testing.assert_allclose(found.numpy() * 255, [200, 30, 60], atol=6)


def broken_exif(kind: str) -> dict:
    if kind == "text":
        info = PngInfo()
        info.add_text("Raw profile type exif", "\nexif\n      24\n" + (b"\x00\x08\x00\x02\x01\x12\x00\x03" + b"\0" * 16).hex() + "\n")
        return {"pnginfo": info}
    return {"exif": {"noise": b"Exif\0\0\xff\xd8garbage", "cut off": b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"}[kind]}


@pytest.mark.parametrize("kind", ["text", "noise", "cut off"])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_broken_exif_costs_nothing(tmp_path, kind, ending):
    image = picture(80, 40)
    saved(tmp_path, f"x.{ending}", image, **(broken_exif(kind) if kind != "text" or ending == "png" else {}))
    assert pixels(tmp_path, 128).shape[1] == 2 * pixels(tmp_path, 128).shape[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path, orientation):
    """As Pillow's own function turns it, and without writing EXIF anew, which fails for some phones' data."""
    from PIL import ImageOps

    values = np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    saved(tmp_path, "x.png", Image.fromarray(values), exif=exif)
    with Image.open(tmp_path / "x.png") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    (image,) = read_folder(tmp_path, "sks", 128)
    assert image.size == (expected.shape[1], expected.shape[0]) or max(image.size) < 128
    found = ImageOps.fit(Image.fromarray(expected), image.size, Image.Resampling.LANCZOS)
    assert torch.equal(image.pixels()[0], torch.from_numpy(np.asarray(found, dtype=np.float32) / 255))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(64, 64, 0), "has 0 channels"),
        (torch.zeros(64, 64, 2), "has 2 channels"),
        (torch.zeros(64, 64, 5), "has 5 channels"),
        (torch.zeros(2, 64, 64, 3), "has 4 axes"),
        (torch.zeros(64, 64), "has 2 axes"),
        (torch.zeros(()), "has 0 axes"),
        (torch.zeros(0, 64, 3), "has no pixels"),
        (torch.zeros(64, 0, 3), "has no pixels"),
        (torch.zeros(64, 64, 3, dtype=torch.uint8), "holds uint8 values"),
        (torch.zeros(64, 64, 3, dtype=torch.bool), "holds bool values"),
        (torch.zeros(64, 64, 3, dtype=torch.complex64), "holds complex64 values"),
        (torch.full((64, 64, 3), float("inf")), "not finite"),
        (None, "is a NoneType"),
        ({"samples": 1}, "is a dict"),
    ],
)
def test_pictures_in_memory_of_another_kind_are_refused(value, words):
    refusal(lambda: from_pictures([torch.zeros(64, 64, 3), value], ["a cat"], "", 64), "image 2: ", words)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_in_memory_of_every_precision(dtype):
    (image,) = from_pictures([torch.full((64, 64, 3), 0.5, dtype=dtype)], ["a cat"], "", 64)
    assert (image.pixels() - 0.5).abs().max() < 0.01


def test_what_is_cut_off_or_uncaptioned_in_memory_is_said():
    bright = torch.full((64, 64, 3), 0.5)
    bright[:32] = 200
    images = from_pictures([torch.full((64, 64, 3), 0.5), bright], ["a cat", ""], "", 64)
    assert images.remarks == (
        "1 of 2 images have no caption and are trained with the empty prompt: image 0002",
        "values outside 0 to 1 were cut off in 1 of 2 images: image 0002 (50%)",
    )
    assert not from_pictures([torch.full((64, 64, 3), 1.004)], ["a cat"], "", 64).remarks, "what a VAE overshoots"
