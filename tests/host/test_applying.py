"""Adapters on the host's models: what our loader does to weights is what the host's own loader does, or says why not."""

import comfy.lora
import comfy.utils
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import distance, list_saved_adapters, run_node, weights_hash

QUERY = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
FEED = "diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj"
KERNEL = "diffusion_model.middle_block.0.in_layers.2"
STRENGTHS = (-0.7, 0.5, 2.0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lora_weights(out: int, inp: int, rank: int = 3, kernel: tuple[int, ...] = (), alpha: float | None = 1.5) -> tuple:
    """(up, down, alpha, mid, dora_scale, reshape) as the host's LoRAAdapter holds them."""
    return (normal(out, rank, *(1 for _ in kernel)), normal(rank, inp, *kernel, seed=1), alpha, None, None, None)


def layer(name: str, out: int, inp: int, rank: int = 3, kernel: tuple[int, ...] = (), alpha: float = 1.5) -> dict[str, torch.Tensor]:
    """A plain low-rank layer under kohya's endings."""
    up, down, *_ = lora_weights(out, inp, rank, kernel)
    return {f"{name}.lora_up.weight": up * 0.1, f"{name}.lora_down.weight": down * 0.1, f"{name}.alpha": torch.tensor(alpha)}


def merged(patch, weight: torch.Tensor, strength: float, strength_model: float = 1.0, offset=None, function=None) -> torch.Tensor:
    """The weight after the host has applied one patch to it."""
    return comfy.lora.calculate_weight([(strength, patch, strength_model, offset, function)], weight, "key")


def merged_weight(patcher, key: str) -> torch.Tensor:
    """A weight of a MODEL with all of its patches, in fp32."""
    weight = comfy.utils.get_attr(patcher.model, key).detach().float().clone()
    return comfy.lora.calculate_weight(patcher.patches.get(key, []), weight, key)


@pytest.fixture
def own(pack_module):
    return pack_module("nodes.comfy_patches").LowRankPatch


@pytest.fixture(scope="module")
def clip(host_nodes, models_dir):
    from comfyui_trilora.tests.host.tiny_run import load_checkpoint

    return load_checkpoint(host_nodes)[1]


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(("out", "inp", "kernel"), [(40, 24, ()), (24, 16, (3, 3)), (24, 16, (1, 1)), (12, 8, (3,)), (8, 6, (2, 3, 3))])
@pytest.mark.parametrize("strength_model", [1.0, 0.6])
def test_a_merged_weight_is_cores(own, strength, out, inp, kernel, strength_model):
    """fp32, linear layers and convolutions of one to three axes, scaled base weights."""
    weights, base = lora_weights(out, inp, kernel=kernel), normal(out, inp, *kernel, seed=7)
    expected = merged(LoRAAdapter(set(), weights), base.clone(), strength, strength_model)
    found = merged(own(set(), weights), base.clone(), strength, strength_model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert distance(found, base) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_as_good_as_cores(own, dtype):
    """Compared with the exact sum: not further from it than twice core's way."""
    weights, base = lora_weights(64, 48, rank=4), normal(64, 48, seed=7).to(dtype)
    exact = base.double() + 0.5 * 1.5 / 4 * weights[0].double() @ weights[1].double()
    core = (merged(LoRAAdapter(set(), weights), base.clone(), 0.5).double() - exact).abs().mean()
    ours = merged(own(set(), weights), base.clone(), 0.5)
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().mean() <= 2 * core


@pytest.mark.parametrize("offset", [(0, 0, 16), (0, 16, 16), (0, 32, 16), (1, 8, 16)])
def test_a_part_of_a_fused_weight_is_written_in_place(own, offset):
    """q, k, v of a fused weight: the host narrows the weight and discards what the patch returns."""
    axis, start, length = offset
    base = normal(48, 32, seed=7)
    weights = lora_weights(length if axis == 0 else 48, length if axis == 1 else 32)
    expected = merged(LoRAAdapter(set(), weights), base.clone(), 0.5, 0.8, offset)
    found = merged(own(set(), weights), base.clone(), 0.5, 0.8, offset)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    outside = torch.ones(48, 32, dtype=torch.bool)
    outside.narrow(axis, start, length).fill_(False)
    assert torch.equal(found[outside], base[outside]) and not torch.equal(found, base)


@pytest.mark.parametrize("offset", [None, (0, 8, 16)])
def test_a_channels_last_convolution(own, offset):
    """Weights of another memory layout, whole and in part, stay in that layout."""
    base = normal(32, 16, 3, 3, seed=7).to(memory_format=torch.channels_last)
    weights = lora_weights(16 if offset else 32, 16, kernel=(3, 3))
    expected = merged(LoRAAdapter(set(), weights), base.clone(), 0.5, 1.0, offset)
    found = merged(own(set(), weights), base.clone(), 0.5, 1.0, offset)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_function_patch_gets_the_delta(own):
    """swap_scale_shift reorders what is added, so it must be given the whole of it."""
    weights, base = lora_weights(32, 24), normal(32, 24, seed=7)
    for function in (comfy.utils.swap_scale_shift, lambda delta: delta * 3, lambda a: a):
        expected = merged(LoRAAdapter(set(), weights), base.clone(), 2.0, 1.0, None, function)
        torch.testing.assert_close(merged(own(set(), weights), base.clone(), 2.0, 1.0, None, function), expected, rtol=1e-5, atol=1e-5)


def test_without_alpha_the_scale_is_one(own):
    weights, base = lora_weights(32, 24, alpha=None), normal(32, 24, seed=7)
    torch.testing.assert_close(merged(own(set(), weights), base.clone(), 1.0), base + weights[0] @ weights[1], rtol=1e-5, atol=1e-5)


def test_the_host_can_rebuild_a_patch(own):
    """cls(loaded_keys, weights) from moved or cast tensors is the same patch, and it is one of core's LoRA adapters."""
    patch = own({"a.lora_up.weight"}, lora_weights(32, 24))
    again = type(patch)(patch.loaded_keys, tuple(v.double() if isinstance(v, torch.Tensor) else v for v in patch.weights))
    base = normal(32, 24, seed=7)
    torch.testing.assert_close(merged(again, base.clone(), 0.5), merged(patch, base.clone(), 0.5), rtol=1e-5, atol=1e-5)
    assert isinstance(patch, LoRAAdapter) and patch.name == LoRAAdapter.name


def other_kinds() -> dict[str, dict[str, torch.Tensor]]:
    """Files of kinds that are more than up x down, on one linear layer and one convolution."""
    plain, conv = layer(QUERY, 128, 128), layer(KERNEL, 128, 128, kernel=(3, 3))
    small = {"a": normal(128, 2) * 0.3, "b": normal(2, 128) * 0.3, "c": normal(128, 2, seed=2) * 0.3, "d": normal(2, 128, seed=2) * 0.3}
    return {
        "dora": {**plain, f"{QUERY}.dora_scale": normal(128, 1).abs() + 0.5},
        "mid": {f"{KERNEL}.lora_up.weight": normal(128, 4, 1, 1) * 0.3, f"{KERNEL}.lora_mid.weight": normal(4, 4, 3, 3) * 0.3,
                f"{KERNEL}.lora_down.weight": normal(4, 128, 1, 1) * 0.3, f"{KERNEL}.alpha": torch.tensor(2.0)},
        "loha": {f"{QUERY}.hada_w1_a": small["a"], f"{QUERY}.hada_w1_b": small["b"], f"{QUERY}.hada_w2_a": small["c"],
                 f"{QUERY}.hada_w2_b": small["d"], f"{QUERY}.alpha": torch.tensor(1.0)},
        "lokr": {f"{QUERY}.lokr_w1": normal(8, 8) * 0.3, f"{QUERY}.lokr_w2": normal(16, 16) * 0.3, **conv},
        "norms and biases": {"diffusion_model.out.0.diff": normal(64) * 0.1, "diffusion_model.out.0.diff_b": normal(64, seed=1) * 0.1, **plain},
    }  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in other_kinds() if kind != "dora"])
