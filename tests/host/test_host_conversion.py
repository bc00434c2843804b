"""Files in forms that the host converts, with keys of no layer, and with one weight whole and in parts: every tool sees them as the loader does."""

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfyui_trilora.tests.host import small_families
from comfyui_trilora.tests.host.adapter_files import LINEAR, low_rank, normal
from comfyui_trilora.tests.host.foreign_writers import deltas
from comfyui_trilora.tests.host.tiny_run import distance, run_node

WIDTH = 32
QKV = "diffusion_model.double_blocks.3.img_attn.qkv"


def bfl_control() -> dict[str, torch.Tensor]:
    """Black Forest Labs' control LoRA: the first layer twice as wide, biases, norms."""
    return {"img_in.lora_A.weight": normal(4, 128), "img_in.lora_B.weight": normal(WIDTH, 4), "img_in.lora_B.bias": normal(WIDTH),
            "single_blocks.0.norm.key_norm.scale": 1 + 0.1 * normal(16), "double_blocks.3.img_attn.qkv.lora_A.weight": normal(4, WIDTH),
            "double_blocks.3.img_attn.qkv.lora_B.weight": normal(3 * WIDTH, 4), "double_blocks.3.img_attn.qkv.lora_B.bias": normal(3 * WIDTH)}  # fmt: skip


def uso() -> dict[str, torch.Tensor]:
    file = {}
    for i in range(19):
        for a in "12":
            for part, out in (("qkv", 3 * WIDTH), ("proj", WIDTH)):
                file |= {f"double_blocks.{i}.processor.{part}_lora{a}.down.weight": normal(2, WIDTH, seed=i),
                         f"double_blocks.{i}.processor.{part}_lora{a}.up.weight": normal(out, 2, seed=i)}  # fmt: skip
    for i in range(38):
        file |= {f"single_blocks.{i}.processor.qkv_lora.down.weight": normal(2, WIDTH, seed=i),
                 f"single_blocks.{i}.processor.qkv_lora.up.weight": normal(3 * WIDTH, 2, seed=i)}  # fmt: skip
    return file


def of_core(patcher, name: str) -> dict[str, torch.Tensor]:
    """What the host's own loader makes of a file: key -> change."""
    file = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", name))
    return deltas_of(comfy.sd.load_lora_for_models(patcher, None, file, 1.0, 0)[0], patcher)


def deltas_of(patched, patcher) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        found = {}
        for key in patched.patches:
            before = comfy.utils.get_attr(patcher.model, key).detach().float()
            after = comfy.lora.calculate_weight(patched.patches[key], before.clone(), key)
            wide = torch.zeros_like(after)
            wide[tuple(slice(n) for n in before.shape)] = before
            found[key] = after - wide
        return found


@pytest.fixture(scope="module")
def flux(host_nodes):
    return small_families.flux()


@pytest.mark.parametrize("file", [bfl_control, uso])
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("with_model", [False, True])
def test_forms_that_the_host_converts_stay_the_same_adapter(host_nodes, flux, saved, file, resized, with_model):
    """Load, Resize and Save, with and without MODEL: core's loader and ours find in the new file what core's finds in the first, biases and norms too."""
    name = saved(file())
    expected = of_core(flux, name)
    assert f"{QKV}.weight" in expected and len(expected) >= (5 if file is bfl_control else 100)
    adapter = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)[0]
    if resized:
        adapter = run_node(host_nodes, "TriLoRAResizeAdapter", adapter=adapter, rank=4)[0]
    (written,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="form", dtype="fp32", **({"model": flux} if with_model else {}))
    (patched, _) = run_node(host_nodes, "TriLoRALoader", model=flux, lora_name=written, strength_model=1.0)
    for found in (of_core(flux, written), deltas_of(patched, flux)):
        assert found.keys() == expected.keys() and all(distance(found[key], expected[key]) <= 1e-5 for key in expected)


def test_the_scale_that_peft_keeps_elsewhere_comes_with_them(host_nodes, flux, saved):
    """diffusers' configuration in the metadata of a BFL control LoRA: alpha 2 of rank 4, in the file that Save writes too."""
    name = saved(bfl_control(), {"lora_adapter_metadata": '{"lora_alpha": 2, "r": 4}'})
    adapter = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)[0]
    (written,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="scaled", dtype="fp32")
    file = bfl_control()
    wanted = 0.5 * file["double_blocks.3.img_attn.qkv.lora_B.weight"] @ file["double_blocks.3.img_attn.qkv.lora_A.weight"]
    (patched, _) = run_node(host_nodes, "TriLoRALoader", model=flux, lora_name=name, strength_model=1.0)
    assert distance(of_core(flux, written)[f"{QKV}.weight"], wanted) <= 1e-5 and distance(deltas_of(patched, flux)[f"{QKV}.weight"], wanted) <= 1e-5


