"""Adapter Stack: W + sum of strength * (W_i - W) over files of every kind, in any order, as one patch a weight.

W_i is what the host's own loader makes of file i alone, at strength 1, and for DoRA what its writers mean.
"""

import random

import comfy.lora
import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from comfyui_trilora.tests.host import adapter_files, tiny_models
from comfyui_trilora.tests.host.adapter_files import CONV, KEYS, LINEAR, low_rank, normal
from comfyui_trilora.tests.host.foreign_writers import dora
from comfyui_trilora.tests.host.tiny_run import distance, list_saved_adapters, load_checkpoint, run_node, weights_hash
from safetensors.torch import load_file, save_file

STRENGTHS = (1.0, 0.4, -0.7, 1.6, 0.25, -0.3, 0.8, 0.5, 0.9, 1.2, -0.15, 0.7, 0.6, 0.35)
ORDERS = 20


def weight_of(patcher, key: str) -> torch.Tensor:
    """A weight of a MODEL with all of its patches, in fp32."""
    return patched(comfy.utils.get_attr(patcher.model, key).detach().float().clone(), patcher.patches.get(key, []))


@torch.inference_mode()  # as the host loads a model
def patched(weight: torch.Tensor, patches: list) -> torch.Tensor:
    """The host's merge of patches into a weight, which is left alone."""
    return comfy.lora.calculate_weight(patches, weight.clone(), "key")


def alone(host_nodes, patcher, name: str) -> dict[str, torch.Tensor]:
    """Weight key -> W_i - W of a file, by the host's own loader at strength 1."""
    (loaded,) = run_node(host_nodes, "LoraLoaderModelOnly", model=patcher, lora_name=name, strength_model=1.0)
    return {key: weight_of(loaded, key) - weight_of(patcher, key) for key in loaded.patches}