def test_other_kinds_of_files_do_what_core_does(host_nodes, tiny, saved, kind, caplog):
    """Tucker cores, LoHa, LoKr, differences: patches for the same weights with the same result as from core's loader. (DoRA
    on the output axis is the writer's, which is not core's: test_interchange_lycoris, test_interchange.)"""
    name = saved(other_kinds()[kind])
    ours, _ = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name, strength_model=0.7)
    (cores,) = run_node(host_nodes, "LoraLoaderModelOnly", model=tiny.patcher, lora_name=name, strength_model=0.7)
    assert ours.patches.keys() == cores.patches.keys() and ours.patches
    for key in cores.patches:
        expected = merged_weight(cores, key)
        torch.testing.assert_close(merged_weight(ours, key), expected, rtol=1e-5, atol=1e-5)
        assert distance(expected, merged_weight(tiny.patcher, key)) > 1e-3
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_clip_patches_reach_the_text_encoder(host_nodes, tiny, clip, saved):
    """With CLIP connected the text encoder changes as with core's loader, by its own strength."""
    te = "lora_te_text_model_encoder_layers_3_mlp_fc1"
    name = saved({**layer(te, 3072, 768), **layer(QUERY, 128, 128)})
    ours = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name, clip=clip, strength_model=0.0, strength_clip=0.5)
    cores = run_node(host_nodes, "LoraLoader", model=tiny.patcher, clip=clip, lora_name=name, strength_model=0.0, strength_clip=0.5)
    assert ours[0].patches == {}
    (key,) = ours[1].patcher.patches
    assert ours[1].patcher.patches.keys() == cores[1].patcher.patches.keys()
    torch.testing.assert_close(merged_weight(ours[1].patcher, key), merged_weight(cores[1].patcher, key), rtol=1e-5, atol=1e-5)
    assert clip.patcher.patches == {} and tiny.patcher.patches == {}


