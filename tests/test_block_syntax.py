"""The canonical text of block weights: what a selector covers, which rule wins, what is refused."""

import random

import pytest
from comfyui_trilora.trilora_ops.block_syntax import BlockWeights, parse, written
from comfyui_trilora.trilora_ops.blocks import KINDS, LAYOUTS, TEXT_GROUPS, Blocks, Place
from comfyui_trilora.trilora_ops.errors import TriLoRAError

SD, SDXL, FLUX, ZIMAGE = map(Blocks.layout, ("SD1.5", "SDXL", "Flux.1", "Z-Image"))


def place(block: str, kinds: str = "", name: str = "") -> Place:
    group = block.split(".")[0] if "." in block else block.rstrip("0123456789")
    return Place(block, group, frozenset(kinds.split()), name)


def without_text_encoder(blocks: Blocks) -> Blocks:
    keep = {group: members for group, members in blocks.groups.items() if group not in TEXT_GROUPS}
    return Blocks(blocks.family, tuple(block for members in keep.values() for block in members), keep, blocks.kinds, _table=blocks._table)


def meaning(text: str, blocks: Blocks, kinds: str = "") -> dict[str, float]:
    weights = parse(text, blocks)
    return {block: weights.at(place(block, kinds)) for block in blocks.ids}


def changed(text: str, blocks: Blocks, kinds: str = "") -> list[str]:
    """Ids whose number is not 1."""
    return [block for block, value in meaning(text, blocks, kinds).items() if value != 1]


def test_empty_text_is_one_everywhere():
    for text in ("", "  \n", "default=1"):
        assert set(meaning(text, SDXL).values()) == {1.0} and parse(text, SDXL) == BlockWeights(1.0)


@pytest.mark.parametrize(
    ("text", "ids"),
    [("IN04=0", "IN04"), ("in4=0", "IN04"), ("IN04-IN08=0", "IN04 IN05 IN06 IN07 IN08"), ("IN04-08=0", "IN04 IN05 IN06 IN07 IN08"),
     ("in4 - 6 = 0", "IN04 IN05 IN06"), ("IN08-OUT01=0", "IN08 MID0 MID1 MID2 OUT00 OUT01"), ("OUT01-IN08=0", "IN08 MID0 MID1 MID2 OUT00 OUT01"),
     ("MID=0", "MID0 MID1 MID2"), ("EMB=0, FINAL=0", "EMB FINAL"), ("te2.30-31=0", "TE2.30 TE2.31"), ("TE1.EMB=0\nTE1.00=0", "TE1.00 TE1.EMB"),
     ("TE1.11-TE2.00=0", "TE1.11 TE1.EMB TE2.00")],
)  # fmt: skip
def test_blocks_groups_and_ranges(text, ids):
    assert changed(text, SDXL) == ids.split()


def test_te_is_every_text_encoder():
    ids = changed("TE=0", SDXL)
    assert len(ids) == 12 + 1 + 32 + 1 and all(block.startswith("TE") for block in ids)
    assert {block.split(".")[0] for block in changed("te=0", FLUX)} == {"TE1", "T5"}
    assert {block.split(".")[0] for block in changed("LLM=0", ZIMAGE)} == {"LLM"} == {block.split(".")[0] for block in changed("TE=0", ZIMAGE)}


def test_kinds_must_all_hold():
    key = "diffusion_model.output_blocks.3.1.transformer_blocks.0.{}.weight"
    weights = parse("OUT.cross=0, .mlp=0.25, OUT03-OUT04.self.attn=0.5, TE1.mlp=3", SD)
    at = {name: weights.at(SD.place(key.format(name))) for name in ("attn1.to_q", "attn2.to_q", "ff.net.2", "norm1")}
    assert at == {"attn1.to_q": 0.5, "attn2.to_q": 0.0, "ff.net.2": 0.25, "norm1": 1.0}
    assert weights.at(SD.place("diffusion_model.output_blocks.5.1.transformer_blocks.0.attn1.to_q.weight")) == 1.0
    assert weights.at(SD.place("clip_l.transformer.text_model.encoder.layers.2.mlp.fc1.weight")) == 3.0


def test_both_words_of_a_joint_stream():
    weights = parse("D.img.attn=0", FLUX)
    at = {name: weights.at(FLUX.place(f"diffusion_model.double_blocks.3.{name}.weight")) for name in ("img_attn.qkv", "txt_attn.qkv", "img_mlp.0")}
    assert at == {"img_attn.qkv": 0.0, "txt_attn.qkv": 1.0, "img_mlp.0": 1.0}


