"""Load, Merge, Resize and Save Adapter as the host's executor runs them, with files on disk and the host's loaders as judges."""

import json

import folder_paths
import pytest
import torch
from comfyui_trilora.tests.host.test_applying import layer, merged_weight
from comfyui_trilora.tests.host.tiny_run import distance, load_checkpoint, run_node
from safetensors import safe_open
from safetensors.torch import load_file, save_file

QUERY = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
KERNEL = "diffusion_model.middle_block.0.in_layers.2"
IN_KOHYAS = {QUERY: "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", KERNEL: "lora_unet_mid_block_resnets_0_conv1"}
IN_PEFTS = {QUERY: "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", KERNEL: "unet.mid_block.resnets.0.conv1"}
TEXT = "text_model.encoder.layers.3.mlp.fc1"


@pytest.fixture(scope="module")
def sd15(host_nodes, models_dir):
    """(MODEL, CLIP) of the stock checkpoint."""
    return load_checkpoint(host_nodes)[:2]


def renamed(tensors: dict, names: dict, peft: bool = False) -> dict:
    """Tensors of `layer` under other names; with `peft` under its endings too, where no alpha is."""
    out = {}
    for name, other in names.items():
        up, down, alpha = (tensors[f"{name}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
        if peft:
            out |= {f"{other}.lora_B.weight": up * (alpha / down.shape[0]), f"{other}.lora_A.weight": down}
        else:
            out |= {f"{other}.lora_up.weight": up, f"{other}.lora_down.weight": down, f"{other}.alpha": alpha}
    return out


def both(rank: int = 3, alpha: float = 1.5, sign: float = 1.0) -> dict:
    tensors = {**layer(QUERY, 128, 128, rank, alpha=alpha), **layer(KERNEL, 128, 128, rank + 1, (3, 3), alpha=alpha)}
    return {key: tensor * sign if "up" in key else tensor for key, tensor in tensors.items()}


def load(host_nodes, name):
    return run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)[0]


def deltas(tiny, patcher) -> dict:
    return {key: merged_weight(patcher, key) - merged_weight(tiny.patcher, key) for key in patcher.patches}


def test_load_adapter_says_what_the_file_says(host_nodes, saved):
    metadata = {"trilora.trigger": "sks dog", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora", "ss_network_dim": "3"}
    name = saved({**both(), "diffusion_model.out.0.diff": torch.ones(64)}, metadata)
    adapter, about = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)
    assert about.splitlines() == ["trigger: sks dog", "base: sd_v1", "method: networks.lora", "rank: 3", "layers: 2 low-rank, and 1 tensors of other kinds"]
    assert adapter.metadata == metadata and not any(tensor.is_inference() for tensor in adapter.values())
    nothing = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=saved(both()))[1]
    assert nothing.splitlines() == ["trigger: not said", "base: not said", "method: not said", "rank: not said", "layers: 2 low-rank"]


def test_load_adapter_runs_again_when_the_file_has_changed(host_nodes, pack_module, saved):
    node = pack_module("nodes.tools").LoadAdapter
    name = saved(both())
    before = node.fingerprint_inputs(lora_name=name)
    assert node.fingerprint_inputs(lora_name=name) == before
    save_file({"x.diff": torch.ones(2)}, folder_paths.get_full_path("loras", name))
    assert node.fingerprint_inputs(lora_name=name) != before and node.fingerprint_inputs(lora_name=None) == node.fingerprint_inputs(lora_name=None)


def test_cores_nodes_take_our_adapters_and_ours_take_cores(host_nodes, tiny, saved, pack_module):
    """A loaded, resized adapter in core's Load LoRA Model; core's own dict without metadata in ours."""
    adapter = load(host_nodes, saved(both()))
    resized, _ = run_node(host_nodes, "TriLoRAResizeAdapter", adapter=dict(adapter), rank=2)
    (model,) = run_node(host_nodes, "LoraModelLoader", model=tiny.patcher, lora=resized, strength_model=1.0)
    assert model.patches.keys() == {f"{QUERY}.weight", f"{KERNEL}.weight"}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_resized_file_is_keep_rank_at_load(host_nodes, tiny, saved, rank):
    """Written smaller or loaded smaller: the same weights; the report says what it cost."""
    name = saved(both(4))
    resized, report = run_node(host_nodes, "TriLoRAResizeAdapter", adapter=load(host_nodes, name), rank=rank)
    (small,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=resized, name="resized", dtype="fp32")
    found = deltas(tiny, run_node(host_nodes, "LoraLoaderModelOnly", model=tiny.patcher, lora_name=small, strength_model=1.0)[0])
    wanted = deltas(tiny, run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name, keep_rank=rank)[0])
    assert found.keys() == wanted.keys() and all(distance(found[key], wanted[key]) <= 1e-5 for key in wanted)
    assert report.startswith(f"2 layers, 9 directions -> {2 * rank}; error ")
    file = folder_paths.get_full_path("loras", small)
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["trilora.provenance"])[0]["rank"] == rank