def test_without_clip_its_keys_are_counted_and_the_rest_is_applied(host_nodes, tiny, saved, caplog):
    name = saved({**layer("lora_te_text_model_encoder_layers_0_mlp_fc2", 768, 3072), **layer(QUERY, 128, 128)})
    model, no_clip = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name)
    assert no_clip is None and list(model.patches) == [f"{QUERY}.weight"]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning == f"{name}: 1 layer for a text encoder left out, since no CLIP is connected"


@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("ours", [True, False])
def test_keep_rank_is_the_truncated_singular_value_decomposition(host_nodes, tiny, saved, pack_module, keep, ours):
    """Of any file, canonical or not: keep_rank=k = the best approximation of rank k of every layer."""
    tensors = {**layer(QUERY, 128, 128, rank=4), **layer(KERNEL, 128, 128, rank=4, kernel=(3, 3))}
    whole = {n: 1.5 / 4 * tensors[f"{n}.lora_up.weight"].flatten(1) @ tensors[f"{n}.lora_down.weight"].flatten(1) for n in (QUERY, KERNEL)}
    metadata = None
    if ours:
        checkpoint = pack_module("trilora_ops.checkpoint")
        state = checkpoint.canonical_state(checkpoint.AdapterState(tensors))
        tensors, metadata = dict(state), state.metadata
    model, _ = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=saved(tensors, metadata), keep_rank=keep)
    for name, delta in whole.items():
        U, sigma, Vt = torch.linalg.svd(delta.double(), full_matrices=False)
        best = (U[:, :keep] * sigma[:keep]) @ Vt[:keep]
        found = merged_weight(model, f"{name}.weight") - merged_weight(tiny.patcher, f"{name}.weight")
        assert distance(found.flatten(1), best) <= 1e-5


@pytest.mark.parametrize("kind", ["dora", "mid", "loha"])
def test_keep_rank_says_which_layers_it_leaves_alone(host_nodes, tiny, saved, kind, caplog):
    name = saved(other_kinds()[kind])
    kept, _ = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name, keep_rank=1)
    whole, _ = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name)
    (key,) = whole.patches
    assert torch.equal(merged_weight(kept, key), merged_weight(whole, key))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert name in warning and "keep_rank left 1 layer alone" in warning


