"""The bugs that block weight tools are known for, each with the file that shows it: by our Loader and by a Stack of one file.

I1-I4, I7 and L1 here; I8, R1-R3 and K1, which files of some trainers show, in test_block_bugs_of_files.py; I5 and L2 are the
parser's (test_block_readings.py), I6 is the bake's (test_bake.py), and R4, one node for every family, test_block_weights_node.py's.

Families are the host's own classes with all of their blocks and little width. What a file does whole is told by the
host's own loader at strength 1; W_1 below is the weight that it makes.
"""

import comfy.lora
import comfy.utils
import pytest
import torch
from comfyui_trilora.tests.host import small_families
from comfyui_trilora.tests.host.adapter_files import low_rank
from comfyui_trilora.tests.host.block_runs import LOADERS, load, parts, strengths, whole
from comfyui_trilora.tests.host.foreign_writers import deltas, weight_of
from comfyui_trilora.tests.host.small_families import layers_by_name, own_name
from comfyui_trilora.tests.host.tiny_run import distance, load_checkpoint

by_each_loader = pytest.mark.parametrize("loader", LOADERS)


@pytest.fixture(scope="module")
def clip(host_nodes, models_dir):
    return load_checkpoint(host_nodes)[1]


@by_each_loader
@pytest.mark.parametrize("text", ["default=0, OUT00=0.3, OUT01=-1", "0,0,0,0,0,0,0.3,-1,0,0,0,0", "OUT01=-1, OUT00=0.3, IN=9, MID=9, OUT02-OUT08=9"])
def test_I1_a_file_with_out00_and_out01_alone(host_nodes, saved, loader, text):
    """B-LoRA. The first number of a list is not the first block of the file."""
    model = small_families.sdxl()
    wanted = [f"lora_unet_output_blocks_{n}_1_transformer_blocks_0_{layer}" for n in (0, 1) for layer in ("attn1_to_q", "attn2_to_v", "ff_net_2")]
    name = saved(layers_by_name(model, lambda name, _: name in wanted))
    found = strengths(host_nodes, loader, model, name, text)
    assert len(found) == 6 and {key: ratio for key, ratio in found.items() if ratio != (0.3 if "output_blocks.0." in key else -1.0)} == {}


def flux_file(model, *heads: str) -> dict[str, torch.Tensor]:
    """A layer for every linear weight of these blocks, under the host's own names."""
    return layers_by_name(model, lambda name, target: own_name(name, target) and name.startswith(tuple(f"diffusion_model.{head}." for head in heads)))


def flux_list(**places: float) -> str:
    """57 numbers, D00 to D18 and S00 to S37, 0 but for some."""
    numbers = dict.fromkeys([*(f"D{n:02d}" for n in range(19)), *(f"S{n:02d}" for n in range(38))], 0.0) | places
    return ",".join(f"{number:g}" for number in numbers.values())


@by_each_loader
@pytest.mark.parametrize("text", ["default=0, S00=.1, S01=-.2, S02=0, S03=1.5", flux_list(S00=0.1, S01=-0.2, S03=1.5), "0,0,0," + flux_list(S00=0.1, S01=-0.2, S03=1.5) + ",0"])
def test_I1_a_file_with_singles_0_to_3_alone(host_nodes, saved, loader, text):
    model = small_families.flux()
    found = strengths(host_nodes, loader, model, saved(flux_file(model, *(f"single_blocks.{n}" for n in range(4)))), text)
    wanted = {"0": 0.1, "1": -0.2, "2": 0.0, "3": 1.5}
    assert len(found) == 12 and found == {key: wanted[key.split(".")[2]] for key in found}


@by_each_loader
@pytest.mark.parametrize("text", ["default=0, D07=0.5, S07=-1", flux_list(D07=0.5, S07=-1.0), "default=0.5, S07=-1"])
def test_I2_double_7_and_single_7_are_two_blocks(host_nodes, saved, loader, text):
    model = small_families.flux()
    found = strengths(host_nodes, loader, model, saved(flux_file(model, "double_blocks.7", "single_blocks.7")), text)
    assert len(found) > 8 and found == {key: 0.5 if "double" in key else -1.0 for key in found}