def test_a_merge_is_both_files_loaded_one_after_the_other(host_nodes, tiny, saved):
    """kohya's names and PEFT's, of different ranks and weights, with the model connected; in core's loaders and in ours."""
    first, second = saved(renamed(both(2), IN_KOHYAS)), saved(renamed(both(4, 3.0, -1), IN_PEFTS, peft=True))
    a, b = load(host_nodes, first), load(host_nodes, second)
    merged, report = run_node(host_nodes, "TriLoRAMergeAdapters", adapter_a=a, weight_a=0.8, adapter_b=b, weight_b=-0.5, model=tiny.patcher)
    assert report.startswith("2 adapters: 2 layers") and set(merged) == {f"{n}.{end}" for n in IN_KOHYAS.values() for end in ("lora_up.weight", "lora_down.weight", "alpha")}
    (name,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=merged, name="merged", dtype="fp32")
    (chain,) = run_node(host_nodes, "LoraLoaderModelOnly", model=tiny.patcher, lora_name=first, strength_model=0.8)
    (chain,) = run_node(host_nodes, "LoraLoaderModelOnly", model=chain, lora_name=second, strength_model=-0.5)
    wanted = deltas(tiny, chain)
    assert wanted.keys() == {f"{QUERY}.weight", f"{KERNEL}.weight"}
    for loader in ("LoraLoaderModelOnly", "TriLoRALoader"):
        found = deltas(tiny, run_node(host_nodes, loader, model=tiny.patcher, lora_name=name, strength_model=1.0)[0])
        assert found.keys() == wanted.keys() and all(distance(found[key], wanted[key]) <= 1e-5 for key in wanted), loader


def test_a_merge_of_four_with_a_text_encoder(host_nodes, sd15, saved):
    """Names of U-Net and text encoder are unified together; without CLIP the merge is refused."""
    model, clip = sd15
    spellings = [f"lora_te_{TEXT.replace('.', '_')}", f"lora_te1_{TEXT.replace('.', '_')}", f"text_encoder.{TEXT}", f"text_encoders.clip_l.transformer.{TEXT}"]
    adapters = {f"adapter_{letter}": load(host_nodes, saved(layer(name, 3072, 768))) for letter, name in zip("abcd", spellings, strict=True)}
    merged, _ = run_node(host_nodes, "TriLoRAMergeAdapters", **adapters, weight_c=0.5, weight_d=-1.0, model=model, clip=clip)
    ((key, up),) = [(key, tensor) for key, tensor in merged.items() if key.endswith("lora_up.weight")]
    assert key == f"{spellings[0]}.lora_up.weight" and up.shape[1] == 3
    one = adapters["adapter_a"]
    name = spellings[0]
    wanted = 1.5 * 0.5 * one[f"{name}.lora_up.weight"] @ one[f"{name}.lora_down.weight"]
    found = merged[f"{name}.alpha"] / 3 * up @ merged[f"{name}.lora_down.weight"]
    assert distance(found, wanted) <= 1e-5
    with pytest.raises(ValueError, match="adapter_a: none of its layers is for the model, and 1 layer for a text encoder .*: connect CLIP"):
        run_node(host_nodes, "TriLoRAMergeAdapters", **adapters, model=model)


