"""What the texts of a block plan take from sd-scripts and from lists, and what they refuse because it would mean something else."""

import pytest
from comfyui_trilora.tests.test_plan import LORA, MODELS, SD15, ranks
from comfyui_trilora.trilora_ops.block_plan import BlockPlan
from comfyui_trilora.trilora_ops.block_presets import BUILT_IN
from comfyui_trilora.trilora_ops.errors import TriLoRAError

DIMS, ALPHAS = f"block_dims={','.join(['4'] * 25)}", f"block_alphas={','.join(['2'] * 25)}"
MIDD = "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0"


def read(model="SD1.5", presets=BUILT_IN, **texts):
    return BlockPlan(**texts).read(MODELS[model], LORA, presets)


@pytest.mark.parametrize("line", [f"{DIMS} {ALPHAS}", f"{ALPHAS} {DIMS}", f'"{DIMS}" "{ALPHAS}" "down_lr_weight=1,1,1,1,1,1,.5,.5,.5,.5,.5,.5"'])
def test_a_line_of_network_args_stands_in_every_text_and_each_takes_its_own(line):
    plan = read(rank=line, alpha=line)
    layers = [plan.at(key).method.residual for key in SD15 if "_block" in key]
    assert layers and {(layer.rank, layer.alpha) for layer in layers} == {(4, 2.0)}


def test_dims_and_indices_of_one_line_hold_together():
    line = "network_reg_dims=single_blocks=4 train_double_block_indices=none"
    found = ranks(BlockPlan(rank=line), "Flux")
    assert {rank for block, rank in found.items() if block.startswith("S")} == {4} and not any(block.startswith("D") for block in found)


@pytest.mark.parametrize(("field", "text", "words"), [
    ("rank", ALPHAS, "rank: block_alphas belongs in the text alpha"),
    ("alpha", DIMS, "alpha: block_dims belongs in the text rank"),
    ("learning_rate", DIMS, "learning_rate: block_dims belongs in the text rank"),
    ("rank", "down_lr_weight=cosine", "rank: down_lr_weight belongs in the text learning_rate"),
    ("learning_rate", "network_reg_dims=attn=8", "learning_rate: network_reg_dims belongs in the text rank"),
    ("learning_rate", "network_reg_lrs=attn=1e-4", "network_reg_lrs has learning rates, and a plan has factors"),
    ("learning_rate", f"down_lr_weight=cosine block_lr={','.join(['1e-4'] * 23)}", "block_lr has learning rates, and a plan has factors"),
])  # fmt: skip
def test_an_argument_in_the_wrong_text_is_an_error_that_says_where_it_belongs(field, text, words):
    model = "Flux" if "reg" in text else "SD1.5"
    with pytest.raises(TriLoRAError, match=words):
        read(model, **{field: text})


@pytest.mark.parametrize("text", [MIDD, "MIDD", "lbw=MIDD", f"lbw={MIDD}", f"<lora:x:1:lbw={MIDD}>", f"<lora:x:1:1:LBW={MIDD};>", f"MINE:{MIDD}", MIDD.replace(",", "，"), "MINE"])
def test_base_gives_nothing_to_the_layers_outside_the_blocks_however_the_list_is_written(text):
    plan = read(rank=text, presets={**BUILT_IN, "MINE": f"lbw={MIDD}"})
    found = {MODELS["SD1.5"].place(key).block for key in SD15 if plan.at(key)}
    assert found == {"IN05", "IN07", "IN08", "MID0", "MID1", "MID2", *(f"OUT{n:02d}" for n in range(3, 7))}


@pytest.mark.parametrize("text", ["default=1, IN04=8", "MINE"])
def test_a_default_is_one_where_it_says_so_in_a_preset_too(text):
    plan = read(rank=text, presets={**BUILT_IN, "MINE": "default=1, IN04=8"})
    assert plan.steps[0].rank.default == 1


def test_text_encoders_are_named_as_not_trained():
    assert read(rank="default=0, OUT11=4, TE1=4, TE=2, IN04=0").text_encoders() == ["TE1", "TE"]
    assert read(rank="default=0, OUT11=4, TE1=0").text_encoders() == [] and read(rank=MIDD).text_encoders() == []
