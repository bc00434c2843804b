"""Patterns against Python's `re` on random patterns of the subset; what is not of the subset; and that none takes long."""

import random
import re
import warnings

import pytest
from comfyui_trilora.trilora_ops import patterns
from comfyui_trilora.trilora_ops.block_syntax import parse
from comfyui_trilora.trilora_ops.blocks import Blocks
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.patterns import Pattern

from .fuzz.model_names import flux, sdxl
from .fuzz.patterns import CATASTROPHIC, generated, hostile, work

POSSESSIVE = r"[*+?}]\+"
# 160,000 take 10 ms
MOST_STEPS = 250_000


def compiled(text: str) -> re.Pattern | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sets within sets
        try:
            return re.compile(text)
        except re.error:
            return None


@pytest.mark.parametrize("seed", range(4))
def test_every_pattern_of_the_subset_finds_what_re_finds(seed):
    chance, read = random.Random(seed), 0
    for _ in range(2500):
        text = generated(chance)
        wanted = compiled(text)
        if wanted is None:
            with pytest.raises(TriLoRAError, match="^the pattern "):
                Pattern(text)
        elif not re.search(POSSESSIVE, text):
            read, pattern = read + 1, Pattern(text)
            for _ in range(6):
                line = "".join(chance.choice("abc1_ -\n.") for _ in range(chance.choice([0, 1, 2, 3, 5, 8])))
                assert pattern.search(line) == bool(wanted.search(line)), (text, line)
                assert pattern.fullmatch(line) == bool(wanted.fullmatch(line)), (text, line)
    assert read > 2000


@pytest.mark.parametrize("text", [r"attn2\.to_[qk]$", r"^diffusion_model\.(?:in|out)put_blocks\.\d+\.1\.", r"blocks\.(1[0-8]|[2-9])\.", r"single_blocks\.\d+\.(?!linear)", r"\bto_out\b",
                                  r"^diffusion_model\.out\.2$", "to_q", "[._]lin", r"(norm|proj)", r"mlp\.[02]$", r"transformer_blocks\.[^.]+\.ff", r".*attn.*\.0$", ""])
def test_patterns_that_people_write_on_the_names_of_whole_models(text):
    if "(?!" in text:
        with pytest.raises(TriLoRAError, match=r"has '\(\?!', which is not supported"):
            Pattern(text)
        return
    pattern, wanted = Pattern(text), re.compile(text)
    for name in (*sdxl(), *flux()):
        assert pattern.search(name) == bool(wanted.search(name)), name


def test_a_table_that_is_full_is_begun_again(monkeypatch):
    monkeypatch.setattr(patterns, "_KEPT", 7)
    pattern, wanted = Pattern(r"\b(a|b.)*c$"), re.compile(r"\b(a|b.)*c$")
    chance = random.Random(0)
    for _ in range(300):
        line = "".join(chance.choice("abc .") for _ in range(9))
        assert pattern.search(line) == bool(wanted.search(line)) and len(pattern._states) <= 9


@pytest.mark.parametrize(
    ("text", "words"),
    [("(?=a)b", r"'\(\?=', which is not supported"), ("(?i)a", r"'\(\?i'"), ("(?P<n>a)", r"'\(\?P'"), ("(?<!a)b", r"'\(\?<'"), (r"(a)\1", r"which is not supported"),
     (r"\Ba", "which is not supported"), (r"\x41", "which is not supported"), ("a++", "possessive repetition"), ("a**", "repeats a repetition"), ("*a", "repeats nothing"),
     ("{2}a", "repeats nothing"), ("^*", "takes no sign"), ("a{3,2}", "second number must not be smaller"), ("(a", r"has a \( without its \)"), ("a)", r"has a \) without its \("),
     ("[a", r"has a \[ without its \]"), ("[b-a]", "range"), (r"[\w-a]", "range"), ("a\\", "ends with a backslash"), ("a" * 1001, "1,001 characters; at most 1,000"),
     ("(" * 60 + ")" * 60, "more than 50 groups"), ("(" * 499 + ")" * 499, "more than 50 groups"), ("a{99999999999999}", "more than 9999 times"), ("a{" + "9" * 900 + "}", "more than 9999 times"),
     ("(?:(?:a{1,99}){1,99}){1,99}", "too large"), ("(?:^a?){9999}", "too large"), ("(a?){9999}", "too large")],
)  # fmt: skip
def test_what_is_not_of_the_subset_is_refused_in_one_short_sentence(text, words):
    with pytest.raises(TriLoRAError, match=words) as error:
        Pattern(text)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_no_pattern_takes_long_on_the_names_of_a_whole_model():
    """Counted, not timed; ten thousand of them: python -m tests.fuzz.patterns."""
    chance = random.Random(11)
    texts = [*CATASTROPHIC, *(hostile(chance) for _ in range(400))]
    found = list(work(iter(texts)))
    assert max(steps for _, _, steps, _ in found) < MOST_STEPS
    assert sum(steps > 0 for _, _, steps, _ in found) > len(texts)  # most are read


@pytest.mark.parametrize("text", CATASTROPHIC)
def test_a_catastrophic_pattern_in_block_weights_comes_to_an_end(text):
    blocks = Blocks.of(f"{name}.weight" for name in sdxl())
    with pytest.raises(TriLoRAError, match="is found in no weight's name"):
        parse(f"/{text}/=0", blocks)


def test_patterns_are_counted_and_names_are_not():
    blocks = Blocks.of(f"{name}.weight" for name in sdxl())
    parse(", ".join(f"/^{name.replace('.', chr(92) + '.')}$/=0" for name in sdxl()), blocks)
    parse(", ".join(["/to_[qk]/=0"] * 100), blocks)
    with pytest.raises(TriLoRAError, match="patterns: there are 101, and at most 100"):
        parse(", ".join(["/to_[qk]/=0"] * 101), blocks)
