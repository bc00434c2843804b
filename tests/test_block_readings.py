"""Texts with two meanings, random numbers, and the faults of other tools by their usual numbers."""

import pytest
from comfyui_trilora.trilora_ops.block_syntax import parse
from comfyui_trilora.trilora_ops.errors import TriLoRAError

from .block_meanings import DOUBLES, FLUX, SD, SDXL, SINGLES, numbers


def test_two_meanings_are_an_error_that_shows_both():
    with pytest.raises(TriLoRAError) as error:
        parse("%default=1.0, double7-12=1.2", FLUX)
    lines = str(error.value).splitlines()
    assert "has 2 meanings for this model" in lines[0] and "Choose the dialect inspire or realtime in Block Weights" in lines[-1]
    assert lines[1].strip().startswith("inspire") and lines[1].endswith(": default=1, D06-D11=1.2")
    assert lines[2] == "  realtime: default=1, D07-D12=1.2"
    for dialect, ids in (("inspire", "D06-D11"), ("realtime", "D07-D12")):
        assert parse("%default=1.0, double7-12=1.2", FLUX, dialect).text() == f"default=1, {ids}=1.2"


def test_the_same_meaning_twice_is_no_error():
    for text in ("%default=0.5,double=1", "%default=0.5", "in7-8=0"):
        blocks = SD if "in" in text else FLUX
        assert len({parse(text, blocks, dialect).text() for dialect in ("auto", "realtime")}) == 1
    with pytest.raises(TriLoRAError, match="inspire: default=1, IN04=1.2\n.*IN01=1.2"):
        parse("%in1=1.2", SDXL)


ROUT = "SD-ROUT:1,1,1,1,1,1,1,1,R,R,R,R,R,R,R,R,R"
RANDOM = ["OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"]


@pytest.mark.parametrize(
    ("dialect", "token", "low", "high", "digits"),
    [("webui", "R", 0, 1, 3), ("webui", "U", -0.5, 1.5, 3), ("inspire", "R", 0, 3, 2), ("inspire", "r", 0, 3, 2), ("inspire", "U", -1.5, 1.5, 2)],
)
def test_random_tokens_are_seeded_and_in_the_range_of_their_dialect(dialect, token, low, high, digits):
    text = ROUT.replace("R,", f"{token},").replace(",R", f",{token}").replace(f"SD-{token}OUT", "SD-ROUT")
    drawn = []
    for seed in range(60):
        weights = parse(text, SD, dialect, seed=seed)
        assert weights == parse(text, SD, dialect, seed=seed) == parse(weights.text(), SD)  # pasted, it gives the same numbers
        at = numbers(weights, SD)
        drawn += [at[block] for block in RANDOM]
        assert at["IN01"] == 1 and at["IN00"] == 0
    assert all(low <= value <= high and round(value, digits) == value for value in drawn)
    assert min(drawn) < low + 0.03 * (high - low) and max(drawn) > high - 0.03 * (high - low)
    assert len(set(drawn)) > 100


def test_random_numbers_need_a_seed_and_a_dialect():
    with pytest.raises(TriLoRAError, match="need a seed; the node Block Weights has one"):
        parse(ROUT, SD, "inspire")
    with pytest.raises(TriLoRAError, match="has 2 meanings .*\n  inspire: .*\n  webui: "):
        parse(ROUT, SD, seed=1)