def test_patterns_are_searched_in_the_name_and_may_hold_commas_and_equals_signs():
    weights = parse(r"/attn1\.to_[qk]$/=0.5, /a{1,2}=b|x\/y/=-2", SD)
    assert weights.at(place("IN04", name="diffusion_model.input_blocks.4.1.attn1.to_q")) == 0.5
    assert weights.at(place("IN04", name="diffusion_model.input_blocks.4.1.attn1.to_v")) == 1.0
    assert weights.at(place("IN04", name="x/y")) == weights.at(place("IN04", name="aa=b")) == -2.0
    assert [selector.text for selector, _ in weights.rules] == [r"/attn1\.to_[qk]$/", r"/a{1,2}=b|x\/y/"]


def test_a_pattern_that_is_in_no_name_of_the_model_is_an_error():
    """A layout knows no names, and refuses none; a model knows them."""
    model = Blocks.of([f"diffusion_model.double_blocks.{n}.img_attn.qkv.weight" for n in range(4)])
    assert parse("/img_attn/=0.5", model).rules and parse("/to_q/=0.5", FLUX).rules
    with pytest.raises(TriLoRAError, match=r"'/to_q/' is found in no weight's name, such as diffusion_model.double_blocks.0.img_attn.qkv;.*CLIP"):
        parse("default=1, /to_q/=0.5", model)


def test_the_last_match_wins_and_default_may_stand_anywhere():
    text = "IN=0.5, IN04=2, default=0, IN04-IN05=3, IN05=4"
    assert {block: value for block, value in meaning(text, SD).items() if value} == {
        **{f"IN{n:02d}": 0.5 for n in range(12)}, "IN04": 3.0, "IN05": 4.0}  # fmt: skip
    assert parse(text, SD).text() == "default=0, IN=0.5, IN04=2, IN04-IN05=3, IN05=4"
    assert meaning("IN.attn=2, IN=0.5", SD, "attn self")["IN03"] == 0.5 and meaning("IN=0.5, IN.attn=2", SD, "attn self")["IN03"] == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [(".5", 0.5), ("1.", 1.0), ("+1", 1.0), ("-0.5", -0.5), ("1e-1", 0.1), ("1E+2", 100.0), (" 0.25 ", 0.25), ("-0", 0.0), ("\u22120.5", -0.5)],
)
def test_numbers(text, value):
    for line in (f"IN04={text}", f"IN04={text},", f"\n IN04 = {text} ,\n", f"EMB=1\uff0cIN04\uff1d{text}"):
        assert meaning(line, SD)["IN04"] == value


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 0.1, 1 / 3, 1e-30, -123456.789, 1e9, 0.1 + 0.2])
def test_written_numbers_are_read_as_themselves(value):
    assert float(written(value)) == value and "-0" != written(value)
    assert parse(f"default={written(value)}", SD).default == value


@pytest.mark.parametrize(
    ("text", "words"),
    [("IN12=1", "'IN12' names no block of this model .near it: .*IN11.*IN00-IN11, MID0-MID2, OUT00-OUT11, FINAL"), ("D00=1", "'D00' names no block"),
     ("TE1.12=1", r"'TE1.12' names no block of this model .*TE1.00-TE1.EMB"), ("IN.4=1", "'IN.4' names no block of this model .near it: .*IN04"),
     ("M00=1", "'M00' names no block of this model; here it is called 'MID'"), ("base=1", "'base' names no .*called 'TE'"), ("CLIP=1", "called 'TE'"),
     ("IN04-IN12=1", "range 'IN04-IN12' .*'IN12' names no block"), ("IN-OUT=1", "range 'IN-OUT' goes from block to block"),
     ("OUT.crss=1", "'crss' in 'OUT.crss' is no kind .*it has .*cross"), ("OUT.img=1", "'img' in 'OUT.img'"), ("IN04", "'IN04' is no preset and has no form"), ("IN04=1, OUT", "'OUT' is not selector=number"),
     ("=1", "'=1' is not selector=number"), ("IN04=", "'' in 'IN04=' is not a number"), ("IN04=x", "'x' in 'IN04=x' is not a number"), ("IN04=nan", "'nan'"),
     ("IN04=inf", "'inf'"), ("IN04=1e999", "too large"), ("IN04=1=2", "'1=2'"), ("/(/=1", "without its"), ("/attn=1", "has no end"),
     ("IN04=1; OUT=2", "'1; OUT=2'"), ("default=1, IN04 0.5=3", "'IN04 0.5' names no block")],
)  # fmt: skip
def test_what_cannot_be_read_is_named(text, words):
    with pytest.raises(TriLoRAError, match=words):
        parse(text, SD)


