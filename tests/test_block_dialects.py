"""What people have in their notes, id by id: the meaning of each line in every dialect, and what is refused."""

import math
import random

import pytest
from comfyui_trilora.trilora_ops.block_syntax import parse
from comfyui_trilora.trilora_ops.block_vectors import lists_of
from comfyui_trilora.trilora_ops.blocks import LAYOUTS, Blocks, Place
from comfyui_trilora.trilora_ops.errors import TriLoRAError

from .block_meanings import DOUBLES, FLUX, SD, SDXL, SINGLES, ZIMAGE, check, numbers

BASE = "TE EMB FINAL"
MID = "MID0 MID1 MID2"
# every line of the tools' own preset files and of the set that circulates, and what it is for; ids not named have 0
SD_LINES = [
    ("NONE:0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0", {}),
    ("INS:1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0", {1: f"{BASE} IN01 IN02 IN04"}),
    ("IND:1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0", {1: f"{BASE} IN05 IN07 IN08"}),
    ("MIDD:1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0", {1: f"{BASE} IN05 IN07 IN08 {MID} OUT03 OUT04 OUT05 OUT06"}),
    ("OUTD:1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0", {1: f"{BASE} OUT03 OUT04 OUT05 OUT06"}),
    ("OUTS:1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1", {1: f"{BASE} OUT07 OUT08 OUT09 OUT10 OUT11"}),
    ("OUTALL:1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1", {1: f"{BASE} OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"}),
    ("ROUT:X,1,1,1,1,1,1,1,1,1,1,1,X,X,X,X,X",
     {0.7: f"{BASE} OUT07 OUT08 OUT09 OUT10 OUT11", 1: f"IN01 IN02 IN04 IN05 IN07 IN08 {MID} OUT03 OUT04 OUT05 OUT06"}),
    ("SD-MIDD0.2:1,0,0,0,0,0,0.2,0.4,0.4,0.2,0,0,0,0,0,0,0", {1: BASE, 0.2: "IN08 OUT04", 0.4: f"{MID} OUT03"}),
    ("SD-AOUT:A,1,1,1,1,1,1,1,1,1,1,1,A,A,A,A,A",
     {0.7: f"{BASE} OUT07 OUT08 OUT09 OUT10 OUT11", 1: f"IN01 IN02 IN04 IN05 IN07 IN08 {MID} OUT03 OUT04 OUT05 OUT06"}),
    ("SD-AB:A,B,B,B,B,B,B,B,B,B,B,B,A,A,A,A,A",
     {0.7: f"{BASE} OUT07 OUT08 OUT09 OUT10 OUT11", -0.2: f"IN01 IN02 IN04 IN05 IN07 IN08 {MID} OUT03 OUT04 OUT05 OUT06"}),
    ("SD-LyC-MIDALL:1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0", {1: f"{BASE} MID0 MID1 MID2"}),
    ("BODY:1,1,1,1,1,1,1,1,0,0,0,1,1,1,1,1,1", {1: f"{BASE} IN01 IN02 IN04 IN05 IN07 IN08 {MID} OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"}),
    ("FACE:1,0,0,0,0,0,0,0,1,1,1,0,0,0,0,0,0", {1: f"{BASE} OUT03 OUT04 OUT05"}),
    ("FACE0.5:1,0,0,0,0,0,0,0,0.8,1,1,0.2,0,0,0,0,0", {1: f"{BASE} OUT04 OUT05", 0.8: "OUT03", 0.2: "OUT06"}),
    ("HAND:1,0,1,1,0.2,0,0,0,0,0,0,0,0,0,0,0,0", {1: f"{BASE} IN02 IN04", 0.2: "IN05"}),
    ("CLOTHING:1,1,1,1,1,0,0.2,0,0.8,1,1,0.2,0,0,0,0,0", {1: f"{BASE} IN01 IN02 IN04 IN05 OUT04 OUT05", 0.2: "IN08 OUT06", 0.8: "OUT03"}),
    ("POSE:1,0,0,0,0,0,0.2,1,1,1,0,0,0,0,0,0,0", {1: f"{BASE} {MID} OUT03 OUT04", 0.2: "IN08"}),
    ("PALETTE:1,0,0,0,0,0,0,0,0,0,0,0.8,1,1,1,1,1", {1: f"{BASE} OUT07 OUT08 OUT09 OUT10 OUT11", 0.8: "OUT06"}),
    ("KEEPCHAR:1,1,1,1,1,0,0,0,1,1,1,1,1,1,1,0,0", {1: f"{BASE} IN01 IN02 IN04 IN05 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09"}),
    ("KEEPBG:1,1,1,1,1,1,0.2,1,0.2,0,0,0.8,1,1,1,0,0",
     {1: f"{BASE} IN01 IN02 IN04 IN05 IN07 {MID} OUT07 OUT08 OUT09", 0.2: "IN08 OUT03", 0.8: "OUT06"}),
]  # fmt: skip
SDXL_LINES = [
    ("SDXL-INALL:1,1,1,1,1,0,0,0,0,0,0,0", {1: f"{BASE} IN04 IN05 IN07 IN08"}),
    ("SDXL-LyC-OUTALL:1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1", {1: f"{BASE} OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08"}),
]
FLUX_LINES = [("FLUX-DBL-MID6:1,0,0,0,0,0,0,0,1,1,1,1,1,1,0,0,0,0,0,0", {1: "TE IN FINAL D07 D08 D09 D10 D11 D12"})]


