"""The text of caption files: read rightly where the encoding is certain, refused by name where it is not."""

import os

import pytest
from comfyui_trilora.training.captions import MAX_CAPTION, decoded
from comfyui_trilora.training.dataset import read_folder
from comfyui_trilora.trilora_ops.errors import TriLoRAError

from .test_dataset import folder_with, refusal

TEXTS = ["a cat, sitting", "the cat’s café, “quoted” – 5 €", "赤い髪の少女, 1girl", "кот на стуле", "a cat 🐈 on a chair"]


def prompts(folder, raw: bytes) -> list[str]:
    (folder / "01.txt").write_bytes(raw)
    return [image.prompt for image in read_folder(folder, "", 64)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le bom", "utf-16-be bom", "utf-32"])
def test_unicode_is_read(tmp_path, text, encoding):
    name, _, mark = encoding.partition(" ")
    raw = (f"\ufeff{text}" if mark else text).encode(name)
    assert prompts(folder_with(tmp_path, {"01": None}), raw) == [text]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["a cat, sitting", "the cat’s café – 5 €", "x"])
def test_utf_16_without_a_mark_is_read_where_it_is_certain(tmp_path, encoding, text):
    assert prompts(folder_with(tmp_path, {"01": None}), f"{text}\r\n".encode(encoding)) == [text]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("the cat’s café".encode("cp1252"), "not UTF-8 text"),
        ("café".encode("latin-1"), "not UTF-8 text"),
        ("赤い髪の少女".encode("shift-jis"), "not UTF-8 text"),
        ("红发少女".encode("gbk"), "not UTF-8 text"),
        ("кот".encode("cp1251"), "not UTF-8 text"),
        ("赤い髪の少女".encode("iso-2022-jp"), "control characters"),
        ("赤い髪の少女".encode("utf-16-le"), "not UTF-8 text"),
        (b"a c\0at", "control characters"),
        (b"\0\0\0\0", "control characters"),
        (b"\xff\xfea\0 \0c", "not UTF-16 text"),
        (b"\xff\xfe\x00\xd8", "not UTF-16 text"),
        (b"\xef\xbb\xbfcaf\xe9", "not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not UTF-8 text"),
        (b"PK\x03\x04", "control characters"),
        ("caf\ufffd".encode(), "has lost"),
        ("\ufffea cat".encode(), "has lost"),
        ("it\x92s".encode(), "control characters"),
        (rb"{\rtf1\ansi a cat}", "an RTF document"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"a" * (MAX_CAPTION + 1), f"longer than {MAX_CAPTION} characters"),
        (b"a" * 3_000_000, f"longer than {MAX_CAPTION} characters"),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_refused_by_name(tmp_path, raw, reason):
    folder = folder_with(tmp_path, {"01": None, "02": "a dog"})
    refusal(lambda: prompts(folder, raw), "folder='photos'", "of 2 captions cannot be read (01.txt: ", reason, "plain text in UTF-8")
    (folder / "01.txt").rename(folder / "README.txt")
    assert len(read_folder(folder, "sks", 64)) == 2, "a text that no image uses is never opened"


def test_the_longest_caption_is_read_whole(tmp_path):
    text = "é" * MAX_CAPTION
    assert prompts(folder_with(tmp_path, {"01": None}), text.encode()) == [text]
    refusal(lambda: read_folder(tmp_path / "photos", "sks", 64), "01.png: its caption with the trigger has 10005 characters")


def test_an_empty_file_is_no_caption(tmp_path):
    folder = folder_with(tmp_path, {"01": None, "02": "a dog"})
    for raw in (b"", b" \n\t ", b"\xef\xbb\xbf", b"\xff\xfe", "\u3000\u2028".encode(), "\u200b".encode()):
        (folder / "01.txt").write_bytes(raw)
        images = read_folder(folder, "sks", 64)
        assert not images[0].captioned and "1 of 2 images have no caption" in images.remarks[0]


def test_every_broken_caption_is_named_beside_broken_images(tmp_path):
    folder = folder_with(tmp_path, {f"{i}": None for i in range(9)})
    for i in range(8):
        (folder / f"{i}.txt").write_bytes(b"caf\xe9")
    (folder / "8.png").write_bytes(b"")
    refusal(lambda: read_folder(folder, "sks", 64), "1 of 9 images cannot be read (8.png: an empty file)", "8 of 8 captions cannot be read",
            "4.txt: not UTF-8 text and 3 more")  # fmt: skip


def test_captions_that_are_no_files_are_named(tmp_path):
    folder = folder_with(tmp_path, {"1": None, "2": None, "3": None, "4": None})
    (folder / "1.txt").mkdir()
    os.mkfifo(folder / "2.txt")
    (folder / "3.txt").symlink_to(folder / "gone.txt")
    (folder / "4.txt").symlink_to("4.txt")
    refusal(lambda: read_folder(folder, "sks", 64), "4 of 4 captions cannot be read", "1.txt: a folder", "2.txt: not a regular file",
            "3.txt: a link to nothing", "4.txt: a link to nothing")  # fmt: skip


def test_a_caption_that_may_not_be_opened_is_named(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, {"1": "a cat"})
    from pathlib import Path

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    refusal(lambda: read_folder(folder, "sks", 64), "1.txt: cannot be opened: PermissionError")


def test_endings_and_accents_of_other_systems(tmp_path):
    folder = folder_with(tmp_path, {"caf\u00e9": None, "b": None})
    (folder / "cafe\u0301.txt").write_text("a cup")  # as macOS writes the name
    (folder / "b.TXT").write_text("a dog")
    assert [image.prompt for image in read_folder(folder, "", 64)] == ["a dog", "a cup"]


def test_captions_with_no_image_and_images_with_one_caption_are_said(tmp_path):
    folder = folder_with(tmp_path, {"1": "a cat", "2": "a dog"})
    (folder / "1.png").rename(folder / "1.jpg")
    (folder / "2.png").rename(folder / "1.png")
    images = read_folder(folder, "sks", 64)
    assert [image.prompt for image in images] == ["sks, a cat", "sks, a cat"]
    assert images.remarks == ("images share one caption: 1.jpg and 1.png", "captions that belong to no image are not used: 2.txt")


def test_any_bytes_are_text_or_an_error():
    """Nothing but a text without control characters or a TriLoRAError comes from 2,000 pieces of bytes."""
    import random

    draw = random.Random(0)
    for _ in range(2000):
        raw = draw.choice([b"", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf"]) + draw.randbytes(draw.randrange(12))
        try:
            text = decoded(raw)
        except TriLoRAError as error:
            assert len(str(error)) < 100
        else:
            assert all(letter.isspace() or letter >= " " for letter in text)