def test_random_numbers_leave_torchs_stream_alone():
    import torch

    before = torch.get_rng_state()
    parse(ROUT, SD, "inspire", seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_i1_slots_are_absolute_and_no_file_moves_them():
    """A B-LoRA file holds OUT00 and OUT01 only; Inspire gives them the slots 1 and 2 of 12, which are IN04 and IN05."""
    at = numbers(parse("1,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95,0.97", SDXL), SDXL)
    assert (at["OUT00"], at["OUT01"]) == (0.6, 0.7)
    singles = numbers(parse(",".join(map(str, range(58))), FLUX), FLUX)
    assert [singles[f"S0{n}"] for n in range(4)] == [20, 21, 22, 23]


def test_i2_double_7_and_single_7_have_slots_of_their_own():
    at = numbers(parse(",".join(map(str, range(58))), FLUX), FLUX)
    assert (at["D07"], at["S07"]) == (8, 27)


def test_i5_the_last_value_is_not_repeated():
    at = numbers(parse("FLUX-DBL-ALL", FLUX), FLUX)
    assert {at[block] for block in DOUBLES.split()} == {1} and {at[block] for block in SINGLES.split()} == {0}


def test_i7_negatives_stay_and_short_numbers_are_read():
    assert numbers(parse("%default=-0.5, double=-.25, base=1.", FLUX, "inspire"), FLUX) == {
        "TE": 1, "IN": 1, "FINAL": 1, **dict.fromkeys(DOUBLES.split(), -0.25), **dict.fromkeys(SINGLES.split(), -0.5)}  # fmt: skip


def test_l1_an_unknown_preset_or_length_is_no_full_strength():
    for text in ("MIDDD", "1,1,1,1", "1," * 18):
        with pytest.raises(TriLoRAError, match="is no preset|are no list"):
            parse(text, SD, "webui" if "," in text else "auto")
    with pytest.raises(TriLoRAError, match="presets near it: .*MIDD"):
        parse("MIDDD", SD)


def test_l2_random_numbers_stand_in_the_text():
    weights = parse(ROUT, SD, "webui", seed=4)
    assert all(f"{block}=0." in weights.text() for block in RANDOM) and "R" not in weights.text().replace("TER", "")


def test_two_meanings_of_inspires_numbers_are_refused_in_its_own_dialect_too():
    """It counts the blocks of the file that it has: a plain one or a LoCon one."""
    with pytest.raises(TriLoRAError) as error:
        parse("%in3=0", SD, "inspire")
    first, *lines, last = str(error.value).splitlines()
    assert "has 2 meanings" in first and lines == ["  inspire: default=1, IN04=0", "  inspire (LoCon files): default=1, IN03=0"]
    assert "write the line that you mean" in last.lower() and "dialect" not in last
    assert parse("%in1-2=0", SD, "inspire").text() == "default=1, IN01-IN02=0"  # the same in both
    with pytest.raises(TriLoRAError, match="^preset 'mine': .*has 2 meanings"):
        parse("mine", SD, "inspire", presets={"mine": "%in3=0"})
    with pytest.raises(TriLoRAError, match="Choose the dialect realtime in Block Weights, or write"):
        parse("%in3=0", SD)


def test_a_random_preset_without_a_seed_has_one_fault():
    for name in ("SD-ROUT", "LBW=SD-ROUT;", "LBW=1,1,1,1,1,1,1,1,R,R,R,R,R,R,R,R,R;"):
        with pytest.raises(TriLoRAError) as error:
            parse(name, SD)
        assert "need a seed" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tag", "text"),
    [("<lora:x:1:lbw=MIDD>", "MIDD"), ("<lora:a b:0.5:0.7:LBW=0,0,0,0,0,0,0,0,0,0,A,B,0,0,0,0,0;A=0.5;B=0.2;>", "default=0, OUT05=0.5, OUT06=0.2"),
     ("<lora:chunli:1.0:1.0:LBW=B11:0,0,0,0,0,0,0,0,0,0,A,0,0,0,0,0,0;A=.5;>", "default=0, OUT05=0.5"), ("lbw=MIDD:x=0.5", "MIDD"),
     ("<lora:x:1:1:lbw=1,1,1,1,1,1,1,1,1,1,1,1,X,1,1,1,1:x=0.25>", "1,1,1,1,1,1,1,1,1,1,1,1,0.25,1,1,1,1"), ("<lora:x:te=1:unet=1:lbw=ROUT:x=1>", "ALL")],
)  # fmt: skip
def test_a_whole_tag_of_a_prompt(tag, text):
    assert numbers(parse(tag, SD), SD) == numbers(parse(text, SD), SD)
    assert parse(f" {tag}\n", SD, "inspire" if "LBW" in tag else "webui") == parse(tag, SD)


@pytest.mark.parametrize(
    ("tag", "words"),
    [("lbw=MIDD:stop=10", "'stop=10' .*Adapter Hook"), ("<lora:x:1:lbw=MIDD:start=3>", "'start=3' .*Adapter Hook"), ("<lora:x:1:lbw=MIDD:step=3-7>", "Adapter Hook"),
     ("lbw=MIDD:x=a", "'a' .*is not a number"), ("lbw=MIDD:lbwe=ATTNDEEPON", "'lbwe=ATTNDEEPON'"), ("<lora:x:1>", "no form that block weights"),
     ("<lora:x:1:LBW=SD-MIDD;stop=3>", "'stop=3'")],
)  # fmt: skip
def test_what_else_stands_in_a_tag(tag, words):
    with pytest.raises(TriLoRAError, match=words):
        parse(tag, SD)


def test_a_model_without_lists_says_so():
    from comfyui_trilora.trilora_ops.blocks import Blocks

    with pytest.raises(TriLoRAError, match="3 numbers are no list for this model. No list has a meaning for this model .mochi.; write default=1, B47=0.5"):
        parse("1,2,3", Blocks.layout("Mochi"))
