"""Kinds of foreign layers as patches: rows that a model lays out otherwise, parts of fused weights and biases, two copies of the pack."""

import importlib.util
import logging
import shutil
import sys

import comfy.lora
import comfy.utils
import pytest
import torch
from comfyui_trilora.benchmarks.installation import ROOT
from comfyui_trilora.tests.fuzz import files
from comfyui_trilora.tests.host import adapter_files, tiny_models
from comfyui_trilora.tests.host.adapter_files import LINEAR, normal
from comfyui_trilora.tests.host.foreign_writers import weight_of
from comfyui_trilora.tests.host.tiny_run import distance

SWAPPED, NORM_OUT = "diffusion_model.final_layer.adaLN_modulation.1.weight", "transformer.norm_out.linear"
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"


@pytest.fixture
def read(pack_module):
    """Function: tensors, tiny model -> patches by target."""
    patches, checkpoint = pack_module("nodes.comfy_patches"), pack_module("trilora_ops.checkpoint")
    return lambda tensors, tiny: patches.patches_from_state(checkpoint.AdapterState(tensors), tiny.patcher, None, "a file")


def merged(patch, weight, strength=1.0, offset=None, function=None):
    with torch.inference_mode():
        return comfy.lora.calculate_weight([(strength, patch, 1.0, offset, function)], weight.clone(), "key")


@pytest.mark.parametrize("kind", [kind for kind, (_, axes) in files.KINDS.items() if axes == 2 and kind not in ("widening", "transform")])
def test_halves_that_the_host_exchanges(read, pack_module, kind):
    """A file knows the halves of Flux' last modulation the other way round: what depends on the weight is computed on the rows as the file has them."""
    import random

    tiny = tiny_models.flux_model()
    weight = weight_of(tiny.patcher, SWAPPED)
    tensors = files.layer(random.Random(kind), kind, weight.shape)
    patches = read({NORM_OUT + ending: tensor for ending, tensor in tensors.items()}, tiny)
    ((target, patch),) = patches.items()
    assert target[0] == SWAPPED and target[2] is comfy.utils.swap_scale_shift
    layer = pack_module("trilora_ops.files.kinds").read_layer("x", tensors).weight
    as_written = comfy.utils.swap_scale_shift(weight)
    wanted = comfy.utils.swap_scale_shift(layer.delta(as_written))
    for strength in (1.0, -0.4):
        assert distance(merged(patch, weight, strength, None, target[2]) - weight, strength * wanted) <= 1e-5
    stack = pack_module("nodes.comfy_stack").stack_patches([(patches, 0.7), ({SWAPPED: ("diff", (torch.ones_like(weight),))}, 0.1)])
    assert distance(merged(stack[SWAPPED], weight) - weight, 0.7 * wanted + 0.1) <= 1e-5


def test_biases_of_parts_of_a_fused_layer(read):
    """q, k and v each have a bias in the file, and the model has one for all three; a model without it says that it has none."""
    tiny = tiny_models.flux_model()
    names = [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    file = {f"{name}.diff_b": normal(64, seed=i) for i, name in enumerate(names)} | adapter_files.low_rank(names[0], 64, 64)
    patches = read(file, tiny)
    assert set(patches) == {(f"{QKV}.weight", (0, 0, 64))} | {(f"{QKV}.bias", (0, 64 * i, 64)) for i in range(3)}
    bias = weight_of(tiny.patcher, f"{QKV}.bias")
    found = bias.clone()
    for (key, offset), patch in patches.items():
        found = merged(patch, found, 0.5, offset) if key.endswith("bias") else found
    assert distance(found - bias, 0.5 * torch.cat([normal(64, seed=i) for i in range(3)])) <= 1e-6


def test_a_bias_that_the_model_has_not(read, tiny, caplog):
    patches = read(adapter_files.low_rank(LINEAR, 128, 128) | {f"{LINEAR}.diff_b": normal(128)}, tiny)
    assert list(patches) == [f"{LINEAR}.weight"]
    assert f"{LINEAR}.diff_b (the model has no such weight)" in caplog.text


@pytest.fixture
def second_copy(pack, tmp_path):
    """A copy of the pack in another folder, loaded after the first as the host loads it, without its nodes."""
    folder = tmp_path / "ComfyUI-TriLoRA-main"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "tests", "*cache*"))
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield name, folder
    for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[loaded]


def test_two_copies_of_the_pack(pack, pack_module, second_copy, tiny, caplog):
    """The first one's classes stay in the host's list, a warning names both folders, and the second one's nodes work as the first one's do."""
    name, folder = second_copy
    before = list(comfy.weight_adapter.adapters)
    caplog.set_level(logging.WARNING)
    importlib.import_module(f"{name}.nodes").TriLoRAExtension()
    assert comfy.weight_adapter.adapters == before
    assert str(folder) in caplog.text and str(ROOT) in caplog.text and "two copies" in caplog.text
    second = {module: importlib.import_module(f"{name}.{module}") for module in ("nodes.comfy_patches", "nodes.plan_from_adapter", "trilora_ops.checkpoint", "trilora_ops.errors")}
    tensors = adapter_files.transform(tiny.patcher, pack_module("trilora_ops.registry"))
    state = second["trilora_ops.checkpoint"].AdapterState(tensors)
    (plan, target), (wanted, same) = (module.plan_of(state, tiny.patcher) for module in (second["nodes.plan_from_adapter"], pack_module("nodes.plan_from_adapter")))
    assert plan.rank == wanted.rank and target == same
    ours, theirs = (patches.patches_from_state(state, tiny.patcher, None, "file") for patches in (pack_module("nodes.comfy_patches"), second["nodes.comfy_patches"]))
    for key, patch in ours.items():
        weight = weight_of(tiny.patcher, key)
        assert torch.equal(merged(patch, weight), merged(theirs[key], weight))
    core = next(key for key in tensors if key.endswith("core0"))
    with pytest.raises(second["trilora_ops.errors"].TriLoRAError, match="cannot be read"):
        second["nodes.comfy_patches"].patches_from_state(second["trilora_ops.checkpoint"].AdapterState(tensors | {core: tensors[core][..., :-1]}), tiny.patcher, None, "file")
