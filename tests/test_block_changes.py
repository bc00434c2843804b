"""A preset or a list with changes behind it; what other tools' files and tags hold; and that every advice of a message works."""

import re

import pytest
from comfyui_trilora.trilora_ops.block_plan import BlockPlan
from comfyui_trilora.trilora_ops.block_preset_files import preset_lines, read_presets
from comfyui_trilora.trilora_ops.block_presets import BUILT_IN
from comfyui_trilora.trilora_ops.block_schedule import parse as parse_schedule
from comfyui_trilora.trilora_ops.block_syntax import expand, parse
from comfyui_trilora.trilora_ops.blocks import LAYOUTS, Blocks
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.registry import Method

from .block_meanings import FLUX, SD, SDXL, check
from .fuzz.model_names import sdxl

FACE = "TE EMB FINAL OUT03 OUT04 OUT05"
FACE_LIST = "1,0,0,0,0,0,0,0,1,1,1,0,0,0,0,0,0"


@pytest.mark.parametrize("begin", ["SD-FACE", FACE_LIST, f"NAME:{FACE_LIST}", f"NAME\t{FACE_LIST}", f"lbw={FACE_LIST}", f"LBW={FACE_LIST}", "lbw=FACE", FACE_LIST.replace(",", "\n")])
@pytest.mark.parametrize("between", [", ", ",", "\n", ",\n  ", "\uff0c"])
def test_changes_count_over_what_stands_before_them(begin, between):
    check(parse(f"{begin}{between}IN04=0.5{between}OUT03-OUT04 = -1", SD), SD, {1: "TE EMB FINAL OUT05", 0.5: "IN04", -1: "OUT03 OUT04"})
    assert parse(f"{begin}{between}IN04=0.5", SD, "native" if begin == "SD-FACE" else "auto").text().endswith(", IN04=0.5")


def test_changes_of_parts_of_blocks():
    weights = parse("SD-FACE, OUT.self=0.5, /attn2\\.to_[q,k]/=0.25", SD)
    at = {path: weights.at(SD.place(f"diffusion_model.output_blocks.{path}.weight")) for path in ("3.1.transformer_blocks.0.attn1.to_v", "4.1.transformer_blocks.0.attn2.to_k", "4.0.in_layers.2")}
    assert list(at.values()) == [0.5, 0.25, 1] and parse(weights.text(), SD) == weights


def test_a_name_with_a_comma_is_a_name():
    assert parse("attention only, fused layers too, D=0.5", FLUX).text() == "default=0, .attn=1, .fused=1, D=0.5"


def test_a_change_of_a_block_that_the_list_names_takes_its_place():
    assert parse("SD-FACE, EMB=0.5, EMB=0", SD).text() == "default=0, TE=1, OUT03-OUT05=1, FINAL=1, EMB=0.5, EMB=0"


@pytest.mark.parametrize(
    ("text", "words"),
    [("SD-FACE, default=0.5", "default stands behind a preset"), ("SD-FACE, XX=1", "'XX' names no block"), ("SD-FACE, IN04=x", "'x' in 'IN04=x' is not a number"),
     ("SD-FACE, IN04", "is no preset"), ("SDFACE, IN04=0.5", "'SDFACE' is not selector=number"), ("SDXL-ALL, IN04=1", "preset 'SDXL-ALL': .*12 numbers are no list")],
)  # fmt: skip
def test_changes_that_cannot_be_read_are_named(text, words):
    with pytest.raises(TriLoRAError, match=words):
        parse(text, SD)


def test_a_plan_takes_changes_as_block_weights_do():
    """A list's BASE says nothing about the layers outside the blocks in a plan, a change does."""
    plan = BlockPlan(rank="SD-FACE, IN04=8, EMB=4").read(SD, Method())
    of = {path: plan.at(f"diffusion_model.{path}.weight") for path in ("output_blocks.3.1.proj_in", "input_blocks.4.1.proj_in", "time_embed.0", "out.2", "input_blocks.1.1.proj_in")}
    assert [layer and layer.method.residual.rank for layer in of.values()] == [1, 8, 4, None, None]
    with pytest.raises(TriLoRAError, match="^block plan: rank: 'XX' names no block"):
        BlockPlan(rank="SD-FACE, XX=8").read(SD, Method())


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name.startswith("Block-wise") and "full" not in name])
def test_a_block_wise_preset_means_the_same_blocks_in_a_loader_as_in_a_plan(name):
    blocks = SD if name.endswith("(SD1.x)") else SDXL
    weights, plan = parse(name, blocks), BlockPlan(rank=name).read(blocks, Method())
    for path in sdxl():
        key = f"{path}.weight"
        if blocks.place(key).block in blocks.ids:
            assert (weights.at(blocks.place(key)) == 1) == (plan.at(key) is not None), path
    assert weights.at(blocks.place("diffusion_model.time_embed.0.weight")) == 0 == weights.at(blocks.place("diffusion_model.out.2.weight"))
    assert plan.text_encoders() == []