def test_text_encoder_words_match_nothing_where_none_is_connected():
    bare = without_text_encoder(SDXL)
    text = "TE=0.5, TE1=0, T5.03-T5.05.mlp=2, LLM.EMB=3, te2.7=4, IN04=0.25"
    assert changed(text, bare) == ["IN04"]
    assert parse(text, bare).text() == "default=1, TE=0.5, TE1=0, T5.03-T5.05.mlp=2, LLM.EMB=3, TE2.07=4, IN04=0.25"
    # the same text for the same model with its text encoders
    assert parse(parse("TE=0.5, te2.7=4", bare).text(), SDXL) == parse("TE=0.5, TE2.07=4", SDXL)
    with pytest.raises(TriLoRAError, match="'wings' in 'TE1.wings' is no kind"):
        parse("TE1.wings=1", bare)


def test_an_unknown_dialect_is_refused():
    with pytest.raises(TriLoRAError, match="dialect='lbw': choose one of auto, native, webui, inspire, kohya, realtime, diffusers, tabs"):
        parse("IN04=1", SD, "lbw")


def test_generic_models_have_ids_of_their_own():
    blocks = Blocks.of([f"diffusion_model.core.layers.{n}.{part}.weight" for n in range(4) for part in ("attn.q", "mlp.up")] + ["diffusion_model.head.weight"])
    assert blocks.family == "generic"
    assert changed("core.layers.1-2=0", blocks) == ["core.layers.01", "core.layers.02"]
    assert changed("core.layers.03.mlp=0", blocks, "mlp") == ["core.layers.03"] and changed("core.layers.03.mlp=0", blocks, "attn") == []
    assert parse("Core.Layers.01-Core.Layers.02.attn=.5", blocks).text() == "default=1, core.layers.01-core.layers.02.attn=0.5"


def random_rules(rng: random.Random, blocks: Blocks) -> tuple[float, list]:
    """(default, [(spelling, ids, kinds, pattern, number)]): rules whose meaning is known without reading them."""
    rules = []
    for _ in range(rng.randrange(9)):
        kinds = rng.sample(sorted(blocks.kinds - {"emb"}), rng.choice((0, 0, 1, 2)))  # T5.emb would be the block T5.EMB
        tail = "".join(f".{kind}" for kind in kinds)
        number = rng.choice((0.0, 1.0, -0.5, 0.25, rng.uniform(-2, 2)))
        case = rng.choice(("block", "group", "range", "all", "pattern"))
        if case == "block":
            head = rng.choice(blocks.ids)
            ids = {head}
        elif case == "group":
            head = rng.choice(list(blocks.groups))
            ids = set(blocks.groups[head])
        elif case == "range":
            start, end = sorted(rng.sample(range(len(blocks.ids)), 2))
            head, ids = f"{blocks.ids[start]}-{blocks.ids[end]}", set(blocks.ids[start : end + 1])
        elif case == "all" and kinds:
            head, ids = "", set(blocks.ids)
        else:
            rules.append(("/q|o{1,2}/", set(blocks.ids), set(), True, number))
            continue
        spelling = head.lower() if rng.random() < 0.5 else head
        rules.append((spelling + tail, ids, set(kinds), False, number))
    return rng.choice((0.0, 1.0, 0.3)), rules


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_rules_mean_what_they_say_and_round_trip(layout):
    rng, blocks = random.Random(layout), Blocks.layout(layout)
    blocks = without_text_encoder(blocks) if rng.random() < 0.3 else blocks
    for _ in range(6):
        default, rules = random_rules(rng, blocks)
        lines = [f"{spelling}={number!r}" for spelling, _, _, _, number in rules]
        lines.insert(rng.randrange(len(lines) + 1), f"default={default}")
        weights = parse(rng.choice((",", ", ", "\n", ",\n")).join(lines), blocks)
        assert hash(weights) == hash(parse(weights.text(), blocks)) and parse(weights.text(), blocks) == weights
        assert parse(weights.text(), blocks).text() == weights.text()
        for group, members in blocks.groups.items():
            for block in members:
                kinds, name = set(rng.sample(sorted(KINDS), 4)), rng.choice(("", "to_q", "to_k"))
                wanted = default
                for _, ids, words, pattern, number in rules:
                    if block in ids and words <= kinds and (not pattern or "q" in name or "o" in name):
                        wanted = number
                assert weights.at(Place(block, group, frozenset(kinds), name)) == wanted, (weights.text(), block)


