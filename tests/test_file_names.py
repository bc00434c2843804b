"""File names that people type: what becomes of them, on every system the same."""

import os
import random

import pytest
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.file_names import good_file_name


@pytest.mark.parametrize(("given", "expected"), [
    ("my_adapter", "my_adapter"), ("Ünï 漢字 v1.5 (final)", "Ünï 漢字 v1.5 (final)"), ("%year%", "%year%"), (".hidden", ".hidden"),
    ("x.safetensors", "x"), ("x.SafeTensors", "x"), ("x.safetensors.safetensors ", "x"), ("x.safetensors.", "x"), ("v1.5", "v1.5"),
    ("a.", "a"), ("a. . ", "a"), ("  a ", "a"), ("a\0b\nc\td\x7f", "a_b_c_d_"), ('a<b>c:d"e|f?g*h\\i', "a_b_c_d_e_f_g_h_i"), ("a\udcffb\ud800", "a_b_"),
    ("nul", "nul_"), ("CON.v2", "CON_.v2"), ("com1", "com1_"), ("Lpt9.x", "Lpt9_.x"), ("console", "console"), ("aux ", "aux_"), ("COM¹", "COM¹_"),
])  # fmt: skip
def test_a_name_becomes_one_that_every_system_takes(given, expected):
    assert good_file_name([given]) == [expected]
    assert good_file_name([expected]) == [expected]


def test_folders_keep_their_ending_and_are_names_too():
    assert good_file_name(["v1.safetensors", "con", "a:b", "x"]) == ["v1.safetensors", "con_", "a_b", "x"]


@pytest.mark.parametrize("letter", ["a", "é", "漢", "😀", "e\u0301"])
def test_a_long_name_is_cut_between_letters(letter):
    (name,) = good_file_name([letter * 1000])
    assert 196 <= len(name.encode()) <= 200 and name == (letter * 1000)[: len(name)]


@pytest.mark.parametrize("parts", [[""], [" . "], [".safetensors"], ["a", "..."], [".", "a"], ["a", " ", "b"]])
def test_nothing_is_no_name(parts):
    with pytest.raises(TriLoRAError, match="at least one letter"):
        good_file_name(parts)


def test_a_path_without_end_is_refused_in_few_words():
    with pytest.raises(TriLoRAError) as error:
        good_file_name(["folder"] * 100_000 + ["x"])
    assert "at most 1000 letters" in str(error.value) and len(str(error.value)) < 500


def test_whatever_is_typed_can_be_written(tmp_path):
    chance = random.Random(1)
    letters = [*map(chr, range(128)), "é", "漢", "😀", "\udcff", "\ud800", "\u202e", "\u2028", "\u0085", "\xa0", "."]
    for _ in range(300):
        given = "".join(chance.choices(letters, k=chance.choice([1, 3, 10, 80, 300]))).replace("/", "")
        try:
            (name,) = good_file_name([given])
        except TriLoRAError:
            continue
        file = tmp_path / f".{name}_99999_.{'f' * 32}.partial"
        file.write_bytes(b"")
        file.unlink()
        assert not set('<>:"|?*\\/\0') & set(name) and os.fsdecode(os.fsencode(name)) == name
