"""Repeats, kohya's folder names, and pictures that come from memory instead of a folder."""

import numpy as np
import pytest
import torch
from comfyui_trilora.training.dataset import MAX_REPEATS, from_pictures, read_folder, summary
from comfyui_trilora.training.folder import folders_of, numbered
from PIL import Image

from .test_dataset import folder_with, picture, refusal


def kohya(tmp_path):
    """img/25_sks dog with two captioned images, img/1_dog with one that has no caption, and what must not be read."""
    folder = tmp_path / "img"
    for name, images in (("25_sks dog", {"a": "sks dog, grass", "b": "sks dog, snow"}), ("1_dog", {"c": None}), ("old", {"d": "a cat"}), ("0_none", {"e": "a cat"})):
        part = folder / name
        part.mkdir(parents=True)
        for stem, caption in images.items():
            picture(64, 64).save(part / f"{stem}.png")
            if caption:
                (part / f"{stem}.txt").write_text(caption)
    return folder


@pytest.mark.parametrize(
    ("name", "found"),
    [("25_sks dog", (25, "sks dog")), ("1_x", (1, "x")), ("010_a_b", (10, "a_b")), ("0_x", None), ("x_25", None), ("25", None), ("25_", None), ("-3_x", None),
     ("20240101_trip", None), ("2.5_x", None), ("photos", None)],
)  # fmt: skip
def test_folder_names(name, found):
    assert numbered(name) == found


def test_every_image_is_repeated_as_the_widget_says(tmp_path):
    folder = folder_with(tmp_path, {"a": "a cat", "b": "a dog"})
    images = read_folder(folder, "sks", 64, repeats=25)
    assert [i.repeats for i in images] == [25, 25] and [i.repeats for i in read_folder(folder, "sks", 64)] == [1, 1]
    assert summary(images).splitlines()[0] == "2 images, 2 with captions, an epoch shows 50"
    assert summary(images).splitlines()[1:] == summary(read_folder(folder, "sks", 64)).splitlines()[1:]
    refusal(lambda: read_folder(folder, "sks", 64, repeats=0), "repeats=0", "1 to 10000")


def test_numbered_folders_inside_are_read_and_no_others(tmp_path):
    folder = kohya(tmp_path)
    images = read_folder(folder, "", 64)
    assert [(i.name, i.repeats, i.folder) for i in images] == [("1_dog/c.png", 1, "1_dog"), ("25_sks dog/a.png", 25, "25_sks dog"), ("25_sks dog/b.png", 25, "25_sks dog")]
    assert summary(images).splitlines()[:3] == ["3 images, 2 with captions, an epoch shows 51", "  1_dog: 1 image x 1", "  25_sks dog: 2 images x 25"]
    assert [i.repeats for i in read_folder(folder, "", 64, repeats=2)] == [2, 50, 50], "the widget counts on top of the names"
    assert [p.name for p in folders_of(folder)] == ["img", "1_dog", "25_sks dog"]


def test_a_numbered_folder_that_is_chosen_itself(tmp_path):
    folder = kohya(tmp_path) / "25_sks dog"
    assert [(i.name, i.repeats, i.prompt) for i in read_folder(folder, "", 64)] == [("a.png", 25, "sks dog, grass"), ("b.png", 25, "sks dog, snow")]
    refusal(lambda: read_folder(folder, "", 64, repeats=MAX_REPEATS), f"repeats={25 * MAX_REPEATS} for a.png", "the number in the folder's name included")


def test_a_folders_name_stands_in_for_missing_captions_where_no_trigger_does(tmp_path):
    folder = kohya(tmp_path)
    images = read_folder(folder, "", 64)
    assert [i.prompt for i in images] == ["dog", "sks dog, grass", "sks dog, snow"]
    assert images.remarks == (
        "1 of 3 images have no caption and are trained with their folder's name: 1_dog/c.png",
        "images in other folders are not used: 0_none, old",
    )
    assert [i.prompt for i in read_folder(folder, "ohwx", 64)] == ["ohwx", "ohwx, sks dog, grass", "ohwx, sks dog, snow"]
    picture(64, 64).save(folder / "loose.png")
    refusal(lambda: read_folder(folder, "", 64), "folder='img'", "1 of 4 images have no caption (loose.png)")


def noise(height, width, channels=3, seed=0):
    return torch.rand((height, width, channels), generator=torch.Generator().manual_seed(seed))


def test_pictures_are_what_their_files_would_be(tmp_path):
    """The same prompts, sizes, crops and pixels as from a folder of PNG files with these captions."""
    pictures = [noise(96, 80), noise(64, 200, seed=1), noise(64, 64, 4, seed=2)]
    captions = ["a cat", "a dog, sks", "a bird"]
    for i, (image, caption) in enumerate(zip(pictures, captions, strict=True)):
        Image.fromarray((image * 255).round().to(torch.uint8).numpy()).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    found, expected = from_pictures(pictures, captions, "sks", 128, repeats=3), read_folder(tmp_path, "sks", 128, repeats=3)
    assert [(i.prompt, i.size, i.cropped, i.repeats, i.captioned) for i in found] == [(i.prompt, i.size, i.cropped, i.repeats, i.captioned) for i in expected]
    assert all(torch.equal(a.pixels(), b.pixels()) for a, b in zip(found, expected, strict=True))
    assert len({i.size for i in found}) == 2 and summary(found) == summary(expected)


def test_a_picture_of_the_training_size_is_taken_as_it_is():
    """What the base model drew at the training size is neither scaled nor cropped: only rounded to 8 bits."""
    image = noise(128, 192)
    (found,) = from_pictures([image], ["x"], "", 192)
    assert found.size == (192, 128) and found.cropped == 0
    assert (found.pixels()[0] - image).abs().max() <= 0.5 / 255 + 1e-6


def test_grey_and_out_of_range_values():
    (found,) = from_pictures([torch.full((64, 64, 1), 0.5)], ["x"], "", 64)
    assert (found.pixels() - 0.5).abs().max() < 0.01 and found.pixels().shape == (1, 64, 64, 3)
    (found,) = from_pictures([torch.tensor([-0.5, 0.5, 1.5]).expand(64, 64, 3)], ["x"], "", 64)
    np.testing.assert_allclose(found.pixels()[0, 5, 5].numpy(), [0, 0.5, 1], atol=0.01)


def test_captions_for_all_or_for_each():
    three = [noise(64, 64, seed=i) for i in range(3)]
    assert [i.prompt for i in from_pictures(three, ["a cat"], "", 64)] == ["a cat"] * 3
    assert [i.prompt for i in from_pictures(three, ["a", "b", "c"], "sks", 64)] == ["sks, a", "sks, b", "sks, c"]
    assert [(i.prompt, i.captioned) for i in from_pictures(three, [], "sks", 64)] == [("sks", False)] * 3
    assert [i.prompt for i in from_pictures(three[:1], ["a"], "", 64)] == ["a"]
    for captions, trigger in ((["a", "b"], "sks"), (["a", "b"], ""), ([], ""), (list("abcd"), "")):
        refusal(lambda captions=captions, trigger=trigger: from_pictures(three, captions, trigger, 64), f"captions: {len(captions)} lines for 3 images", "one line for all")


def test_bad_pictures_are_refused():
    refusal(lambda: from_pictures([], ["a"], "", 64), "images: there are none")
    broken = noise(64, 64)
    broken[3, 4, 1] = float("nan")
    refusal(lambda: from_pictures([noise(64, 64), broken], ["a"], "", 64), "image 2: holds values that are not finite")
