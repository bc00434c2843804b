"""The bugs that block weight tools are known for, part two: those that the files of some trainers show. See test_block_bugs.py."""

import re

import comfy.lora
import comfy.utils
import pytest
import torch
from comfyui_trilora.tests.host import small_families
from comfyui_trilora.tests.host.adapter_files import low_rank, normal
from comfyui_trilora.tests.host.block_runs import LOADERS, load
from comfyui_trilora.tests.host.foreign_writers import Twin, deltas, weight_of, write_peft
from comfyui_trilora.tests.host.small_families import layers_by_name
from comfyui_trilora.tests.host.tiny_run import distance, list_saved_adapters, run_node

by_each_loader = pytest.mark.parametrize("loader", LOADERS)


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


def norm_of_product(tensors: dict, layer: str) -> float:
    """‖alpha / r · up · down‖ in fp64."""
    up, down, alpha = (tensors[f"{layer}.{end}"].double() for end in ("lora_up.weight", "lora_down.weight", "alpha"))
    return float((alpha / down.shape[0] * up @ down).norm())


@pytest.mark.parametrize("family", ["z_image_turbo", None])
def test_R2_energy_is_the_exact_norm_and_the_family_the_files_own(host_nodes, saved, pack_module, family):
    """Not the sum of ‖up‖ ‖down‖, in which directions that cancel each other count, and alpha does not; never a family by default."""
    cancel, plain, weak = (f"diffusion_model.layers.{n}.attention.out" for n in (3, 17, 29))
    tensors = {key: tensor for seed, layer in enumerate((cancel, plain, weak)) for key, tensor in low_rank(layer, 56, 40, rank=4, seed=seed).items()}
    up, down = normal(56, 1), normal(1, 40)
    tensors[f"{cancel}.lora_up.weight"] = up + 0.01 * normal(56, 4)
    tensors[f"{cancel}.lora_down.weight"] = torch.cat([down, -down, down, -down]) + 0.01 * normal(4, 40)
    tensors |= {f"{plain}.alpha": torch.tensor(16.0), f"{weak}.alpha": torch.tensor(0.5)}
    exact = {layer: norm_of_product(tensors, layer) for layer in (cancel, plain, weak)}
    bounds = {layer: float(tensors[f"{layer}.lora_up.weight"].norm() * tensors[f"{layer}.lora_down.weight"].norm()) for layer in exact}
    assert max(bounds, key=bounds.get) == cancel and max(exact, key=exact.get) == plain and bounds[cancel] > 20 * exact[cancel]

    adapter = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=saved(tensors, family and {"ss_base_model_version": family}))[0]
    found = {layer.name: layer.energy**0.5 for layer in pack_module("trilora_ops.inspection").inspect(adapter)}
    assert found == pytest.approx(exact, rel=1e-4)
    report = run_node(host_nodes, "TriLoRAInspectAdapter", adapter=adapter)[1]
    energy = sum(norm**2 for norm in exact.values())
    assert f"‖R‖ = {energy**0.5:.4g} over 3 layers" in report
    shares = [f"{exact[layer] ** 2 / energy:6.1%}" for layer in sorted(exact, key=exact.get, reverse=True)]
    assert [line.split()[0] for line in report.partition("most energy")[2].splitlines()[1:]] == [share.strip() for share in shares]
    (base,) = [line for line in report.splitlines() if line.startswith("base")]
    assert (family or "not said") in base and "SDXL" not in report
    assert "L17" in report and not re.search(r"\b(IN|OUT|MID)\d", report)


def unet_names(model) -> dict:
    """Diffusers' name of every weight -> the host's target."""
    return {name: f"diffusion_model.{key}" for name, key in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items()}


def flux_names(model) -> dict:
    return comfy.utils.flux_to_diffusers(model.model.model_config.unet_config, output_prefix="diffusion_model.")


def sd3_names(model) -> dict:
    return comfy.utils.mmdit_to_diffusers(model.model.model_config.unet_config, output_prefix="diffusion_model.")


