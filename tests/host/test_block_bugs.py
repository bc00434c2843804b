"""The bugs that block weight tools are known for, each with the file that shows it: by our Loader and by a Stack of one file.

Families are the host's own classes with all of their blocks and little width. What a file does whole is told by the
host's own loader at strength 1; W_1 below is the weight that it makes.
"""

import comfy.lora
import comfy.utils
import pytest
import torch
from comfyui_trilora.tests.host import small_families, tiny_models
from comfyui_trilora.tests.host.adapter_files import low_rank, normal
from comfyui_trilora.tests.host.foreign_writers import Twin, deltas, weight_of, write_peft
from comfyui_trilora.tests.host.small_families import layers_by_name, own_name
from comfyui_trilora.tests.host.tiny_run import distance, list_saved_adapters, load_checkpoint, run_node

LOADERS = ("TriLoRALoader", "TriLoRAApplyStack")
by_each_loader = pytest.mark.parametrize("loader", LOADERS)


def load(host_nodes, loader: str, model, name: str, clip=None, **inputs):
    """(MODEL, CLIP) from the Loader or from a Stack of one file."""
    more = {} if clip is None else {"clip": clip}
    if loader == "TriLoRALoader":
        return run_node(host_nodes, loader, model=model, lora_name=name, **more, **inputs)
    (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", lora_name=name, **inputs)
    return run_node(host_nodes, loader, model=model, stack=stack, **more)


def whole(host_nodes, model, name: str) -> dict[str, torch.Tensor]:
    """Weight key -> W_1 - W."""
    return deltas(run_node(host_nodes, "LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)[0], model)


def strengths(host_nodes, loader: str, model, name: str, text: str) -> dict[str, float]:
    """Weight key -> ratio, W' being W + ratio * (W_1 - W), for each weight that the file changes whole."""
    once = whole(host_nodes, model, name)
    found, ratios = deltas(load(host_nodes, loader, model, name, block_weights=text)[0], model), {}
    for key, delta in once.items():
        change = found.pop(key, torch.zeros_like(delta))
        ratios[key] = float((change.double() * delta.double()).sum() / delta.double().square().sum())
        assert float((change - ratios[key] * delta).norm()) <= 1e-5 * float(delta.norm()), key
    assert not found
    return {key: round(ratio, 4) for key, ratio in ratios.items()}


def parts(model) -> int:
    """How many layers of files are in a MODEL's patches."""
    return sum(len(patch[1].weights) for found in model.patches.values() for patch in found)


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


def control_file(model) -> dict[str, torch.Tensor]:
    """Black Forest Labs' control files: lora_A and lora_B without a prefix, biases, whole norms, and an input twice as wide."""
    tensors = {}
    for head in ("img_in", "double_blocks.2.img_attn.qkv", "single_blocks.5.linear2"):
        out, inp = weight_of(model, f"diffusion_model.{head}.weight").shape
        low = low_rank(head, out, 2 * inp if head == "img_in" else inp)
        tensors |= {f"{head}.lora_A.weight": low[f"{head}.lora_down.weight"], f"{head}.lora_B.weight": low[f"{head}.lora_up.weight"],
                    f"{head}.lora_B.bias": 0.1 * normal(out)}  # fmt: skip
    return tensors | {f"single_blocks.{n}.norm.key_norm.scale": 1 + 0.1 * normal(16, seed=n) for n in (0, 5)}


def uso_file(model) -> dict[str, torch.Tensor]:
    """USO's names: processor.qkv_lora1, qkv_lora2, proj_lora, on every block."""
    layers = {"qkv_lora1": "img_attn.qkv", "qkv_lora2": "txt_attn.qkv", "proj_lora1": "img_attn.proj", "proj_lora2": "txt_attn.proj"}
    places = [(f"double_blocks.{n}.processor.{name}", f"double_blocks.{n}.{key}", None) for n in range(19) for name, key in layers.items()]
    places += [(f"single_blocks.{n}.processor.{name}", f"single_blocks.{n}.{key}", rows) for n in range(38) for name, key, rows in (("qkv_lora", "linear1", 96), ("proj_lora", "linear2", None))]
    tensors = {}
    for name, key, rows in places:
        out, inp = weight_of(model, f"diffusion_model.{key}.weight").shape
        tensors |= {k.replace("lora_", ""): v for k, v in low_rank(name, rows or out, inp, rank=1).items() if not k.endswith(".alpha")}
    return tensors


def fun_file(model) -> dict[str, torch.Tensor]:
    """Wan-Fun's names: kohya's with one underscore too many."""
    tensors = layers_by_name(model, lambda name, _: name.startswith("lora_unet_blocks_") and "attn" in name, rank=1)
    return {key.replace("lora_unet_", "lora_unet__"): tensor for key, tensor in tensors.items()}


CONVERTED = {
    "control": (small_families.flux, control_file, "default=0.5, D02=-1, S05=1.7", {"double_blocks.2.": -1.0, "single_blocks.5.": 1.7}),
    "USO": (small_families.flux, uso_file, "default=0.5, D02=-1, S05=0", {"double_blocks.2.": -1.0, "single_blocks.5.": 0.0}),
    "Wan-Fun": (small_families.wan, fun_file, "default=0.5, B00=-1, B29=1.7", {"blocks.0.": -1.0, "blocks.29.": 1.7}),
}  # fmt: skip


@by_each_loader
@pytest.mark.parametrize("form", CONVERTED)
def test_I8_forms_that_the_host_converts_load(host_nodes, saved, loader, form):
    build, write, text, wanted = CONVERTED[form]
    model = build()
    name = saved(write(model))
    (core,) = run_node(host_nodes, "LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)
    patched, _ = load(host_nodes, loader, model, name, block_weights=text)
    seen = set()
    for key in core.patches:
        ratio = next((wanted[block] for block in wanted if f".{block}" in key), 0.5)
        seen.add(ratio)
        once, weight = weight_of(core, key), weight_of(model, key)
        if once.shape != weight.shape:  # the wider input: zeros beside W
            weight = comfy.lora.pad_tensor_to_shape(weight, once.shape)
        assert (key in patched.patches) == bool(ratio)
        assert not ratio or distance(weight_of(patched, key) - weight, ratio * (once - weight)) <= 1e-5, key
    assert seen == {0.5, *wanted.values()} and len(core.patches) >= 5


@pytest.fixture(scope="module")
def tiny(host_nodes):
    return tiny_models.eps_prediction_model()


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """PEFT's own file, rank 4 and alpha 4, on every layer: (its name, what PEFT merges)."""
    folder = list_saved_adapters() / "blocks_of_peft"
    path, merged = write_peft(Twin(tiny.patcher), folder, 4, 4.0)
    yield str(path.relative_to(list_saved_adapters())), merged
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


RATIOS = {"input_blocks.1.": 0.5, "input_blocks.3.": -1.0, "middle_block.": 0.0, "output_blocks.1.": 1.5}
TEXT = "IN01=0.5, IN03=-1, MID=0, OUT01=1.5"


@by_each_loader
def test_R1_half_is_half_and_minus_one_has_a_sign(host_nodes, tiny, saved, trained, loader):
    """Not 0.125 or 0.25, not 3.375 or 2.25, not +1: of kohya's files, with alpha, and of PEFT's."""
    names = comfy.lora.model_lora_keys_unet(tiny.patcher.model, {})
    kohya = layers_by_name(tiny.patcher, lambda name, _: name.startswith("lora_unet_"))
    name = saved(kohya)
    dense = {}
    for layer in {key.rpartition(".lora_")[0] for key in kohya if ".lora_" in key}:
        up, down, alpha = (kohya[f"{layer}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
        dense[names[layer]] = float(alpha) / down.shape[0] * up @ down
    for file, whole_file in ((name, dense), trained):
        found = deltas(load(host_nodes, loader, tiny.patcher, file, block_weights=TEXT)[0], tiny.patcher)
        ratios = {key: next((ratio for block, ratio in RATIOS.items() if f".{block}" in key), 1.0) for key in whole_file}
        assert set(ratios.values()) == {0.5, -1.0, 0.0, 1.5, 1.0} and found.keys() == {key for key, ratio in ratios.items() if ratio}
        assert all(distance(found[key], ratios[key] * whole_file[key]) <= 1e-5 for key in found)


@by_each_loader
def test_K1_one_is_one_of_a_peft_file_of_rank_four(host_nodes, tiny, trained, loader):
    """The number is a multiplier, it does not take the place of alpha: not 0.25."""
    name, merged = trained
    found = deltas(load(host_nodes, loader, tiny.patcher, name, block_weights="default=1.0")[0], tiny.patcher)
    assert found.keys() == merged.keys() and all(distance(found[key], merged[key]) <= 1e-5 for key in merged)


@by_each_loader
@pytest.mark.parametrize("text", ["FACES", "1,1,1", "0,0,0,0,0,0,1,0,0,0,0,0,0,0"])
def test_L1_an_unknown_preset_or_length_is_an_error_not_full_strength(host_nodes, saved, pack_module, loader, text):
    model = small_families.sdxl()
    name = saved(low_rank("lora_unet_output_blocks_0_1_proj_in", *weight_of(model, "diffusion_model.output_blocks.0.1.proj_in.weight").shape))
    with pytest.raises(pack_module("trilora_ops.errors").TriLoRAError, match=rf"block_weights for {name}: .*nothing was applied"):
        load(host_nodes, loader, model, name, block_weights=text)
    assert model.patches == {}