@pytest.mark.parametrize("keys", ["kohya", "peft", "generic"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_file_of_every_style_loads_everywhere(host_nodes, sd15, saved, keys, dtype, caplog):
    """Save Adapter's three spellings on SD1.5 with its text encoder: core's loader and ours find the delta of the original."""
    model, clip = sd15
    wide = {**layer("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q", 320, 320), **layer("diffusion_model.middle_block.0.in_layers.2", 320, 320, kernel=(3, 3)),
            **layer(f"lora_te_{TEXT.replace('.', '_')}", 3072, 768)}  # fmt: skip
    adapter = load(host_nodes, saved(wide))
    original = run_node(host_nodes, "LoraLoader", model=model, clip=clip, lora_name=saved(wide), strength_model=1.0, strength_clip=1.0)
    (name,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name=f"styled_{keys}", dtype=dtype, keys=keys, model=model, clip=clip)
    names = {key.split(".lora_")[0].removesuffix(".alpha") for key in load_file(folder_paths.get_full_path("loras", name))}
    spelled = {"kohya": {*IN_KOHYAS.values(), f"lora_te_{TEXT.replace('.', '_')}"}, "peft": {*IN_PEFTS.values(), f"text_encoder.{TEXT}"},
               "generic": {QUERY, KERNEL, f"text_encoders.clip_l.transformer.{TEXT}"}}[keys]  # fmt: skip
    assert names == spelled
    caplog.clear()
    for loader in ("LoraLoader", "TriLoRALoader"):
        loaded = run_node(host_nodes, loader, model=model, clip=clip, lora_name=name, strength_model=1.0, strength_clip=1.0)
        for patched, wanted, plain in zip((loaded[0], loaded[1].patcher), (original[0], original[1].patcher), (model, clip.patcher), strict=True):
            assert patched.patches.keys() == wanted.patches.keys() and wanted.patches
            for key in wanted.patches:
                base = merged_weight(plain, key)
                assert distance(merged_weight(patched, key) - base, merged_weight(wanted, key) - base) <= (1e-5 if dtype == "fp32" else 2e-3), (loader, key)
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_a_saved_peft_file_can_be_loaded_and_saved_again(host_nodes, tiny, saved):
    """Through Load Adapter back to kohya's names and endings: the same layers, the same delta."""
    adapter = load(host_nodes, saved(both()))
    (peft,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="there", dtype="fp32", keys="peft", model=tiny.patcher)
    (back,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=load(host_nodes, peft), name="back", dtype="fp32", keys="generic", model=tiny.patcher)
    found = load_file(folder_paths.get_full_path("loras", back))
    assert found.keys() == both().keys()
    for name in (QUERY, KERNEL):
        dense = [t[f"{name}.alpha"] / t[f"{name}.lora_down.weight"].shape[0] * t[f"{name}.lora_up.weight"].flatten(1) @ t[f"{name}.lora_down.weight"].flatten(1) for t in (found, both())]
        assert distance(*dense) <= 1e-6


def test_without_a_model_names_stay_as_they_come(host_nodes, saved):
    """What saved workflows do: three inputs, no keys, no model."""
    adapter = load(host_nodes, saved(renamed(both(), {QUERY: "any.name", KERNEL: "lora_unet_any_other"})))
    (name,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="as_it_comes", dtype="fp16")
    assert {key.rpartition(".lora_")[0] or key.removesuffix(".alpha") for key in load_file(folder_paths.get_full_path("loras", name))} == {"any.name", "lora_unet_any_other"}


def test_old_workflows_need_no_new_input(pack_module):
    """`keys`, `model` and `clip` come after the old widgets and are optional, so old prompts and old files run."""
    inputs = pack_module("nodes.save").SaveAdapter.GET_SCHEMA().inputs
    assert [i.id for i in inputs] == ["adapter", "name", "dtype", "keys", "model", "clip"]
    assert [i.optional for i in inputs] == [False, False, False, True, True, True]


@pytest.mark.parametrize(
    ("node", "inputs", "words"),
    [("TriLoRASaveAdapter", {"keys": "peft", "name": "x", "dtype": "fp16"}, "keys=peft: .* connect MODEL"),
     ("TriLoRASaveAdapter", {"keys": "generic", "name": "x", "dtype": "fp16"}, "keys=generic: .* connect MODEL"),
     ("TriLoRAResizeAdapter", {"rank": 0, "energy": 2.0}, "keep_energy=2.0")],
)  # fmt: skip
def test_nodes_refuse(host_nodes, saved, error, node, inputs, words):
    with pytest.raises(error, match=words):
        run_node(host_nodes, node, adapter=load(host_nodes, saved(both())), **inputs)


def test_a_style_never_loses_layers(host_nodes, tiny, saved, error, base_dir):
    """A text encoder's layer without CLIP, a whole difference in a PEFT file: refused, and nothing is written."""
    for extra, keys, words in (({**layer("lora_te_" + TEXT.replace(".", "_"), 3072, 768)}, "kohya", "adapter: 1 layer for a text encoder .*, and clip is not connected"),
                               ({f"{QUERY}.diff": torch.ones(128, 128)}, "peft", "keys=peft: unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q is a layer of kind full difference")):  # fmt: skip
        adapter = load(host_nodes, saved({**layer(KERNEL, 128, 128, kernel=(3, 3)), **extra}))
        before = set(base_dir.rglob("*"))
        with pytest.raises(error, match=words):
            run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="x", dtype="fp16", keys=keys, model=tiny.patcher)
        assert set(base_dir.rglob("*")) == before


def test_a_merge_says_which_adapter_is_wrong(host_nodes, tiny, saved, error):
    good, other = load(host_nodes, saved(renamed(both(), IN_KOHYAS))), load(host_nodes, saved(renamed(both(), IN_PEFTS, peft=True)))
    stranger = load(host_nodes, saved(layer("lora_unet_nowhere", 3, 3)))
    for inputs, words in (({"adapter_b": other}, "spell the names of the denoiser's layers differently"), ({"adapter_b": {}}, "adapter_b: holds no tensors|adapter_b: adapter"),
                          ({"adapter_b": stranger, "model": tiny.patcher}, "adapter_b: none of its 1 layer found a place in this model")):  # fmt: skip
        with pytest.raises(error, match=words):
            run_node(host_nodes, "TriLoRAMergeAdapters", adapter_a=good, **inputs)