# --- what other tools write -----------------------------------------------------------------------------------------------
def test_supermergers_files_of_presets():
    numbers = ",".join(str(n / 26) for n in range(26))
    presets = read_presets(f"preset_name\tpreset_weights\nGRAD_V\t{numbers}\nWRAP 12\t{','.join(['1'] * 26)}\nA:{numbers}\n")
    assert list(presets) == ["GRAD_V", "WRAP 12", "A"]
    assert parse("GRAD_V", SD, presets=presets) == parse(f"A:{numbers}", SD) == parse(f"GRAD_V\t{numbers}", SD)
    with pytest.raises(TriLoRAError, match="line 1: 'A' has 3 numbers, and no model has such a list"):
        read_presets("A\t1,1,1")


@pytest.mark.parametrize("text", ["IN05-OUT05:attn:1", "ATTNDEEPON:IN05-OUT05:attn:1", "N:NOT IN09-OUT02:NOT attn:0.5", "A:IN05:attn:1,OUT03-OUT05:proj:0", "lbw=MIDD:lbwe=ATTNDEEPON"])
@pytest.mark.parametrize("layout", ["SD1.5", "SDXL", "SD1.5 typed"])
def test_typed_elemental_presets_are_refused_with_the_reason(text, layout):
    with pytest.raises(TriLoRAError, match="one of webui's elemental presets .*which are not read: words of a file's keys"):
        parse(text if "lbw" not in text or layout != "SDXL" else "lbw=SDXL-ALL:lbwe=X", Blocks.layout(layout.removesuffix(" typed")))


@pytest.mark.parametrize("text", [",".join(["1"] * 25 + ["0"]), "LBW=" + ",".join(["1"] * 26) + ";"])
def test_a_list_of_26_is_none_of_inspires_and_the_reason_is_said(text):
    """As its examples for LoCon files have it, where every number would stand one block late."""
    with pytest.raises(TriLoRAError, match="26 numbers are no list of dialect inspire for this model, but one of webui; inspire's for LoCon files has 27: no IN00, and three MID"):
        parse(text, SD, "inspire")
    if not text.startswith("LBW"):
        assert parse(text, SD, "webui") == parse(text, SD)


# --- what a message advises is accepted ------------------------------------------------------------------------------------
BAD = ["", "IN04", "XX=1", "XX.self=1", "BASE.self=0.5", "M00.attn=1", "BASE=1", "IN05-OUT05:attn:1", "0.5", "1,1,1", "no preset", "@T", "@T:17,12,8", "@T:58,6,3", "@T:12,3,4", "@T:3",
       "network_reg_lrs=a=1", "network_reg_dims=a=1", "lbw=MIDD:lbwe=A", "lbw=MIDD:stop=3", "IN04-XX=1", "{", "[1", "/a=1", "up_lr_weight=1", *(",".join(["1 0", *["0"] * (size - 1)]) for size in (12, 17, 20, 27, 58)),
       *(",".join(["0"] * (size - 1) + ["1 0"]) for size in (12, 17, 20, 21, 27, 58)), ",".join(["0"] * 7 + ["1 0"] + ["0"] * 9)]
ITEMS = re.compile(r"[\w.-]+=-?[\d.]*\d(?:, [\w.-]+=-?[\d.]*\d)*")


def advised(message: str) -> list[str]:
    """Texts that a message holds, apart from those in quotes, which are the person's, and from the description of a dialect for all models."""
    message = re.sub(r"; (?:native|webui|inspire|kohya|realtime|diffusers|tabs) means .*", "", message)
    own = re.sub(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"", "", message.replace("'s ", " ").replace("Inspire's", ""))
    meant = re.findall(r"here it is called '([^']+)'", message)
    return [*ITEMS.findall(own.partition("schedule such as")[0]), *re.findall(r"@NAME:\d+(?:,\d+,\d+)?", own), *(f"{word}=0.5" for word in meant)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_message_advises_is_accepted(layout):
    blocks, found = Blocks.layout(layout), []
    for text in BAD:
        for read in (lambda text: expand(text, blocks), lambda text: expand(text, blocks, "inspire"), lambda text: BlockPlan(rank=text).read(blocks, Method()),
                     lambda text: BlockPlan(learning_rate=text).read(blocks, Method())):
            try:
                read(text)
            except TriLoRAError as error:
                found += [(text, advice) for advice in advised(str(error))]
    assert len(found) > 10
    for text, advice in found:
        try:
            expand(advice, blocks)
        except TriLoRAError as error:
            pytest.fail(f"{text!r}: its message advises {advice!r}, which is refused: {error}")


def test_what_messages_of_schedules_and_of_files_advise_is_accepted():
    for text in ("IN: x", "IN: 1 -> ", "IN: start=0.5 stop=0.2", "IN: 1 odd=3", "IN: 1:1, 0:1", "IN: 3:1", "IN: 5/0"):
        with pytest.raises(TriLoRAError):
            parse_schedule(text)
    for curve in ("0:1, 0.4:1, 0.6:0", "1 -> 0 cosine", "start=0.2 stop=0.6", "0.8 start=0.2 stop=0.6", "step=0.2-0.6", "0.2:1, 0.6:0 cosine", "5/20:1"):
        parse_schedule(f"IN: {curve}")
    with pytest.raises(TriLoRAError, match="write NAME:weights, such as FACE:default=0, OUT03-OUT05=1"):
        preset_lines("odd")
    [preset] = preset_lines("FACE:default=0, OUT03-OUT05=1")
    parse(preset.text, SD)