def stacked(host_nodes, entries):
    """The TRILORA_STACK of (file name, strength) entries, one Adapter Stack node after the other."""
    stack = None
    for name, strength in entries:
        (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", lora_name=name, strength_model=strength, strength_clip=strength, **({"stack": stack} if stack else {}))
    return stack


def applied(host_nodes, patcher, entries, **inputs):
    """The MODEL with the entries on it."""
    return run_node(host_nodes, "TriLoRAApplyStack", model=patcher, stack=stacked(host_nodes, entries), **inputs)[0]


@pytest.fixture(scope="module")
def files(tiny, saved, pack_module):
    """Kind -> file name, of every kind there is."""
    pytest.importorskip("lycoris")
    kinds = adapter_files.every_kind(tiny.patcher, pack_module("trilora_ops.registry"), pack_module("trilora_ops.checkpoint"))
    assert len(kinds) == len(STRENGTHS)
    return {kind: saved(*file) for kind, file in kinds.items()}


@pytest.fixture(scope="module")
def deltas(host_nodes, tiny, files):
    """Kind -> {weight key: W_i - W}: by the host's own loader, DoRA by its formula, which core's is not."""
    found = {kind: alone(host_nodes, tiny.patcher, name) for kind, name in files.items()}
    return found | {"dora": dora(tiny.patcher, load_file(folder_paths.get_full_path("loras", files["dora"])))}


@pytest.fixture(scope="module")
def dense(tiny, deltas):
    """Weight key -> sum of strength * (W_i - W), in fp64."""
    total = {}
    for strength, delta in zip(STRENGTHS, deltas.values(), strict=True):
        for key, change in delta.items():
            total[key] = total.get(key, 0) + strength * change.double()
    return total


def outputs(tiny, patcher) -> torch.Tensor:
    latent = normal(*tiny.latent_shape, seed=8)
    with torch.inference_mode():
        return tiny_models.predict(tiny._replace(patcher=patcher), latent, 0.9)


def test_fourteen_kinds_in_twenty_orders_are_the_dense_formula(host_nodes, tiny, files, deltas, dense, pack_module):
    """All files on the same weights: one patch a weight, one result, to fp32's rounding of the delta."""
    for kind, delta in deltas.items():
        assert all(distance(weight_of(tiny.patcher, key) + change, weight_of(tiny.patcher, key)) > 1e-3 for key, change in delta.items()), kind
    entries, shuffle = list(zip(files.values(), STRENGTHS, strict=True)), random.Random(5)
    stack_patch, first = pack_module("nodes.comfy_stack").StackPatch, None
    for _ in range(ORDERS):
        shuffle.shuffle(entries)
        model = applied(host_nodes, tiny.patcher, entries)
        assert model.patches.keys() == dense.keys() and len(dense) >= 4
        for patch, *more in model.patches.values():
            assert not more and isinstance(patch[1], stack_patch) and patch[0] == 1.0
        found = {key: weight_of(model, key) - weight_of(tiny.patcher, key) for key in dense}
        first = first or found
        for key in dense:
            assert distance(found[key], dense[key]) <= 1e-5 and distance(found[key], first[key]) <= 1e-5, key
    assert all(len(model.patches[key][0][1].weights) >= 13 for key in KEYS)


def test_a_stack_of_one_is_the_hosts_loader(host_nodes, tiny, files, deltas):
    for kind, name in files.items():
        model = applied(host_nodes, tiny.patcher, [(name, 1.0)])
        for key, delta in deltas[kind].items():
            assert distance(weight_of(model, key) - weight_of(tiny.patcher, key), delta) <= 1e-5, kind


@pytest.mark.parametrize("strength", [-0.7, 0.5, 2.0])
def test_strength_is_linear_for_every_kind(host_nodes, tiny, files, deltas, strength):
    """Core squares it for OFT and bends it for BOFT; a stack does not."""
    for kind, name in files.items():
        model = applied(host_nodes, tiny.patcher, [(name, strength)])
        for key, delta in deltas[kind].items():
            assert distance(weight_of(model, key) - weight_of(tiny.patcher, key), strength * delta) <= 1e-5, kind


def test_a_file_twice_counts_twice_and_strength_zero_is_not_read(host_nodes, tiny, files, deltas, saved):
    broken = saved({f"{LINEAR}.lora_up.weight": normal(3, 3)})
    twice = applied(host_nodes, tiny.patcher, [(files["boft"], 0.5), (broken, 0.0), (files["boft"], 0.7)])
    for key, delta in deltas["boft"].items():
        assert distance(weight_of(twice, key) - weight_of(tiny.patcher, key), 1.2 * delta) <= 1e-5
    assert applied(host_nodes, tiny.patcher, [(broken, 0.0)]).patches == {}


def test_the_model_computes_with_it_and_is_left_as_it_was(host_nodes, tiny, files, dense):
    """Through the host's sampling path; before, after and beside it the original model and its output."""
    before, original = weights_hash(tiny.patcher), outputs(tiny, tiny.patcher)
    model = applied(host_nodes, tiny.patcher, list(zip(files.values(), STRENGTHS, strict=True)))
    by_hand = tiny.patcher.clone()
    by_hand.add_patches({key: ("diff", (delta.float(),)) for key, delta in dense.items()}, 1.0)
    found, wanted = outputs(tiny, model), outputs(tiny, by_hand)
    assert distance(found, wanted) <= 1e-5 and distance(found, original) > 1e-2
    assert tiny.patcher.patches == {} and weights_hash(tiny.patcher) == before
    assert torch.equal(outputs(tiny, tiny.patcher), original)


def test_what_precedes_the_stack_is_w_and_what_follows_acts_on_its_result(host_nodes, tiny, files):
    """A stock loader before it, a stock loader and a second stack after it: patches in the order of the graph."""
    (before,) = run_node(host_nodes, "LoraLoaderModelOnly", model=tiny.patcher, lora_name=files["full"], strength_model=0.6)
    model = applied(host_nodes, before, [(files["oft"], 0.5), (files["lora"], 0.8)])
    (model,) = run_node(host_nodes, "LoraLoaderModelOnly", model=model, lora_name=files["glora"], strength_model=0.9)
    model = applied(host_nodes, model, [(files["tlora"], 1.0)])
    assert all(len(model.patches[key]) == 4 for key in KEYS)
    for key in KEYS:
        weight = weight_of(before, key)
        for step in ([("oft", 0.5), ("lora", 0.8)], [("glora", 0.9)], [("tlora", 1.0)]):
            changes = []
            for kind, strength in step:
                (loaded,) = run_node(host_nodes, "LoraLoaderModelOnly", model=tiny.patcher, lora_name=files[kind], strength_model=1.0)
                changes.append(strength * (patched(weight, loaded.patches[key]) - weight))
            weight = weight + sum(changes)
        assert distance(weight_of(model, key), weight) <= 1e-5


def test_the_text_encoder_gets_its_own_strengths(host_nodes, tiny, saved, files, models_dir):
    clip = load_checkpoint(host_nodes)[1]
    te = "lora_te_text_model_encoder_layers_3_mlp_fc1"
    names = [saved({**low_rank(te, 3072, 768, seed=seed), **low_rank(LINEAR, 128, 128, seed=seed)}) for seed in (1, 2)]
    stack = stacked(host_nodes, [])
    for name, on_model, on_clip in ((names[0], 0.0, 0.5), (names[1], 0.8, -0.4), (files["loha"], 0.3, 1.0)):
        (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", lora_name=name, strength_model=on_model, strength_clip=on_clip, **({"stack": stack} if stack else {}))
    model, text = run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, stack=stack, clip=clip)
    cores = [run_node(host_nodes, "LoraLoader", model=tiny.patcher, clip=clip, lora_name=name, strength_model=1.0, strength_clip=1.0)[1] for name in names]
    (key,) = text.patcher.patches
    plain = weight_of(clip.patcher, key)
    wanted = 0.5 * (weight_of(cores[0].patcher, key) - plain) - 0.4 * (weight_of(cores[1].patcher, key) - plain)
    assert distance(weight_of(text.patcher, key) - plain, wanted) <= 1e-5
    assert len(text.patcher.patches[key]) == 1 and len(model.patches[KEYS[0]][0][1].weights) == 2
    assert clip.patcher.patches == {} and tiny.patcher.patches == {}
    without, no_clip = run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, stack=stack)
    assert no_clip is None and torch.equal(weight_of(without, KEYS[0]), weight_of(model, KEYS[0]))