@by_each_loader
def test_a_kind_that_the_file_does_not_have_in_these_blocks_is_said(host_nodes, saved, loader, caplog):
    """Whole linear1 is attention and feed-forward at once: S.attn cannot reach it, and must not seem to."""
    model = small_families.flux()
    name = saved(flux_file(model, "single_blocks.7", "double_blocks.7"))
    found = strengths(host_nodes, loader, model, name, "D.img=0, S.attn=0, S09=0")
    assert {key: ratio for key, ratio in found.items() if ratio != 1} == {key: 0.0 for key in found if ".img_" in key}
    (line,) = [record.getMessage() for record in caplog.records if "block_weights" in record.getMessage()]
    assert "S.attn" in line and "fused" in line and "D.img" not in line and "S09" not in line


SPLIT = {
    "flux": ("default=0.5, D03=-1, S05=1.7, D00=0", {"double_blocks.3.": -1.0, "single_blocks.5.": 1.7, "double_blocks.0.": 0.0}),
    "sd3": ("default=0.5, J01=-1, J02=0", {"joint_blocks.1.": -1.0, "joint_blocks.2.": 0.0}),
    "z_image": ("default=0.5, L03=-1, CR1=1.7, NR0=0", {"layers.3.": -1.0, "context_refiner.1.": 1.7, "noise_refiner.0.": 0.0}),
    "auraflow": ("default=0.5, D01=-1, S05=1.7, S00=0", {"double_layers.1.": -1.0, "single_layers.5.": 1.7, "single_layers.0.": 0.0}),
}  # fmt: skip


@by_each_loader
@pytest.mark.parametrize("family", SPLIT)
def test_I3_every_slice_of_a_split_weight_is_kept(host_nodes, saved, loader, family):
    """Files in diffusers' names, where q, k and v are layers of their own, and halves stand the other way round."""
    model, (text, wanted) = getattr(small_families, family)(), SPLIT[family]
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    tensors = layers_by_name(model, lambda name, _: name.startswith("transformer."))
    if not tensors:
        pytest.skip("this host knows no Z-Image")
    layers, name = {key.rpartition(".lora_")[0] for key in tensors if key.endswith(".lora_up.weight")}, saved(tensors)
    ratios = {layer: next((ratio for block, ratio in wanted.items() if block in str(names[layer])), 0.5) for layer in layers}
    assert set(ratios.values()) == {0.5, *wanted.values()} and (family == "auraflow" or sum(isinstance(names[layer], tuple) for layer in layers) >= 12)
    patched, _ = load(host_nodes, loader, model, name, block_weights=text)
    assert parts(patched) == sum(ratio != 0 for ratio in ratios.values())
    for key, ratio in strengths(host_nodes, loader, model, name, text).items():
        assert ratio == next((wanted[block] for block in wanted if block in key), 0.5), key


@by_each_loader
def test_I3_slices_of_one_weight_with_strengths_of_their_own(host_nodes, saved, loader):
    """Flux' linear1: its rows for q, k and v are attention, those behind them feed-forward; streams of the double blocks too."""
    model = small_families.flux()
    heads = ("transformer.transformer_blocks.4.", "transformer.single_transformer_blocks.9.")
    name = saved(layers_by_name(model, lambda name, _: name.startswith(heads) and "qkv" not in name))
    found = deltas(load(host_nodes, loader, model, name, block_weights="default=0, S09.attn=-1, S09.mlp=1.7, D04.txt=0.5")[0], model)
    once = whole(host_nodes, model, name)
    linear1 = "diffusion_model.single_blocks.9.linear1.weight"
    assert distance(found[linear1][:96], -once[linear1][:96]) <= 1e-5 and distance(found[linear1][96:], 1.7 * once[linear1][96:]) <= 1e-5
    text = [key for key in once if ".txt_" in key]
    assert len(text) >= 4 and found.keys() == {linear1, *text}
    assert all(distance(found[key], 0.5 * once[key]) <= 1e-5 for key in text)