UNETS, FLUX, SD3 = (("sd15", "sdxl"), unet_names), (("flux",), flux_names), (("sd3",), sd3_names)
# whose names -> (models, layers and targets by diffusers' names, how the layer is called, whether with PEFT's endings)
SPELLINGS = {
    "kohya and OneTrainer, U-Net": (*UNETS, lambda name: "lora_unet_" + name.replace(".", "_"), False),
    "PEFT, U-Net": (*UNETS, lambda name: f"unet.{name}", True),
    "diffusers, U-Net": (*UNETS, lambda name: "unet." + re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1", name), True),
    "OneTrainer, Flux": (*FLUX, lambda name: "lora_transformer_" + name.replace(".", "_"), False),
    "diffusers, Flux": (*FLUX, lambda name: f"transformer.{name}", True),
    "OneTrainer, SD3": (*SD3, lambda name: "lora_transformer_" + name.replace(".", "_"), False),
    "diffusers, SD3": (*SD3, lambda name: f"transformer.{name}", True),
}  # fmt: skip
OTHER_NAMES = r"class_embedding|ff\w*\.linear_|to_qkv_mlp_proj|single_\S+\.attn\.to_out"  # of the same layers, in other models and LyCORIS' files
LISTS = {"input_blocks": "IN{:02d}", "middle_block": "MID{}", "output_blocks": "OUT{:02d}", "double_blocks": "D{:02d}", "single_blocks": "S{:02d}", "joint_blocks": "J{:02d}"}


def block_of(key: str) -> str:
    """Of a weight in one of a model's lists, else ""."""
    _, name, number, *_ = [*key.split("."), "", ""]
    return LISTS[name].format(int(number)) if name in LISTS else ""


def write_layers(model, targets: dict, spell, by_peft: bool) -> tuple[dict, dict]:
    """(a file's tensors, for every weight of the model what they add to it), for all matrices and kernels among `targets`."""
    weights, tensors, change = model.model.state_dict(), {}, {}
    for seed, (name, target) in enumerate(targets.items()):
        key, rows, *swap = (target, None) if isinstance(target, str) else (*target, None)[:3]
        if not name.endswith(".weight") or re.search(OTHER_NAMES, name) or key not in weights or weights[key].ndim < 2 or any(swap) or (rows and rows[0]):
            continue
        out, inp, *kernel = weights[key].shape
        _, start, length = rows or (0, 0, out)
        layer, name = low_rank("x", length, inp, 2, tuple(kernel), seed), spell(name.removesuffix(".weight"))
        up, down, alpha = layer.values()
        delta = change.setdefault(key, torch.zeros_like(weights[key], dtype=torch.float32))
        delta[start : start + length] += ((1.0 if by_peft else float(alpha) / 2) * up.flatten(1) @ down.flatten(1)).reshape(length, inp, *kernel)
        endings = {"lora_B.weight": up, "lora_A.weight": down} if by_peft else {"lora_up.weight": up, "lora_down.weight": down, "alpha": alpha}
        tensors |= {f"{name}.{ending}": tensor for ending, tensor in endings.items()}
    return tensors, change


@by_each_loader
@pytest.mark.parametrize(("spelling", "family"), [(name, family) for name, (families, *_) in SPELLINGS.items() for family in families])
def test_R3_every_layer_of_every_trainers_names_is_in_its_block(host_nodes, saved, loader, spelling, family, caplog):
    """Each block with a strength of its own, 0 and negative ones too, and the rest of the model with another."""
    _, names, spell, by_peft = SPELLINGS[spelling]
    model = getattr(small_families, family)()
    tensors, change = write_layers(model, names(model), spell, by_peft)
    blocks = sorted({block_of(key) for key in change} - {""})
    ratios = {"": 0.25} | {block: round(0.1 * (n % 31) - 1.5, 1) for n, block in enumerate(blocks)}
    text = ", ".join(["default=0.25", *(f"{block}={ratios[block]}" for block in blocks)])
    found = deltas(load(host_nodes, loader, model, saved(tensors), block_weights=text)[0], model)
    wanted = {key: ratios[block_of(key)] * delta for key, delta in change.items() if ratios[block_of(key)]}
    assert found.keys() == wanted.keys() and len(wanted) > 4 * len(ratios) and len(ratios) > 3
    assert {key: distance(found[key], wanted[key]) <= 1e-5 for key in wanted} == dict.fromkeys(wanted, True)
    assert not [record for record in caplog.records if "no place" in record.getMessage()]


@by_each_loader
def test_K1_one_is_one_of_a_peft_file_of_rank_four(host_nodes, tiny, trained, loader):
    """The number is a multiplier, it does not take the place of alpha: not 0.25."""
    name, merged = trained
    found = deltas(load(host_nodes, loader, tiny.patcher, name, block_weights="default=1.0")[0], tiny.patcher)
    assert found.keys() == merged.keys() and all(distance(found[key], merged[key]) <= 1e-5 for key in merged)