@pytest.mark.parametrize("keys", [["qwen3_06b", "qwen3_2b"], ["t5xxl", "umt5xxl"], ["clip_l", "jina_clip_v2", "gemma2_2b"]])
def test_te_is_every_text_encoder_of_a_group_too(keys):
    """Two language models are LLM and LLM2; TE means both, and neither is a part of the denoiser."""
    model = [f"diffusion_model.core.layers.{n}.attn.q.weight" for n in range(3)]
    clip = [f"{part}.layers.{n}.self_attn.q_proj.weight" for part in keys for n in range(2)]
    blocks = Blocks.of([*model, *clip])
    assert len(blocks.encoders) == len(keys) and len(blocks.groups) == len(keys) + 1
    for text in ("TE=0.5", '{"text_encoder": 0.5}'):
        weights = parse(text, blocks)
        assert {weights.at(blocks.place(key)) for key in clip} == {0.5} and {weights.at(blocks.place(key)) for key in model} == {1.0}
    weights = parse('{"transformer": 0.5}', blocks)
    assert {weights.at(blocks.place(key)) for key in clip} == {1.0} and {weights.at(blocks.place(key)) for key in model} == {0.5}
    assert parse(f"{blocks.place(clip[-1]).block}=0", blocks).at(blocks.place(clip[-1])) == 0


def test_words_of_text_encoders_that_are_not_among_the_connected_ones_match_nothing():
    """A CLIP of clip_l and clip_g alone is no stricter than none, and an encoder that is there has the layers it has."""
    keep = {group: ids for group, ids in Blocks.layout("SD3 Medium").groups.items() if group != "T5"}
    keys = [f"diffusion_model.joint_blocks.{n}.x_block.attn.qkv.weight" for n in range(24)]
    keys += [f"{part}.transformer.text_model.encoder.layers.{n}.mlp.fc1.weight" for part in ("clip_l", "clip_g") for n in range(12)]
    blocks = Blocks.of(keys)
    assert blocks.encoders == ("TE1", "TE2") and "T5" not in keep
    text = "T5=0.3, T5.03-T5.05.mlp=2, LLM.VIS=0, LLM.07.conv=4, T5.EMB=2, LLM2.01=5, TE1.03=0.25"
    assert parse(text, blocks).text() == f"default=1, {text}" and changed(text, blocks) == ["TE1.03"]
    for wrong in ("TE1.12=0", "TE2.32=1", "T5.64=1", "T6=1", "TE1.conv=0"):
        with pytest.raises(TriLoRAError, match="names no block|no kind"):
            parse(wrong, blocks)
    assert changed("LLM.VIS.img=0, J03=0", Blocks.layout("SD3 Medium")) == ["J03"] and changed("LLM.VIS=0", ZIMAGE) == []


@pytest.mark.parametrize("text", ["IN04={}", "{}=1", "IN04-{}=1", "OUT.{}=1", "/({}/=1", "{}", "IN04,{}", "lbw={}", "1,2,{}", "{{'{}", "up_lr_weight={}", "%{}=0", "%in{}=0", "@{}", "lbw=MIDD:{}=1", "LBW={};", "<lora:x:1:lbw={}>", '{{"unet": {{"{}": 1}}}}',
                                  '{{"unet": "{}"}}', '["{}"]', "TE1.{}=0", "default={}", "TE1.00-{}=1", "@X:{}", "%in1-{}=0", "x\t{}\t1,1", "1" + ",0" * 15 + ",{}", "1" + ",0" * 15 + ",1 {}"])
def test_a_very_long_word_or_number_is_cut_in_the_error(text):
    for word in ("x9" * 2500, "9" * 5000):
        with pytest.raises(TriLoRAError) as error:
            parse(text.format(word), SD)
        assert len(str(error.value)) < 1500


def test_the_pattern_of_a_selector_is_compiled_once():
    (selector, _), = parse("/to_q/=0", SD).rules
    assert selector.compiled is selector.compiled and selector.matches(place("IN04", name="a.to_q")) and not selector.matches(place("IN04", name="a.to_k"))
    assert selector == parse("/to_q/=1", SD).rules[0][0] and len({selector, parse("/to_q/=1", SD).rules[0][0]}) == 1


@pytest.mark.parametrize("text", ["[" * 9000, '{"unet":' * 9000, "[1," + "2" * 5000 + "]", '{"unet": ' + "9" * 5000 + "}", '{"unet": ' + "9" * 400 + "}", '{"unet": 1e999}', "[NaN]"])
def test_json_that_no_program_wrote_is_an_error_of_ours(text):
    with pytest.raises(TriLoRAError):
        parse(text, SD)
