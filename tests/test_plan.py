"""Block plans: what their texts mean on a model, which layers are trained with what, and the way through a file's metadata."""

import random

import pytest
from comfyui_trilora.trilora_ops.block_plan import BlockPlan, from_metadata, to_metadata
from comfyui_trilora.trilora_ops.block_syntax import BlockWeights
from comfyui_trilora.trilora_ops.blocks import Blocks
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.presets import build_method, pairs
from comfyui_trilora.trilora_ops.ranks_text import ranks_as_text
from comfyui_trilora.trilora_ops.registry import Method
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig
from comfyui_trilora.trilora_ops.residuals.trilora import TriLoraConfig

ROOT = "diffusion_model."
LORA = Method(LoraConfig(rank=16, alpha=8.0))


def resnet(block: str) -> list[str]:
    return [f"{ROOT}{block}.0.{part}.weight" for part in ("in_layers.2", "emb_layers.1", "out_layers.3")]


def transformer(block: str) -> list[str]:
    inner = [f"transformer_blocks.0.{attn}.{part}" for attn in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")]
    return [f"{ROOT}{block}.{part}.weight" for part in ("proj_in", *inner, "transformer_blocks.0.ff.net.2", "proj_out")]


def unet(attention_in, attention_out, last: int) -> list[str]:
    """Keys of a U-Net's layers: SD1.5's are unet({1, 2, 4, 5, 7, 8}, 3.., 12)."""
    keys = [f"{ROOT}time_embed.0.weight", f"{ROOT}input_blocks.0.0.weight"]
    for n in range(1, last):
        keys += resnet(f"input_blocks.{n}") + (transformer(f"input_blocks.{n}.1") if n in attention_in else [])
    keys += resnet("middle_block.0") + transformer("middle_block.1") + resnet("middle_block.2")
    for n in range(last):
        keys += resnet(f"output_blocks.{n}") + (transformer(f"output_blocks.{n}.1") if n in attention_out else [])
    return [*keys, f"{ROOT}out.2.weight"]


SD15 = unet({1, 2, 4, 5, 7, 8}, set(range(3, 12)), 12)
SDXL = unet({4, 5, 7, 8}, set(range(6)), 9)
FLUX = [f"{ROOT}img_in.weight"]
FLUX += [f"{ROOT}double_blocks.{n}.{stream}_{part}.weight" for n in range(19) for stream in ("img", "txt") for part in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
FLUX += [f"{ROOT}single_blocks.{n}.linear{part}.weight" for n in range(38) for part in (1, 2)] + [f"{ROOT}final_layer.linear.weight"]
KEYS = {"SD1.5": SD15, "SDXL": SDXL, "Flux": FLUX}
MODELS = {name: Blocks.of(keys) for name, keys in KEYS.items()}


def ranks(plan: BlockPlan, model: str = "SD1.5", method: Method = LORA) -> dict[str, int]:
    """Block -> rank, where all layers of a block have one; the blocks that have any."""
    read = plan.read(MODELS[model], method)
    found: dict[str, set] = {}
    for key in KEYS[model]:
        layer = read.at(key)
        found.setdefault(MODELS[model].place(key).block, set()).add(layer.method.residual.rank if layer else 0)
    assert all(len(values) == 1 for values in found.values()), found
    return {block: next(iter(values)) for block, values in found.items() if values != {0}}


def blocks_of_group(group: str, *numbers: int) -> list[str]:
    return [f"{group}{n:02d}" for n in numbers]


def test_an_empty_plan_is_the_method_itself():
    read = BlockPlan().read(MODELS["SD1.5"], LORA)
    assert all(read.at(key).method == LORA and read.at(key).rate == 1.0 for key in SD15)


@pytest.mark.parametrize(("text", "expected"), [
    ("IN04-IN06=4, MID1=0", {"IN05": 4, "IN04": 4, "IN06": 4, "MID1": None, "OUT03": 16, "EMB": 16}),
    ("default=0, OUT03=8", {"OUT03": 8, "OUT04": None, "IN01": None}),
    ("default=1, OUT03=8", {"OUT03": 8, "OUT04": 1, "FINAL": 1}),
    ("default=0, OUT03=1, MID=1", {"OUT03": 16, "MID0": 16, "MID1": 16, "OUT04": None}),
    ("MID1=0", {"MID1": None, "OUT04": 16}),
], ids=["unsaid is the method's", "default 0", "default 1 is a rank", "zeros and ones choose", "one zero"])  # fmt: skip
def test_ranks(text, expected):
    found = ranks(BlockPlan(rank=text))
    assert {block: found.get(block) for block in expected} == expected


@pytest.mark.parametrize("rank", [1, 4])
def test_the_papers_lists(rank):
    """kohya's block_dims and webui's list of 17, as Block-wise LoRA's upper blocks are written in them."""
    r = str(rank)
    kohya = ",".join(["0", *[r] * 3, *["0"] * 8, "0", *["0"] * 9, *[r] * 3])
    webui = "0,1,1,0,0,0,0,0,0,0,0,0,0,0,1,1,1"
    inside = {block: 16 if rank == 1 else rank for block in blocks_of_group("IN", 1, 2, 3) + blocks_of_group("OUT", 9, 10, 11)}
    assert ranks(BlockPlan(rank=kohya)) == inside
    chosen = ranks(BlockPlan(rank=webui))
    assert chosen == {block: 16 for block in inside if block != "IN03"}  # that list has the blocks with attention only


@pytest.mark.parametrize(("preset", "model", "expected"), [
    ("Block-wise upper (SD1.x)", "SD1.5", blocks_of_group("IN", 1, 2, 3) + blocks_of_group("OUT", 9, 10, 11)),
    ("Block-wise middle (SD1.x)", "SD1.5", blocks_of_group("IN", 4, 5, 6) + blocks_of_group("OUT", 6, 7, 8)),
    ("Block-wise bottom (SD1.x)", "SD1.5", blocks_of_group("IN", 7, 8, 9) + blocks_of_group("OUT", 3, 4, 5)),
    ("Block-wise upper (SDXL)", "SDXL", blocks_of_group("IN", 1, 2, 3) + blocks_of_group("OUT", 6, 7, 8)),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_presets_choose_blocks(preset, model, expected):
    """As a rank, and as a learning rate: the method's own rank in the preset's blocks, and nothing where its BASE, the text encoder's, is 1."""
    for plan in (BlockPlan(rank=preset), BlockPlan(learning_rate=preset)):
        assert ranks(plan, model) == dict.fromkeys(expected, 16)


def test_a_one_in_a_list_is_a_rank():
    """Block weights leave ones out, as they change nothing; as a rank or an alpha 1 is a number like any other."""
    text = ",".join(["4", "1", "1", *["0"] * 22])
    found = ranks(BlockPlan(rank=text))
    assert found == {"IN00": 4, "IN01": 1, "IN02": 1}
    read = BlockPlan(alpha=",".join(["1"] * 25)).read(MODELS["SD1.5"], LORA)
    assert {read.at(key).method.residual.alpha for key in SD15 if "_block" in key} == {1.0}
    with pytest.raises(TriLoRAError, match="rank: IN00=-1"):
        BlockPlan(rank=",".join(["-1", *["4"] * 24])).read(MODELS["SD1.5"], LORA)


def test_kohyas_dims_of_convolutions():
    """As they stand in network_args; the lists by themselves, and with quotes between them."""
    dims, conv = ["0", *["4"] * 24], ["0", *["2"] * 24]
    text = f'"block_dims={",".join(dims)}" "conv_block_dims={",".join(conv)}"'
    read = BlockPlan(rank=text, alpha=f"block_alphas={','.join(['1'] * 25)}").read(MODELS["SD1.5"], LORA)
    found = {part: read.at(f"{ROOT}{part}.weight") for part in ("input_blocks.0.0", "input_blocks.4.0.in_layers.2", "input_blocks.4.0.emb_layers.1", "time_embed.0")}
    assert [layer and layer.method.residual.rank for layer in found.values()] == [None, 2, 4, None]
    assert found["input_blocks.4.0.in_layers.2"].method.residual.alpha == 1.0
    assert BlockPlan(rank=read.canonical().rank).read(MODELS["SD1.5"], LORA).canonical().rank == read.canonical().rank
    with pytest.raises(TriLoRAError, match=r"rank: 'IN04=2,' stands before block_dims"):
        BlockPlan(rank=f"IN04=2, {text[1:]}").read(MODELS["SD1.5"], LORA)


@pytest.mark.parametrize(("field", "text"), [("rank", "train_double_block_indices=0,1,8-12 train_single_block_indices=none"),
                                             ("learning_rate", "train_double_block_indices=0,1,8-12 train_single_block_indices=none")])
def test_kohyas_index_lists_choose_blocks(field, text):
    found = ranks(BlockPlan(**{field: text}), "Flux")
    assert found == {block: 16 for block in ["IN", "FINAL", *blocks_of_group("D", 0, 1, *range(8, 13))]}


def test_kohyas_patterns_are_ranks():
    """What no pattern matches keeps the method's rank, as network_dim does there."""
    read = BlockPlan(rank="network_reg_dims=single_blocks_3_linear1=4,single_blocks_3_=2").read(MODELS["Flux"], LORA)
    found = {key: read.at(key).method.residual.rank for key in FLUX if ".single_blocks.3." in key or ".single_blocks.4." in key}
    assert [found[f"{ROOT}single_blocks.{n}.linear{part}.weight"] for n in (3, 4) for part in (1, 2)] == [4, 2, 16, 16]


def test_kohyas_learning_rates():
    """down_lr_weight and its words; weight 0 leaves the block out, as there."""
    plan = BlockPlan(learning_rate="down_lr_weight=zeros up_lr_weight=1,1,1,.5,.5,.5,1,1,1,0,0,0 mid_lr_weight=0.25")
    read = plan.read(MODELS["SD1.5"], LORA)
    rates = {MODELS["SD1.5"].place(key).block: (layer.rate if (layer := read.at(key)) else 0) for key in SD15}
    assert [rates[b] for b in ("IN00", "IN05", "MID0", "MID1", "OUT00", "OUT03", "OUT08", "OUT09", "EMB")] == [0, 0, 0.25, 0.25, 1, 0.5, 1, 0, 1]


def test_kinds_make_a_locon():
    read = BlockPlan(rank="default=8, .conv=4, OUT.cross=2").read(MODELS["SD1.5"], LORA)
    found = {part: read.at(f"{ROOT}output_blocks.4.{part}.weight").method.residual.rank
             for part in ("0.in_layers.2", "0.emb_layers.1", "1.transformer_blocks.0.attn1.to_q", "1.transformer_blocks.0.attn2.to_q")}
    assert list(found.values()) == [4, 8, 8, 2]


def test_alpha():
    """Where the text says nothing, or 0, the method's own stays."""
    read = BlockPlan(rank="default=4", alpha="OUT03=2, OUT04=0").read(MODELS["SD1.5"], LORA)
    alphas = {n: read.at(f"{ROOT}output_blocks.{n}.0.out_layers.3.weight").method.residual.alpha for n in (3, 4, 5)}
    assert alphas == {3: 2.0, 4: 8.0, 5: 8.0}


def test_a_chain_gives_blocks_their_methods():
    """A layer that a plan does not train is left to the earlier one, by rank or by learning rate, and by nothing else."""
    trilora, ring = Method(TriLoraConfig(rank=6)), build_method("TLoRA*", 0, 3)
    first = BlockPlan(rank="default=2", learning_rate="MID=0", alpha="default=1")
    second = BlockPlan(rank="default=0, OUT=1", method=trilora, earlier=first)
    read = BlockPlan(rank="IN=5, OUT=0", learning_rate="default=0, IN=0.5", method=ring, earlier=second).read(MODELS["SD1.5"], LORA)
    found = [read.at(f"{ROOT}{block}.0.out_layers.3.weight") for block in ("input_blocks.2", "output_blocks.2", "middle_block.0")]
    assert found[0].method == build_method("TLoRA*", 0, 5) and found[0].rate == 0.5
    assert found[1].method == trilora and found[1].rate == 1.0
    assert found[2] is None
    assert read.at(SD15[-1]).method == Method(LoraConfig(rank=2, alpha=1.0))


@pytest.mark.parametrize("pair", pairs())
def test_every_pair_takes_a_plan(pair):
    """Rank is the residual's size; a pair without a residual can only be trained or not."""
    method = build_method(pair)
    size = method.residual.SIZE
    read = BlockPlan(rank="default=0, MID1=3" if size else "default=0, MID1=1").read(MODELS["SD1.5"], method)
    layers = {key: read.at(key) for key in SD15}
    assert [key for key, layer in layers.items() if layer] == transformer("middle_block.1")
    layer = layers[transformer("middle_block.1")[0]].method
    assert layer.transform == method.transform
    assert layer.residual == method.residual if not size else getattr(layer.residual, size) == 3
    if not size:
        with pytest.raises(TriLoRAError, match=r"rank: MID1=4: .* has no rank; write 1 for the blocks to train"):
            BlockPlan(rank="MID1=4").read(MODELS["SD1.5"], method)
        with pytest.raises(TriLoRAError, match="has no alpha; leave this text empty"):
            BlockPlan(alpha="MID1=4").read(MODELS["SD1.5"], method)


@pytest.mark.parametrize(("plan", "message"), [
    (BlockPlan(rank="IN12=4"), r"block plan: rank: 'IN12' names no block of this model"),
    (BlockPlan(rank="D03=4"), r"block plan: rank: 'D03' names no block"),
    (BlockPlan(rank="default=8, OUT03=2.5"), r"rank: OUT03=2.5: a rank is a whole number of 1 or more, or 0"),
    (BlockPlan(rank="OUT03=-1"), r"rank: OUT03=-1: a rank is a whole number"),
    (BlockPlan(alpha="OUT03=-1"), r"alpha: OUT03=-1: alpha is a positive number, or 0"),
    (BlockPlan(learning_rate="default=-0.5"), r"learning_rate: default=-0.5: a factor of the learning rate"),
    (BlockPlan(rank="OUT=8", earlier=BlockPlan(learning_rate="OUT.audio=8")), r"learning_rate: 'audio' .* is no kind of layer of this model"),
    (BlockPlan(rank="1,2,3"), r"rank: 3 numbers are no list"),
])  # fmt: skip
def test_what_cannot_be_read(plan, message):
    with pytest.raises(TriLoRAError, match=message):
        plan.read(MODELS["SD1.5"], LORA)


def test_what_the_target_leaves_out():
    """Blocks without attention under a target of attention: SDXL's upper ones."""
    read = BlockPlan(rank="default=0, IN01-IN03=8, OUT06-OUT08=8, OUT05.cross=8, MID=0").read(MODELS["SDXL"], LORA)
    attention = [key for key in SDXL if ".attn" in key]
    assert read.unmet(attention, set(SDXL) - set(attention)) == ["IN01-IN03", "OUT06-OUT08"]
    assert read.unmet(SDXL, []) == []


@pytest.mark.parametrize("pair", [None, *pairs()])
def test_metadata_and_back(pair):
    """The canonical plan of a file reads as the plan itself: same layers, same methods, same rates."""
    rank = "IN=1, MID=0" if pair == "OFT-like" or (pair and pair.endswith("+ none")) else "IN=4, MID=0"
    plan = BlockPlan(rank, "" if rank.startswith("IN=1") else "OUT=3", "OUT.cross=0.3, IN02=0", pair and build_method(pair), BlockPlan(rank="default=0, MID1=5"))
    read = plan.read(MODELS["SD1.5"], LORA)
    written = to_metadata(read.canonical())
    again = from_metadata(written)
    assert again == read.canonical() and to_metadata(again) == written
    reread = again.read(MODELS["SD1.5"], LORA)
    assert [reread.at(key) for key in SD15] == [read.at(key) for key in SD15]


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1]", '[{"rank": 1, "alpha": "", "learning_rate": "", "method": null}]',
                                  '[{"rank": "", "alpha": "", "learning_rate": "", "method": {"residual": {"kind": "new"}, "transform": {"kind": "none"}}}]'])
def test_metadata_of_others(text):
    with pytest.raises(TriLoRAError, match=r"trilora.block_plan"):
        from_metadata(text)


@pytest.mark.parametrize("model", KEYS)
@pytest.mark.parametrize("seed", range(6))
def test_ranks_as_text(model, seed):
    """Any ranks of any layers are given back by their text: by blocks, by kinds, and layer by layer."""
    draw, blocks, keys = random.Random(seed), MODELS[model], KEYS[model]
    if seed < 2:  # by blocks
        of = {block: draw.choice([0, 0, 4, 8]) for block in blocks.ids}
        wanted = {key: of[blocks.place(key).block] for key in keys}
    elif seed < 4:  # by blocks and kinds
        of = {}
        wanted = {key: of.setdefault((blocks.place(key).block, blocks.place(key).kinds), draw.choice([0, 4, 8])) for key in keys}
    else:
        wanted = {key: draw.choice([0, 2, 3]) for key in keys}
    text = ranks_as_text(wanted, blocks)
    read = BlockPlan(rank=text).read(blocks, LORA)
    assert {key: (layer.method.residual.rank if (layer := read.at(key)) else 0) for key in keys} == wanted


def test_ranks_as_text_is_short():
    blocks = MODELS["SD1.5"]
    places = {key: blocks.place(key) for key in SD15}
    inside = {key: 8 if places[key].block in ("IN04", "IN05", "IN07", "OUT03") and "attn" in places[key].kinds else 0 for key in SD15}
    attention = {key: rank for key, rank in inside.items() if "attn" in places[key].kinds}
    # IN06 has no attention and may be in the range
    assert ranks_as_text(attention, blocks) == "default=0, IN04-IN07=8, OUT03=8"
    assert ranks_as_text(inside, blocks) == "default=0, IN04-IN05.attn=8, IN07.attn=8, OUT03.attn=8"
    assert ranks_as_text(dict.fromkeys(SD15, 4), blocks) == "default=4"
    one = {key: 4 if key.endswith("attn1.to_q.weight") and places[key].block == "MID1" else 0 for key in attention}
    name = r"diffusion_model\.middle_block\.1\.transformer_blocks\.0\.attn1\.to_q"
    assert ranks_as_text(one, blocks) == f"default=0, /^{name}$/=4"


def test_default_of_block_weights_is_one():
    """What `read_numbers` builds on: a text that says nothing of the rest gives it 1."""
    from comfyui_trilora.trilora_ops.block_syntax import parse

    assert parse("OUT=0.5", MODELS["SD1.5"]).default == BlockWeights(1.0).default == 1.0