@by_each_loader
def test_I4_weights_with_context_in_their_name_reach_the_model(host_nodes, saved, clip, loader):
    """SD3.5's context_block, half of its weights, with a CLIP connected; by the key's owner, never by a word in it."""
    model = small_families.sd3()
    name = saved(layers_by_name(model, lambda name, target: own_name(name, target) and ("joint_blocks" in name or "context_embedder" in name)))
    for text, ratio in (("default=0.5", 0.5), ("J.txt=-1, J.img=0", -1.0), ("TE=0", 1.0)):
        found = strengths(host_nodes, loader, model, name, text)
        context = {key: r for key, r in found.items() if ".context_block." in key}
        assert len(context) >= 12 and set(context.values()) == {ratio}
        assert load(host_nodes, loader, model, name, clip, block_weights=text)[1].patcher.patches == {}


@by_each_loader
def test_I4_a_language_models_weights_reach_the_clip(host_nodes, saved, loader):
    """Z-Image: context_refiner is the model's, and qwen3_4b.transformer.model.layers, without "text" or "encoder", the CLIP's."""
    model, (clip, encoder) = small_families.z_image(), small_families.language_model()
    refiner = [f"diffusion_model.context_refiner.{n}.feed_forward.w2" for n in (0, 1)]
    layers = {n: f"{encoder}.transformer.model.layers.{n}.mlp.up_proj" for n in (3, 5, 7)}
    shapes = {name: tuple(comfy.utils.get_attr(clip.cond_stage_model, f"{name}.weight").shape) for name in layers.values()}
    tensors = {k: v for name in refiner for k, v in low_rank(name, *weight_of(model, f"{name}.weight").shape, rank=1).items()}
    tensors |= {k: v for name, shape in shapes.items() for k, v in low_rank(f"text_encoders.{name}", *shape, rank=1).items()}
    name = saved(tensors)
    patched, adapted = load(host_nodes, loader, model, name, clip, block_weights="default=0.25, CR0=0.5, LLM.03=-1, LLM.05=0")

    def strength(patcher, key: str) -> float:
        (patch,) = patcher.patches[f"{key}.weight"]
        return patch[0] * patch[1].weights[0][0]

    assert {key.removesuffix(".weight"): strength(patched, key.removesuffix(".weight")) for key in patched.patches} == {refiner[0]: 0.5, refiner[1]: 0.25}
    assert {key: strength(adapted.patcher, key.removesuffix(".weight")) for key in adapted.patcher.patches} == {f"{layers[3]}.weight": -1.0, f"{layers[7]}.weight": 0.25}


@by_each_loader
def test_I7_no_clip_is_needed_and_numbers_may_be_negative_or_begin_with_a_dot(host_nodes, saved, loader):
    model = small_families.sdxl()
    wanted = {"input_blocks.4.": 0.5, "input_blocks.5.": -1.0, "middle_block.": 1.0, "output_blocks.3.": -0.25}
    attention = tuple(f"diffusion_model.{block}1." for block in wanted)
    name = saved(layers_by_name(model, lambda name, key: name.startswith("lora_unet_") and key.startswith(attention)))
    for text in ("0,.5,-1,0,0,1.,0,0,0,-2.5e-1,0,0", "default=0, in04=.5, IN05=-1, MID=1., out03=-.25"):
        model_only, none = load(host_nodes, loader, model, name, block_weights=text)
        assert none is None and len(model_only.patches) >= 4 * 8
        found = strengths(host_nodes, loader, model, name, text)
        assert found == {key: next(ratio for block, ratio in wanted.items() if f".{block}" in key) for key in found}


@by_each_loader
@pytest.mark.parametrize("text", ["FACES", "1,1,1", "0,0,0,0,0,0,1,0,0,0,0,0,0,0"])
def test_L1_an_unknown_preset_or_length_is_an_error_not_full_strength(host_nodes, saved, pack_module, loader, text):
    model = small_families.sdxl()
    name = saved(low_rank("lora_unet_output_blocks_0_1_proj_in", *weight_of(model, "diffusion_model.output_blocks.0.1.proj_in.weight").shape))
    with pytest.raises(pack_module("trilora_ops.errors").TriLoRAError, match=rf"block_weights for {name}: .*nothing was applied"):
        load(host_nodes, loader, model, name, block_weights=text)
    assert model.patches == {}
