"""What really lies in people's folders: every file is read, or named, or the system's own; nothing hangs."""

import os
import re
import socket
import struct
import zlib

import numpy as np
import pytest
import torch
from comfyui_trilora.training.dataset import read_folder
from comfyui_trilora.training.folder import IMAGE_TYPES, shown, stamps
from comfyui_trilora.training.pictures import readable_types
from PIL import Image, ImageFile

from .test_dataset import folder_with, picture, refusal
from .test_pictures import pixels, saved


def test_system_files_are_ignored(tmp_path):
    folder = folder_with(tmp_path, {"01": "a cat"})
    for name in ("._01.png", ".hidden.jpg", "Thumbs.db", "desktop.ini", ".DS_Store", "._01.txt", "01.png:Zone.Identifier", "Icon\r"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
        (folder / name).mkdir()
        picture(8, 8).save(folder / name / "01.png")
    images = read_folder(folder, "", 64)
    assert [image.name for image in images] == ["01.png"] and not images.remarks


@pytest.mark.parametrize(("ending", "kind"), [("jfif", "JPEG"), ("JPE", "JPEG"), ("avif", "AVIF"), ("apng", "PNG"), ("jp2", "JPEG2000")])
def test_more_types_are_read_where_pillow_can(tmp_path, ending, kind):
    if f".{ending.lower()}" not in readable_types():
        pytest.skip(f"this Pillow reads no {ending}")
    saved(tmp_path, f"x.{ending}", picture(64, 64), format=kind)
    assert (pixels(tmp_path)[30, 30] - torch.tensor([200, 30, 60]) / 255).abs().max() < 0.08


def test_types_that_cannot_be_read_are_counted_and_named(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, {"01": "a cat"})
    for name in ("a.xyz", "b.xyz", "clip.mp4", "LICENSE"):
        (folder / name).write_bytes(b"x")
    (remark,) = read_folder(folder, "", 64).remarks
    assert remark == "files of other types are not used: 1 of no type (LICENSE), 2 .xyz (a.xyz), 1 .mp4 (clip.mp4)"
    monkeypatch.delitem(Image.EXTENSION, ".heic", raising=False)
    (folder / "01.png").rename(folder / "01.heic")
    refusal(lambda: read_folder(folder, "", 64), "holds no images that can be read (but ", "1 .heic (01.heic)")
    assert ".heic" in IMAGE_TYPES, "a folder of them is offered, and says what is missing"


def test_a_wrong_ending_is_no_matter(tmp_path):
    saved(tmp_path, "x.png", picture(64, 64), format="JPEG")
    assert (pixels(tmp_path)[30, 30] - torch.tensor([200, 30, 60]) / 255).abs().max() < 0.03


def eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"


def huge_png() -> bytes:
    """A file of 100 bytes that says 60,000 x 60,000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (eps(), "not an image"),
        (huge_png(), "more than 178,956,970 pixels"),
        (b"<html>", "not an image"),
        (b"GIF89a", "not an image"),
        (b"\0" * 100, "not an image"),
        (b"BM" + b"\xff" * 60, ""),
        (b"II*\0\x08\0\0\0\0\0", ""),
    ],
)
def test_hostile_files_are_named(tmp_path, content, reason):
    (tmp_path / "x.png").write_bytes(content)
    picture(64, 64).save(tmp_path / "y.png")
    refusal(lambda: read_folder(tmp_path, "sks", 64), f"1 of 2 images cannot be read (x.png: {reason}", "replace or remove")


def test_every_broken_image_is_named_at_once(tmp_path):
    folder = folder_with(tmp_path, {f"{i}": "a cat" for i in range(9)})
    for i in range(8):
        (folder / f"{i}.png").write_bytes(b"")
    refusal(lambda: read_folder(folder, "", 64), "8 of 9 images cannot be read (0.png: an empty file, ", "4.png: an empty file and 3 more)")


def test_half_an_image_is_refused_though_another_pack_allows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    saved(tmp_path, "x.jpg", Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)))
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:2000])
    refusal(lambda: read_folder(tmp_path, "sks", 64), "x.jpg: cut off or damaged")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_what_is_no_file_is_named_and_never_opened(tmp_path):
    folder = folder_with(tmp_path, {"01": "a cat"})
    os.mkfifo(folder / "02.png")
    (folder / "03.png").symlink_to(folder / "gone.png")
    (folder / "04.png").symlink_to("04.png")
    (folder / "05.png").mkdir()
    (folder / "06.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path is short
        try:
            server.bind("07.png")
        finally:
            os.chdir(here)
        refusal(lambda: read_folder(folder, "", 64), "6 of 7 images cannot be read", "02.png: not a regular file", "03.png: a link to nothing",
                "04.png: a link to nothing", "05.png: a folder", "06.png: not a regular file and 1 more")  # fmt: skip
        assert len(stamps(folder)) == 8
    os.mkfifo(folder / "pipe")
    for name in ("02", "03", "04", "06", "07"):
        (folder / f"{name}.png").unlink()
    (folder / "05.png").rmdir()
    assert read_folder(folder, "", 64).remarks == ("files of other types are not used: 1 of no type (pipe)",)


def test_a_numbered_folder_that_leads_back_is_not_read_again(tmp_path):
    folder = folder_with(tmp_path, {"01": "a cat"})
    (folder / "5_cat").symlink_to(folder)
    assert [image.name for image in read_folder(folder, "", 64)] == ["01.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()

    def refuse(path="."):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    refusal(lambda: read_folder(tmp_path / "photos", "sks", 64), "folder='photos': cannot be read (PermissionError)")


def test_names_in_messages_are_bounded_and_can_be_shown(tmp_path):
    for name in ("a" * 200, "line\nbreak", "tab\tand \x1b[31mred", "\u202eright to left", os.fsdecode(b"caf\xe9"), "<img src=x>"):
        assert len(shown(name)) <= 80 and shown(name).isprintable() and shown(name).encode()
    assert shown("01 café.png") == "01 café.png"
    for i in range(30):
        (tmp_path / f"{i:02}{'n' * 200}\n.png").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        read_folder(tmp_path, "sks", 64)
    assert len(str(error.value)) < 800 and "\n" not in str(error.value)


def test_a_name_that_is_no_text_is_read(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.png")
    picture(64, 64).save(file)
    file.with_suffix(".txt").write_text("a cup")
    (image,) = read_folder(tmp_path, "", 64)
    assert image.prompt == "a cup" and image.name.encode() == b"caf?.png"
    part = tmp_path / os.fsdecode(b"5_caf\xe9")
    part.mkdir()
    picture(64, 64).save(part / "x.png")
    refusal(lambda: read_folder(tmp_path, "", 64), "broken characters")


def test_a_file_that_breaks_after_the_check_is_named(tmp_path):
    folder = folder_with(tmp_path, {"01": "a cat"})
    (image,) = read_folder(folder, "", 64)
    (folder / "01.png").write_bytes(b"gone")
    refusal(image.pixels, "01.png: cannot be read any more (not an image that can be read)")


def test_folder_names_in_messages_are_bounded(tmp_path):
    name = "x" * 250
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError) as error:
        read_folder(tmp_path / name, "sks", 64)
    assert len(str(error.value)) < 400 and re.search("holds no images", str(error.value))