@pytest.mark.parametrize(
    ("blocks", "line", "wanted"),
    [(blocks, *pair) for blocks, lines in ((SD, SD_LINES), (SDXL, SDXL_LINES), (FLUX, FLUX_LINES)) for pair in lines],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_preset_lines_that_circulate(blocks, line, wanted):
    """As a line with its name, as the bare list, and spread over lines with a comma at the end."""
    bare = line.partition(":")[2]
    for text in (line, bare, bare.replace(",", ",\n ") + ",", bare.replace(",", "\n"), bare.replace(",", "\uff0c")):
        check(parse(text, blocks, a=0.7, b=-0.2), blocks, wanted)


def test_flux_57_has_no_base():
    text = "1,1,1,1,1,1,1,1,0.25,0.25,0.25,0.5,0.5,0.5,0.5,0,0,0,0," + ",".join(["1"] * 38)
    wanted = {1: f"TE IN FINAL D00 D01 D02 D03 D04 D05 D06 D07 {SINGLES}", 0.25: "D08 D09 D10", 0.5: "D11 D12 D13 D14", 0: "D15 D16 D17 D18"}
    for dialect in ("auto", "realtime", "tabs"):
        check(parse(text, FLUX, dialect), FLUX, wanted)
    check(parse(f"1\tface\t{text}", FLUX), FLUX, wanted)
    check(parse("3\tname of a file\t" + ",".join(["0.5"] * 19), FLUX), FLUX, {0.5: DOUBLES}, rest=1)


def test_flux_58_57_61_and_20_are_told_apart():
    count = [str(n) for n in range(61)]
    d, s = DOUBLES.split(), SINGLES.split()
    check(parse(",".join(count[:58]), FLUX), FLUX, {0: "TE IN FINAL", **{n + 1: block for n, block in enumerate(d + s)}})
    check(parse(",".join(count[:57]), FLUX), FLUX, dict(enumerate(d + s)), rest=1)
    check(parse(",".join(count), FLUX), FLUX, {0: "TE1", 1: "T5", 2: "IN", **{n + 3: block for n, block in enumerate(d + s)}, 60: "FINAL"})
    check(parse(",".join(count[1:21]), FLUX), FLUX, {1: "TE IN FINAL", **{n + 2: block for n, block in enumerate(d)}})


def test_the_lists_of_sd_and_sdxl():
    count = [str(n) for n in range(1, 28)]
    ins, outs = [f"IN{n:02d}" for n in range(12)], [f"OUT{n:02d}" for n in range(12)]

    def slots(*ids):
        return dict(enumerate(ids, 1))

    check(parse(",".join(count[:26]), SD), SD, slots(BASE, *ins, MID, *outs))
    check(parse(",".join(count), SD), SD, slots(BASE, *ins[1:], "MID0", "MID1", "MID2", *outs))
    check(parse(",".join(count[:25]), SD), SD, slots(*ins, MID, *outs), rest=1)
    check(parse(",".join(count[:20]), SDXL), SDXL, slots(BASE, *ins[:9], MID, *outs[:9]))
    check(parse(",".join(count[:21]), SDXL), SDXL, slots(BASE, *ins[1:9], "MID0", "MID1", "MID2", *outs[:9]))
    check(parse(",".join(count[:23]), SDXL), SDXL, slots("EMB", *ins[:9], "MID0", "MID1", "MID2", *outs[:9], "FINAL"), rest=1)
    check(parse(",".join(count[:13]), SDXL), SDXL, slots("TE1", "TE2", "IN04", "IN05", "IN07", "IN08", MID, *outs[:6]), rest=1)


def test_what_a_list_leaves_out_is_0_for_webui_and_inspire_and_1_for_kohyas_merge():
    text = ",".join(["0.5"] * 12)
    named = f"{BASE} IN04 IN05 IN07 IN08 {MID} OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"
    check(parse(text, SDXL, "webui"), SDXL, {0.5: named})
    check(parse(text, SDXL, "inspire"), SDXL, {0.5: named})
    check(parse(f"[{text}]", SDXL), SDXL, {0.5: named}, rest=1)
    check(parse("[1, 1, -0.5" + ", 1.0" * 23 + "]", SD, "kohya"), SD, {-0.5: "IN01"}, rest=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_list_gives_every_slot_its_number(layout):
    rng, blocks = random.Random(layout), Blocks.layout(layout)
    for kind in lists_of(blocks):
        values = [rng.choice((0.0, 1.0, -0.5, rng.uniform(-2, 2))) for _ in kind.slots]
        text = ",".join(map(repr, values))
        dialect, text = ("kohya", f"[{text}]") if kind.dialect == "kohya JSON" else (kind.dialect, text)
        weights = parse(text, blocks, dialect)
        for slot, value in zip(kind.slots, values, strict=True):
            for block in [block for block in blocks.ids if block == slot or block in blocks.groups.get(slot, ())]:
                assert weights.at(Place(block, next(g for g, m in blocks.groups.items() if block in m), frozenset(), "")) == value, (kind, block)
        assert parse(weights.text(), blocks) == weights and parse(text, blocks).text() == weights.text()


@pytest.mark.parametrize(
    ("text", "value"), [(".5", 0.5), ("1.", 1), ("+1", 1), ("-0.5", -0.5), ("1e-1", 0.1), (" 0.25 ", 0.25), ("0.5 .5", 0.5), ("X-0.3", 0.7), ("b", 0.5)]
)
def test_numbers_of_a_slot(text, value):
    check(parse("0," * 10 + text + ",0" * 6, SD), SD, {value: "OUT05"})


def test_space_lists_go_by_the_order_of_a_file_and_are_refused():
    with pytest.raises(TriLoRAError, match=r"slot 5 \(IN05\) is '0.1 A 0', one number for each weight in the order of a file.*for example IN05.self=0.5"):
        parse("1,0,0,0,0.1 A 0" + ",0" * 12, SD)


def test_inspires_wildcard_form():
    check(parse("LBW=0,0,0,0,0,0,0,0,0,0,A,B,0,0,0,0,0;A=0.5;B=0.2;", SD), SD, {0.5: "OUT05", 0.2: "OUT06"})
    check(parse("LBW=B11:0,0,0,0,0,0,0,0,0,0,A,0,0,0,0,0,b;A=-0.3", SD, b=3), SD, {-0.3: "OUT05", 1.5: "OUT11"})
    check(parse("LBW=SD-MIDD;", SD), SD, dict(SD_LINES)["MIDD:1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0"])
    check(parse("LBW=%default=0,in2=1;", SD), SD, {1: "IN02"})
    with pytest.raises(TriLoRAError, match="'C=1' in .*write LBW=, A= and B="):
        parse("LBW=SD-MIDD;C=1", SD)


def test_webuis_form_in_a_prompt():
    check(parse("lbw=OUTALL", SD), SD, dict(SD_LINES)["OUTALL:1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1"])
    text = "1," * 25 + "-1"
    check(parse(f"lbw={text}", SD), SD, {-1: "OUT11"}, rest=1)
    assert parse(f"lbw={text}", SD) == parse(text, SD)


def test_inspires_specification_counts_the_blocks_of_a_whole_file_from_1():
    check(parse("%default=0.5,base=-1,in1-2=0,out=2", SD, "inspire"), SD, {-1: BASE, 0: "IN01 IN02", 2: " ".join(SD.groups["OUT"])}, rest=0.5)
    check(parse("%in8=0, out9=2", SDXL, "inspire"), SDXL, {0: "IN08", 2: "OUT08"}, rest=1)
    check(parse("%in9-11=0, mid2=3", SD, "inspire"), SD, {0: "IN09 IN10 IN11", 3: "MID1"}, rest=1)  # only a LoCon file has nine
    check(parse("%default=0, in=1, in2=.5, mid=2", SD, "inspire"), SD, {1: "IN00 IN01 IN03 IN04 IN05 IN06 IN07 IN08 IN09 IN10 IN11", 0.5: "IN02", 2: MID})
    check(parse("%double1=0, single38=0", FLUX, "inspire"), FLUX, {0: "D00 S37"}, rest=1)
    with pytest.raises(TriLoRAError, match="'in12' .*Inspire counts in1 to in6 here, which are IN01, IN02, IN04"):
        parse("%in12=0", SD, "inspire")


def test_the_realtime_form_counts_from_0():
    check(parse("%default=1.0, te1=0.5, in7-8=1.2", SDXL), SDXL, {0.5: "TE1", 1.2: "IN07 IN08"}, rest=1)
    check(parse("default=0, double7-12=1.2, single=-1, other=3", FLUX, "realtime"), FLUX, {1.2: "D07 D08 D09 D10 D11 D12", -1: SINGLES, 3: "IN FINAL"})
    check(parse("%layer18-19=1.2, te=0", ZIMAGE), ZIMAGE, {1.2: "L18 L19", 0: "TE"}, rest=1)
    check(parse("%block0=0", Blocks.layout("Wan 14B")), Blocks.layout("Wan 14B"), {0: "B00"}, rest=1)
    with pytest.raises(TriLoRAError, match="realtime: 'double7-12' in .* is no word for this model"):
        parse("%default=1.0, te1=0.5, in7-8=1.2, double7-12=1.2, layer18-25=1.2", SDXL)


def test_z_image_34():
    weights = parse(",".join(map(str, range(34))), ZIMAGE)
    check(weights, ZIMAGE, {**{n: f"L{n:02d}" for n in range(30)}, 30: "CR0 CR1", 31: "NR0 NR1", 32: "FINAL"}, rest=1)
    assert weights.at(ZIMAGE.place("diffusion_model.x_embedder.weight")) == 33


def test_kohyas_learning_rate_weights():
    weights = parse('--network_args "down_lr_weight=0,0,0,0,0,0,1,1,1,1,1,-1" "mid_lr_weight=.5" "up_lr_weight=sine+.5"', SD)
    sine = [math.sin(math.pi / 2 * n / 11) + 0.5 for n in range(12)]
    check(weights, SD, {0: "IN00 IN01 IN02 IN03 IN04 IN05", -1: "IN11", 0.5: MID, **{sine[n]: f"OUT{n:02d}" for n in range(1, 12)}} | {0.5: f"{MID} OUT00"}, rest=1)
    check(parse("mid_lr_weight=1,0,2", SDXL), SDXL, {0: "MID1", 2: "MID2"}, rest=1)
    check(parse("up_lr_weight=reverse_linear", SDXL), SDXL, {(8 - n) / 8: f"OUT{n:02d}" for n in range(9)}, rest=1)
    check(parse("down_lr_weight=zeros+.25\nup_lr_weight=linear", SDXL), SDXL,
          {0.25: "IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 OUT02", **{n / 8: f"OUT{n:02d}" for n in range(9) if n != 2}}, rest=1)
    cosine = parse("down_lr_weight=cosine", SD)
    assert [numbers(cosine, SD)[f"IN{n:02d}"] for n in range(12)] == pytest.approx([math.cos(math.pi / 2 * n / 11) for n in range(12)], abs=1e-12)
    check(parse("mid_lr_weight=0.2, 0.1, 1 block_lr_zero_threshold=0.1", SDXL), SDXL, {0.2: "MID0", 0: "MID1"}, rest=1)


def test_kohyas_block_indices():
    text = "train_double_block_indices=0,1,8-12,18 train_single_block_indices=none"
    check(parse(text, FLUX), FLUX, {0: f"D02 D03 D04 D05 D06 D07 D13 D14 D15 D16 D17 {SINGLES}"}, rest=1)
    check(parse("train_double_block_indices=all", FLUX), FLUX, {}, rest=1)
    check(parse("train_blocks=single", FLUX), FLUX, {0: DOUBLES}, rest=1)
    check(parse("train_blocks=noise_refiner", ZIMAGE), ZIMAGE, {0: " ".join(["CR0 CR1", *ZIMAGE.groups["L"]])}, rest=1)
    sd3 = Blocks.layout("SD3 Medium")
    check(parse("train_block_indices=0-21,23", sd3), sd3, {0: "J22"}, rest=1)


def test_kohyas_patterns_the_first_that_matches_wins():
    def at(text, blocks, name):
        return parse(text, blocks).at(blocks.place(f"diffusion_model.{name}.weight"))

    text = 'network_reg_dims=lora_unet_single_blocks_(6|7)_=16,img_mlp_[02_]=2,single_=4,_attn_=-1'
    names = ("single_blocks.7.linear1", "single_blocks.17.linear1", "double_blocks.0.img_mlp.0", "double_blocks.0.txt_attn.qkv", "double_blocks.0.txt_mlp.0")
    assert [at(text, FLUX, name) for name in names] == [16, 4, 2, -1, 1]
    anima = Blocks.layout("Anima")
    whole = r"network_reg_lrs=blocks\.\d+\.self_attn\..*=0.5, self_attn=7"
    assert [at(whole, anima, name) for name in ("blocks.3.self_attn.q_proj", "llm_adapter.blocks.3.self_attn.q_proj")] == [0.5, 1.0]


def test_diffusers_dictionaries():
    """As diffusers looks numbers up: by "mid_block.attentions.0", "down_blocks.1.attentions.0", else 1."""
    text = '{"text_encoder":0.5,"unet":{"down":0.9,"up":{"block_0":0.6,"block_1":[0.4,0.8,1.0]}}}'
    check(parse(text, SDXL), SDXL, {0.5: "TE1", 0.9: "IN04 IN05 IN06 IN07 IN08", 0.6: "OUT00 OUT01 OUT02", 0.4: "OUT03", 0.8: "OUT04"}, rest=1)
    check(parse('{"unet": {"mid": 0, "down": {"block_0": [2, 3]}, "up": {"block_3": [0, -1, 1]}}}', SD), SD,
          {0: "MID1 OUT09", 2: "IN01 IN03", 3: "IN02", -1: "OUT10"}, rest=1)  # fmt: skip
    check(parse('{"text_encoder_2": 0, "transformer": 0.3}', FLUX), FLUX, {0: "T5", 0.3: f"IN FINAL {DOUBLES} {SINGLES}"}, rest=1)
    # an upsampler is looked up as attention 0, though it stands behind attention 2; SD1.x has none in its last block
    for blocks, text, out in ((SDXL, '{"unet": {"up": {"block_0": [2, 3, 4]}}}', 2), (SD, '{"unet": {"up": {"block_2": [2, 3, 4], "block_3": [2, 3, 4]}}}', 8)):
        weights = parse(text, blocks)
        at = {path: weights.at(blocks.place(f"diffusion_model.output_blocks.{out}.{path}.weight")) for path in ("2.conv", "1.proj_in", "0.in_layers.2")}
        assert at == {"2.conv": 2, "1.proj_in": 4, "0.in_layers.2": 4} and weights.text().count("/") == 2
    check(parse('{"text_encoder": -0.5}', ZIMAGE), ZIMAGE, {-0.5: "TE"}, rest=1)


@pytest.mark.parametrize(
    ("blocks", "text", "words"),
    [(SD, '{"unet": {"up": {"block_0": 1}}}', "'block_0' in 'up' has no attentions; there are block_1"), (SD, '{"te": 1}', "'te' is no part of this pipeline"),
     (SD, '{"unet": {"up": {"block_1": [1, 2]}}}', "up block_1 has 3 attentions, not 2"), (SD, "{'unet': 1}", "double quotes"),
     (SD, '{"unet": "1"}', "'unet' has '1'"), (FLUX, '{"transformer": {"up": 1}}', "SD1.x, SD2 and SDXL"), (SD, "[1, 2", "no JSON list"),
     (SD, "down_lr_weight=1,2", "down_lr_weight has 2 numbers and this model has 12 blocks"), (SD, "down_lr_weight=cosin", "'cosin' .*is not a number"),
     (FLUX, "mid_lr_weight=1", "are for U-Nets"), (FLUX, "train_double_block_indices=1,19", "'19' in .*this model has 0 to 18"),
     (FLUX, "train_double_block_indices=1-" + "9" * 5000, "99 ...' in train_double_block_indices .*this model has 0 to 18"), (FLUX, "train_blocks=triple", "this model knows all, double, single"), (FLUX, "train_block_indices=1", "names no blocks of this model"),
     (SD, "network_reg_dims=attn=1", "is not for U-Nets"), (FLUX, "network_reg_dims=attn", "'attn' in network_reg_dims is not pattern=number"),
     (SD, "1,,0" + ",0" * 14, r"slot 2 \(IN01\) of the list is empty"), (SD, "1,foo" + ",0" * 15, r"'foo' in 'slot 2 \(IN01\)' is not a number"),
     (SD, "1,1,1,1,1,0,0,0,0,0,0,0", "12 numbers are no list for this model; they are one for SDXL, .*takes lists of 17 .*26 .*27"),
     (ZIMAGE, "1,1,1,1,1,0,0,0,0,0,0,0", "they are one for SDXL.* takes lists of 30"), (SD, "1,0,0", "3 numbers are no list for this model. This"),
     (SD, "SD-LyCOBODY0.5:1,1,1,1,1,1,1,1,1,0.2,0.2,0.5,1,1,0,0,0,0.2,0,0,0.8,1,1,1,1", "25 numbers with a name are no list for this model: kohya"),
     (SD, "lbw= ", "must follow LBW="), (SD, "LBW=;A=1", "must follow LBW="), (SD, "LBW=MIDDD;", "'MIDDD' is no preset and no text of dialect inspire .*near it: .*MIDD"),
     (SD, "@SD-FULL-TEST:17", "lines of a test"), (SD, "%foo=1", "inspire: 'foo' .*\n.*realtime: 'foo' in '%foo=1' is no word")],
)  # fmt: skip
def test_what_cannot_be_read_is_named(blocks, text, words):
    with pytest.raises(TriLoRAError, match=words):
        parse(text, blocks)


@pytest.mark.parametrize("dialect", ["native", "webui", "inspire", "kohya", "realtime", "diffusers", "tabs"])
def test_an_explicit_dialect_reads_nothing_else(dialect):
    texts = {"native": "OUT.cross=0", "webui": "1," * 26, "inspire": "1," * 27, "kohya": "1," * 25, "diffusers": "{}"}
    for owner, text in texts.items():
        if owner == dialect:
            parse(text, SD, dialect)
        else:
            with pytest.raises(TriLoRAError, match=f"dialect {dialect}"):
                parse(text, SD, dialect)


ROUND_TRIPS = [
    *((SD, line) for line, _ in SD_LINES), *((SDXL, line) for line, _ in SDXL_LINES), *((FLUX, line) for line, _ in FLUX_LINES),
    (SD, "LBW=0,0,0,0,0,0,0,0,0,0,A,B,0,0,0,0,0;A=0.5;B=0.2;"), (SDXL, "%default=1.0, te1=0.5, in7-8=1.2"), (ZIMAGE, "%layer18-25=1.2"),
    (FLUX, "2\tname\t" + "0.25," * 57), (SDXL, '{"text_encoder":0.5,"unet":{"down":0.9,"up":{"block_0":0.6,"block_1":[0.4,0.8,1.0]}}}'),
    (SDXL, "[1,1,0.5,1,1,1,1,1,1,1,1,-1]"), (SD, "down_lr_weight=cosine+.5 up_lr_weight=linear"), (FLUX, "train_double_block_indices=0,1,8-12,18"),
    (FLUX, "network_reg_dims=single_blocks_(?:6|7)_=16,img/mlp=2"), (ZIMAGE, ",".join(map(str, range(34)))), (SD, "default=1, OUT.cross=0, /a,b=c/=2"),
]  # fmt: skip


@pytest.mark.parametrize(("blocks", "text"), ROUND_TRIPS, ids=lambda value: value[:24] if isinstance(value, str) else "")
def test_canonical_text_round_trips(blocks, text):
    weights = parse(text, blocks, a=0.3, b=1 / 3)
    for dialect in ("auto", "native"):
        again = parse(weights.text(), blocks, dialect)
        assert again == weights and again.text() == weights.text()