@pytest.mark.parametrize("build", [tiny_models.flux_model, tiny_models.flow_model])
def test_files_that_split_a_fused_weight(host_nodes, saved, build):
    """diffusers' names for q, k, v and for swapped halves: every one of them merges as with core's loader."""
    tiny = build()
    weights, tensors = tiny.patcher.model.state_dict(), {}
    for name, target in comfy.lora.model_lora_keys_unet(tiny.patcher.model, {}).items():
        if not isinstance(target, tuple) or not name.startswith("transformer.") or target[0] not in weights:
            continue  # not every SD3 has every layer that has a name
        shape, offset = list(weights[target[0]].shape), target[1]
        if offset:
            shape[offset[0]] = offset[2]
        tensors.update(layer(name, *shape))
    assert len(tensors) >= 3 * 6
    name = saved(tensors)
    ours, _ = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name, strength_model=0.7)
    (cores,) = run_node(host_nodes, "LoraLoaderModelOnly", model=tiny.patcher, lora_name=name, strength_model=0.7)
    assert ours.patches.keys() == cores.patches.keys() and ours.patches
    for key in cores.patches:
        torch.testing.assert_close(merged_weight(ours, key), merged_weight(cores, key), rtol=1e-5, atol=1e-6)


def test_strength_zero_is_the_model_as_it_was(host_nodes, tiny, clip, saved):
    name = saved(layer(QUERY, 128, 128))
    model, text = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name, clip=clip, strength_model=0.0, strength_clip=0.0)
    assert model.patches == {} and text.patcher.patches == {}


def test_what_came_in_is_not_changed(host_nodes, tiny, clip, saved):
    """The output is a copy with patches; the input keeps its patches, its weights and its identity."""
    before, patches_id = weights_hash(tiny.patcher), tiny.patcher.patches_uuid
    name = saved({**layer(QUERY, 128, 128), **layer("lora_te_text_model_encoder_layers_3_mlp_fc1", 3072, 768)})
    once, _ = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name, clip=clip)
    twice, _ = run_node(host_nodes, "TriLoRALoader", model=once, lora_name=name, strength_model=-1.0)
    assert once is not tiny.patcher and len(once.patches[f"{QUERY}.weight"]) == 1
    assert tiny.patcher.patches == {} and tiny.patcher.patches_uuid == patches_id and clip.patcher.patches == {}
    assert len(twice.patches[f"{QUERY}.weight"]) == 2
    assert distance(merged_weight(twice, f"{QUERY}.weight"), merged_weight(tiny.patcher, f"{QUERY}.weight")) <= 1e-6
    assert weights_hash(once) != before and weights_hash(tiny.patcher) == before


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_adapter_of_any_origin_keeps_its_effect_when_saved(host_nodes, tiny, dtype):
    """A LORA_MODEL as core's trainer hands it on, with differences of norms beside low-rank layers, as a file of ours."""
    with torch.inference_mode():
        adapter = {**layer(QUERY, 128, 128), **layer(KERNEL, 128, 128, kernel=(3, 3)), "diffusion_model.out.0.diff": normal(64) * 0.1}
    list_saved_adapters()
    name = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="any_origin", dtype=dtype)[0]
    (original,) = run_node(host_nodes, "LoraModelLoader", model=tiny.patcher, lora=adapter, strength_model=1.0)
    for loader in ("TriLoRALoader", "LoraLoaderModelOnly"):
        loaded = run_node(host_nodes, loader, model=tiny.patcher, lora_name=name, strength_model=1.0)[0]
        assert loaded.patches.keys() == original.patches.keys()
        for key in original.patches:
            plain = merged_weight(tiny.patcher, key)
            delta = merged_weight(original, key) - plain
            assert distance(merged_weight(loaded, key) - plain, delta) <= (1e-5 if dtype == "fp32" else 2e-3)