def test_layers_that_the_host_would_give_one_name_stay_apart(host_nodes, saved, error):
    """Wan Fun's `lora_unet__` becomes `lora_unet_`: a file that has both is refused wherever it is read."""
    fun = low_rank("lora_unet__blocks_0_cross_attn_k", WIDTH, WIDTH)
    name = saved(fun | low_rank("lora_unet_blocks_0_cross_attn_k", WIDTH, WIDTH, seed=5))
    for node, inputs in (("TriLoRALoadAdapter", {}), ("TriLoRALoader", {"model": small_families.wan(), "strength_model": 1.0})):
        with pytest.raises(error, match=f"^{name}: lora_unet_.*blocks_0_cross_attn_k.* same name for ComfyUI"):
            run_node(host_nodes, node, lora_name=name, **inputs)
    adapter = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=saved(fun))[0]
    assert sorted(adapter) == sorted(key.replace("unet__", "unet_") for key in fun)


# One weight, whole in one file and in parts in the other


@pytest.mark.parametrize(
    ("family", "whole", "part", "key"),
    [("flux", "lora_unet_double_blocks_3_img_attn_qkv", "transformer.transformer_blocks.3.attn.to_q", f"{QKV}.weight"),
     ("z_image", "lora_unet_layers_3_attention_qkv", "diffusion_model.layers.3.attention.to_q", "diffusion_model.layers.3.attention.qkv.weight"),
     ("z_image", "lora_unet_layers_3_attention_qkv", "lora_unet_layers_3_attention_to_q", "diffusion_model.layers.3.attention.qkv.weight")],
)  # fmt: skip
def test_a_merge_of_a_whole_weight_and_of_parts_is_the_sum(host_nodes, saved, family, whole, part, key):
    patcher = getattr(small_families, family)()
    out, inp = patcher.model.state_dict()[key].shape
    a, b = low_rank(whole, out, inp, seed=1), low_rank(part, out // 3, inp, seed=2)
    wanted = 0.5 * a[f"{whole}.lora_up.weight"] @ a[f"{whole}.lora_down.weight"]
    wanted[: out // 3] -= 2.0 * 0.5 * b[f"{part}.lora_up.weight"] @ b[f"{part}.lora_down.weight"]
    adapters = {f"adapter_{letter}": run_node(host_nodes, "TriLoRALoadAdapter", lora_name=saved(file))[0] for letter, file in (("a", a), ("b", b))}
    merged, report = run_node(host_nodes, "TriLoRAMergeAdapters", **adapters, weight_a=1.0, weight_b=-2.0, model=patcher)
    (written,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=merged, name="sum", dtype="fp32")
    (patched, _) = run_node(host_nodes, "TriLoRALoader", model=patcher, lora_name=written, strength_model=1.0)
    found = deltas(patched, patcher)
    assert found.keys() == {key} and distance(found[key], wanted) <= 1e-5 and "2 layers" in report


# Keys of no layer, and layers that are not low rank


@pytest.mark.parametrize("with_model", [False, True])
def test_keys_of_no_layer_keep_nothing_from_being_used(host_nodes, tiny, saved, with_model):
    """OneTrainer's trained embeddings: Merge uses the rest and names them; Save keeps them, or with MODEL names them."""
    model = {"model": tiny.patcher} if with_model else {}
    plain, extra = low_rank(LINEAR, 128, 128, seed=1), {"bundle_emb.sks.clip_l": normal(4, 768)}
    adapter = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=saved(plain | extra))[0]
    merged, report = run_node(host_nodes, "TriLoRAMergeAdapters", adapter_a=adapter, adapter_b=low_rank(LINEAR, 128, 128, seed=2), weight_a=1.0, weight_b=1.0, **model)
    assert "1 tensor of no layer" in report and "bundle_emb.sks.clip_l" in report and len(merged) == 3
    (written,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="extra", dtype="fp32", **model)
    (patched,) = run_node(host_nodes, "LoraLoaderModelOnly", model=tiny.patcher, lora_name=written, strength_model=1.0)
    ((key, found),) = deltas(patched, tiny.patcher).items()
    assert key == f"{LINEAR}.weight" and distance(found, 0.5 * plain[f"{LINEAR}.lora_up.weight"] @ plain[f"{LINEAR}.lora_down.weight"]) <= 1e-5


def test_a_merge_of_differences_points_to_bake(host_nodes, tiny, saved, error):
    """And what it points to is exact."""
    norm = LINEAR.rsplit(".", 2)[0] + ".norm1"
    files = [{f"{norm}.diff": normal(128, seed=seed), f"{norm}.diff_b": normal(128, seed=seed + 1)} | low_rank(LINEAR, 128, 128, seed=seed) for seed in (1, 4)]
    adapters = {f"adapter_{letter}": dict(file) for letter, file in zip("ab", files, strict=True)}
    with pytest.raises(error, match=r"norm1.diff: is not part of a plain low-rank layer.*Adapter Stack .* Bake Adapter, which adds them exactly$"):
        run_node(host_nodes, "TriLoRAMergeAdapters", **adapters, weight_a=1.0, weight_b=1.0, model=tiny.patcher)
    stack = None
    for file in files:
        (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", lora_name=saved(file), strength_model=1.0, strength_clip=1.0, keep_rank=0, stack=stack)
    baked, _ = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, stack=stack)
    (written,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=baked, name="sum", dtype="fp32")
    found = of_core(tiny.patcher, written)
    assert distance(found[f"{norm}.weight"], sum(file[f"{norm}.diff"] for file in files)) <= 1e-5
    assert distance(found[f"{norm}.bias"], sum(file[f"{norm}.diff_b"] for file in files)) <= 1e-5