def test_another_extensions_lora_stack(host_nodes, tiny, files, deltas, pack_module):
    """A list of (name, strength on the model, strength on CLIP), alone and beside ours; slots that are off are skipped."""
    theirs = [(files["lokr"], 0.5, 1.0), ("None", 1.0, 1.0), (None, 1.0, 1.0), [files["dora"], -0.2, 1]]
    both = run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, stack=stacked(host_nodes, [(files["full"], 0.3)]), lora_stack=theirs)[0]
    only = run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, lora_stack=theirs)[0]
    for key in KEYS:
        wanted = 0.5 * deltas["lokr"][key] - 0.2 * deltas["dora"][key]
        assert distance(weight_of(only, key) - weight_of(tiny.patcher, key), wanted) <= 1e-5
        assert distance(weight_of(both, key) - weight_of(tiny.patcher, key), wanted + 0.3 * deltas["full"][key]) <= 1e-5
    assert run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, lora_stack=[])[0].patches == {}
    error = pack_module("trilora_ops.errors").TriLoRAError
    with pytest.raises(error, match="lora_stack: an entry is 'x.safetensors', expected"):
        run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, lora_stack=["x.safetensors"])
    with pytest.raises(error, match="stack: nothing is connected"):
        run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher)


def test_keep_rank_is_each_entrys_own(host_nodes, tiny, files):
    kept = {rank: run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=files["trilora"], keep_rank=rank)[0] for rank in (0, 1)}
    (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", lora_name=files["trilora"], strength_model=0.5, keep_rank=1)
    (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", lora_name=files["trilora"], strength_model=2.0, stack=stack)
    model = run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, stack=stack)[0]
    for key in KEYS:
        one, whole = (weight_of(kept[rank], key) - weight_of(tiny.patcher, key) for rank in (1, 0))
        assert distance(weight_of(model, key) - weight_of(tiny.patcher, key), 0.5 * one + 2 * whole) <= 1e-5 and distance(one, whole) > 0.1


def test_a_stack_runs_again_when_a_file_has_changed(pack_module, saved):
    node = pack_module("nodes.stack").AdapterStack
    name = saved(low_rank(CONV, 128, 128, kernel=(3, 3)))
    before = node.fingerprint_inputs(lora_name=name, strength_model=1.0, stack=None)
    assert before == node.fingerprint_inputs(lora_name=name)
    save_file(low_rank(CONV, 128, 128, rank=4, kernel=(3, 3)), list_saved_adapters() / name)
    assert node.fingerprint_inputs(lora_name=name) != before
