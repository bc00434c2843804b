"""Presets: which model each belongs to and what it means there; files of presets; test lines."""

import functools

import pytest
from comfyui_trilora.trilora_ops.block_preset_files import lines_of_test, preset_lines, read_presets
from comfyui_trilora.trilora_ops.block_presets import BUILT_IN
from comfyui_trilora.trilora_ops.block_syntax import expand, parse
from comfyui_trilora.trilora_ops.blocks import LAYOUTS, Blocks
from comfyui_trilora.trilora_ops.errors import TriLoRAError

from .block_meanings import DOUBLES, FLUX, SD, SDXL, SINGLES, check, numbers

MID = "MID0 MID1 MID2"
BASE = "TE EMB FINAL"


KNOWN = {layout: Blocks.layout(layout) for layout in LAYOUTS}


@functools.cache
def models_of(name: str) -> frozenset[str]:
    """Layouts for which a preset has a reading."""
    found = []
    for layout, blocks in KNOWN.items():
        try:
            parse(name, blocks, seed=0)
        except TriLoRAError:
            continue
        found.append(layout)
    return frozenset(found)


SD1 = {"SD1.5", "SD2", "SDXL refiner"}
XL = {"SDXL", "SSD-1B"}
# 19 double and 38 single blocks
FLUX1 = {"Flux.1", "Chroma"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_preset_has_a_model_and_only_models_of_its_kind(name):
    models = models_of(name)
    assert models
    if name.startswith("SD-") or name.endswith("(SD1.x)"):
        assert models == SD1
    elif name.startswith(("SDXL-", "B-LoRA", "InstantStyle")) or name.endswith("(SDXL)"):
        assert models == XL
    elif name.startswith("FLUX") or name.endswith("(Flux)"):
        assert models == FLUX1
    elif not name.endswith(("only", "too")):
        assert models == SD1


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_preset_round_trips(name):
    blocks = KNOWN[sorted(models_of(name))[0]]
    weights = parse(name, blocks, seed=0, a=0.4, b=-0.3)
    assert parse(weights.text(), blocks) == weights and parse(weights.text(), blocks).text() == weights.text()


@pytest.mark.parametrize(
    ("name", "blocks", "wanted"),
    [("MIDD", SD, {1: f"{BASE} IN05 IN07 IN08 {MID} OUT03 OUT04 OUT05 OUT06"}), ("ALL0.5", SD, {0.5: f"{BASE} IN01 IN02 IN04 IN05 IN07 IN08 {MID} OUT03 OUT04 OUT05 "
      "OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"}),
     ("SD-LyC-OUTALL", SD, {1: f"{BASE} OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"}),
     ("SD-LyCOFACE", SD, {1: f"{BASE} OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06"}),
     ("FLUXALL", FLUX, {1: f"TE IN FINAL {DOUBLES} {SINGLES}"}), ("FLUX-ALL", FLUX, {1: f"TE IN FINAL {DOUBLES} {SINGLES}"}),
     ("FLUX-SINGLE-1to10", FLUX, {1: "TE IN FINAL S00 S01 S02 S03 S04 S05 S06 S07 S08 S09"}),
     ("FLUX-SINGLE-31to37", FLUX, {1: "TE IN FINAL S30 S31 S32 S33 S34 S35 S36 S37"}),
     ("FLUX-DBL-TAIL6", FLUX, {1: "TE IN FINAL D13 D14 D15 D16 D17 D18"}), ("FLUX-DBL-FRONT7", FLUX, {1: "TE IN FINAL D00 D01 D02 D03 D04 D05 D06"}),
     ("Face Focus (Flux)", FLUX, {1: "D07 D12 D16 S07 S12 S16 S20"}), ("Face Focus (SDXL)", SDXL, {1: f"IN07 IN08 {MID} OUT00 OUT01 OUT02 OUT03"}),
     ("Block-wise upper (SD1.x)", SD, {1: "TE IN01 IN02 IN03 OUT09 OUT10 OUT11"}), ("Block-wise middle (SD1.x)", SD, {1: "TE IN04 IN05 IN06 OUT06 OUT07 OUT08"}),
     ("Block-wise bottom (SD1.x)", SD, {1: "TE IN07 IN08 IN09 OUT03 OUT04 OUT05"}), ("Block-wise upper (SDXL)", SDXL, {1: "TE IN01 IN02 IN03 OUT06 OUT07 OUT08"}),
     ("Block-wise middle (SDXL)", SDXL, {1: "TE IN04 IN05 IN06 OUT03 OUT04 OUT05"}),
     ("Block-wise bottom (SDXL)", SDXL, {1: f"TE IN07 IN08 {MID} OUT00 OUT01 OUT02"}), ("B-LoRA content", SDXL, {1: "OUT00"}), ("B-LoRA style", SDXL, {1: "OUT01"}),
     ("InstantStyle style", SDXL, {1: "OUT01"}), ("InstantStyle layout", SDXL, {1: "IN08"}), ("InstantStyle style and layout", SDXL, {1: "IN08 OUT01"}),
     ("double blocks only", FLUX, {1: DOUBLES}), ("single blocks only", FLUX, {1: SINGLES})],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_a_preset_means(name, blocks, wanted):
    check(parse(name, blocks), blocks, wanted)


def test_block_wise_full_is_every_block():
    for name, blocks in (("Block-wise full (SD1.x)", SD), ("Block-wise full (SDXL)", SDXL)):
        assert parse(name, blocks).text() == "default=1"


def test_attention_only():
    plain, fused = (parse(name, FLUX) for name in ("attention only", "attention only, fused layers too"))
    keys = [f"diffusion_model.{name}.weight" for name in ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0", "single_blocks.0.linear1", "img_in")]
    assert [[weights.at(FLUX.place(key)) for key in keys] for weights in (plain, fused)] == [[1, 0, 0, 0], [1, 0, 1, 0]]
    assert "SD1.5" not in models_of("attention only, fused layers too") and "SD1.5" in models_of("attention only")


def test_inspires_random_preset_is_inspires():
    assert parse("SD-ROUT", SD, seed=3) == parse(BUILT_IN["SD-ROUT"].removeprefix("LBW=").removesuffix(";"), SD, "inspire", seed=3)


def test_own_presets_are_found_and_named_in_errors():
    presets = {"脸：新": "default=0, OUT03=1", "short": "1,1,1", "kohya's": ",".join(["1"] * 25)}
    check(parse(" 脸：新\n", SD, presets=presets), SD, {1: "OUT03"})
    with pytest.raises(TriLoRAError, match="preset 'short': .*3 numbers are no list"):
        parse("short", SD, presets=presets)
    with pytest.raises(TriLoRAError, match="'脸' is no preset .*presets near it: 脸：新"):
        parse("脸", SD, presets=presets)
    with pytest.raises(TriLoRAError, match="25 numbers with a name are no list"):  # kohya writes no presets; this is another list gone wrong
        parse("kohya's", SD, presets=presets)
    assert parse("kohya's", SD, "kohya", presets=presets).text() == "default=1"


def test_a_preset_is_read_whatever_the_dialect_that_is_chosen():
    assert parse("B-LoRA style", SDXL, "webui") == parse("B-LoRA style", SDXL) and parse("double blocks only", FLUX, "webui").text() == "default=0, D=1"
    assert numbers(parse("r", SD, "webui", seed=1, presets={"r": "1,1,1,1,1,1,1,1,R,R,R,R,R,R,R,R,R"}), SD)["OUT03"] <= 1


# --- files --------------------------------------------------------------------------------------------------------------
FILE = """\ufeff# my presets
MIDD:1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0

SD-AB:A,B,B,B,B,B,B,B,B,B,B,B,A,A,A,A,A
@SD-BLOCK8-TEST:17,12,8
mine: default=0, /(?:attn1|attn2)/=0.5
same:1,1,1,1,1,0,0,0,0,0,0,0
same: 1,1,1,1,1,0,0,0,0,0,0,0
12\ttabs\t""" + ",".join(["1"] * 57) + "\n"


def test_files_of_presets_are_read_line_by_line():
    presets = read_presets(FILE)
    assert list(presets) == ["MIDD", "SD-AB", "mine", "same", "tabs"]
    assert presets["mine"] == "default=0, /(?:attn1|attn2)/=0.5" and presets["tabs"] == ",".join(["1"] * 57)
    assert [preset.line for preset in preset_lines(FILE)] == [2, 4, 6, 7, 9]
    check(parse("SD-AB", SD, a=0.25, b=1, presets=presets), SD,
          {0.25: f"{BASE} OUT07 OUT08 OUT09 OUT10 OUT11", 1: f"IN01 IN02 IN04 IN05 IN07 IN08 {MID} OUT03 OUT04 OUT05 OUT06"})  # fmt: skip
    assert parse("tabs", FLUX, presets=presets).text() == "default=1"


def test_every_bad_line_of_a_file_is_named():
    with pytest.raises(TriLoRAError) as error:
        read_presets("A:1,0,0\nno preset\nB:OUT=0\n:1,1\nB:OUT=1\nC:\n")
    words = str(error.value)
    assert words.startswith("presets: line 1: 'A' has 3 numbers, and no model has such a list; line 2: no preset; write NAME:weights")
    assert "line 3" not in words.replace("meaning in line 3", "") and "line 4: no preset" in words
    assert "line 5: 'B' has another meaning in line 3; rename one of them" in words and "line 6: no preset" in words


# --- test lines -----------------------------------------------------------------------------------------------------------
def test_one_hot_lines():
    lines = lines_of_test("@SD-FULL-TEST:17", SD)
    assert [label for label, _ in lines] == [f"B{n}" for n in range(1, 18)] and lines[2][1] == "0,0,A" + ",0" * 14
    found = expand("@SD-FULL-TEST:17", SD, a=0.5)
    ids = [BASE, "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", MID, *(f"OUT{n:02d}" for n in range(3, 12))]
    assert len(found) == 17
    for weights, block in zip(found, ids, strict=True):
        check(weights, SD, {0.5: block})
    assert expand("@T", SD, presets={"@T": "17"}) == expand("@T:17", SD)
    assert [len(expand(f"@T:{n}", blocks)) for n, blocks in ((12, SDXL), (21, SDXL), (27, SD), (20, FLUX), (58, FLUX))] == [12, 21, 27, 20, 58]
    with pytest.raises(TriLoRAError, match="12 numbers are no list of dialect inspire for this model; they are one for SDXL"):
        expand("@T:12", SD)


def test_an_ordinary_text_is_one_line():
    assert expand(" OUT=0", SD) == [parse("OUT=0", SD)] and expand("", SD) == [parse("", SD)]


def test_single_weights_of_a_slot_are_refused_with_what_can_be_written():
    """The twelve layers of the middle block in the order of a file, which is no place in the model; whatever their number."""
    for count in (12, 999999999):
        with pytest.raises(TriLoRAError, match=r"slot 8 \(MID\) .*the order of a file.*write @NAME:17 .*default=0, MID.self=0.5, MID.mlp=1$"):
            expand(f"@SD-BLOCK8-TEST:17,{count},8", SD)
    with pytest.raises(TriLoRAError, match="no list of 27 slots"):
        expand("@T:27,3,4", SDXL)


@pytest.mark.parametrize(
    ("text", "words"),
    [("@FLUX-DBL-FULL:19", "no list of Inspire's has 19 slots, they have 12, 17, 20, 21, 27, 58; with BASE, which is slot 1, it would be 20"),
     ("@FLUX-DBL18-TEST:19,14,20", "has 19 slots.* it would be 20"), ("@FLUX-SGL38-TEST:58,6,59", "slot 59 of a list of 58 does not exist"),
     ("@FLUX-DBL-SGL-FULL:55", "has 55 slots, they have 12, 17, 20, 21, 27, 58$"), ("@T:17,0,3", "has no places"), ("@T:17,2,0", "slot 0"),
     ("@T", "is no test line; write @NAME:58 for a test of 58 slots"), ("@T:17,3", "is no test line"), ("@T:x", "is no test line"), ("@T:" + "9" * 5000, "is no test line")],
)  # fmt: skip
def test_test_lines_that_point_past_their_list_are_refused(text, words):
    with pytest.raises(TriLoRAError, match=words):
        expand(text, FLUX)


@pytest.mark.parametrize("dialect", ["auto", "webui", "inspire", "native"])
@pytest.mark.parametrize("text", ["lbw=X1", "LBW=X1;", "X1", "lbw=MIDD"])
def test_a_preset_is_no_name_of_a_preset(dialect, text):
    """One that named itself had no end."""
    with pytest.raises(TriLoRAError, match="^preset 'X1': (?!block weights)"):
        parse("X1", SD, dialect, presets={**BUILT_IN, "X1": text})


def test_25_numbers_with_a_name_are_no_list_and_the_reason_is_said():
    for text in ("X", "X:" + "1," * 24 + "1"):
        with pytest.raises(TriLoRAError) as error:
            parse(text, SD, presets={"X": "1," * 24 + "1"})
        assert "25 numbers" in str(error.value) and "kohya's lists have no names" in str(error.value) and "dialect kohya" in str(error.value)
        assert "they are one for" not in str(error.value)
    assert parse("X", SD, "kohya", presets={"X": "1," * 24 + "1"}).text() == "default=1"


@pytest.mark.parametrize("line", ["ATTNDEEPON:IN05-OUT05:attn:1", "ALL0:::0", "N:NOT IN09-OUT02:NOT attn:0.5", "TWO:IN05-OUT05:attn:1,OUT03-OUT05:proj:0"])
def test_elemental_presets_of_webui_are_refused_with_their_line(line):
    with pytest.raises(TriLoRAError, match="line 2: '.*' is one of webui's elemental presets .*IN05-OUT05.attn=1"):
        read_presets(f"MIDD:1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0\n{line}\n")


def test_presets_near_a_word_are_found_whatever_its_case():
    with pytest.raises(TriLoRAError, match="presets near it: .*B-LoRA style"):
        parse("b-lora STYLE", SDXL)
    with pytest.raises(TriLoRAError, match="presets near it: .*MIDD"):
        parse("midd", SD)
