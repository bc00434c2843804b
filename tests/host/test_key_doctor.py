"""What is said of a file's layers that have no place in the model: on the node, in the report, in the refusal."""

import logging

import comfy.hooks
import pytest
from comfyui_trilora.tests.host import small_families
from comfyui_trilora.tests.host.adapter_files import CONV, LINEAR, low_rank, normal
from comfyui_trilora.tests.host.small_families import layers_by_name, own_name
from comfyui_trilora.tests.host.tiny_run import run_node


def test_extra_layers_and_whole_blocks_are_named(host_nodes, read, caplog):
    """A file for a model with more blocks: the layers that have a place are used, the blocks that have none are named, once, as a warning."""
    patcher = small_families.flux()
    own = layers_by_name(patcher, lambda name, target: own_name(name, target) and "img_attn" in name)
    more = {}
    for block in (19, 20):
        more |= low_rank(f"diffusion_model.double_blocks.{block}.img_attn.qkv", 96, 32) | low_rank(f"diffusion_model.double_blocks.{block}.img_attn.proj", 32, 32)
    with caplog.at_level(logging.WARNING, "trilora"):
        found, (text,) = read(patcher, own | more | {"bundle_emb.sks.clip_l": normal(4, 768)})
    assert len(found) == 38
    assert text.startswith("a.safetensors: 4 of 42 layers left out, for which this model (Flux) has no place: diffusion_model.double_blocks.19.img_attn.qkv, ")
    assert "(nearest to diffusion_model.double_blocks.19.img_attn.qkv: diffusion_model.double_blocks." in text
    assert "; nothing of these blocks was used: D19, D20; 1 tensor of no layer of the model left out: bundle_emb.sks.clip_l" in text
    assert caplog.text.count("left out") == text.count("left out") == 2


def test_a_second_name_of_a_place_is_called_that(host_nodes, read):
    """Not "no place in this model": under two spellings in one file, the one that the model knows is used; of two others neither."""
    patcher, place = small_families.wan(), "diffusion_model.blocks.0.self_attn.q"
    own, other, third = (low_rank(name, 32, 32, seed=seed) for seed, name in enumerate((place, "transformer.blocks.0.attn1.to_q", "lycoris_blocks_0_attn1_to_q")))
    found, said = read(patcher, own | other)
    assert len(found) == 1
    assert said == [f"a.safetensors: 1 layer left out, because the file has another for the same place: transformer.blocks.0.attn1.to_q, of {place}"]
    with pytest.raises(ValueError, match="^a.safetensors: 2 layers left out, because the file has another for the same place: .*; keep one of them, or merge them; nothing"):
        read(patcher, other | third)
    (text,) = read(patcher, other | third | low_rank("diffusion_model.blocks.1.self_attn.q", 32, 32) | low_rank("diffusion_model.blocks.2.self_attn.q", 32, 32))[1]
    assert text.startswith("a.safetensors: 2 layers left out, because") and "no place" not in text and "these blocks" not in text


def test_a_file_with_a_text_encoder_loads_without_clip(host_nodes, read, tiny):
    text = low_rank("lora_te_text_model_encoder_layers_0_mlp_fc1", 3072, 768) | low_rank("lora_te_text_model_encoder_layers_0_mlp_fc2", 768, 3072)
    found, said = read(tiny.patcher, low_rank(LINEAR, 128, 128) | text)
    assert list(found) == [f"{LINEAR}.weight"] and said == ["a.safetensors: 2 layers for a text encoder left out, since no CLIP is connected"]
    with pytest.raises(ValueError, match="none of its layers is for the model, and 2 layers for a text encoder .*: connect CLIP; nothing was applied"):
        read(tiny.patcher, text)


def test_a_file_of_which_most_has_no_place_is_refused(host_nodes, read, tiny):
    few = low_rank(LINEAR, 128, 128) | low_rank(CONV, 128, 128, kernel=(3, 3))
    strangers = {}
    for number in range(3):
        strangers |= low_rank(f"diffusion_model.layers.{number}.attention.qkv", 12, 4)
    with pytest.raises(ValueError, match=r"^a.safetensors: only 2 of its 5 layers found a place in this model \(diffusion_model.layers.0.attention.qkv and 2 more\)"):
        read(tiny.patcher, few | strangers)
    found, said = read(tiny.patcher, few | {key: tensor for key, tensor in strangers.items() if ".2." not in key})
    assert len(found) == 2 and len(said) == 1


def test_an_sdxl_file_on_sd15_says_so(host_nodes, read):
    """By its sizes, which the names alone would not tell."""
    sdxl = {}
    for block, width in ((4, 640), (5, 640), (7, 1280)):
        for part, inp in (("attn1_to_q", width), ("attn2_to_k", 2048)):
            sdxl |= low_rank(f"lora_unet_input_blocks_{block}_1_transformer_blocks_0_{part}", width, inp)
    with pytest.raises(ValueError) as refused:
        read(small_families.sd15(), sdxl)
    message = str(refused.value)
    assert "expected (64, 64)" in message and "its names are those of SDXL" in message and "this model is SD15" in message
    assert "5 more of 6 layers do not fit" in message and message.endswith("nothing was applied")


def test_half_a_layer_is_called_that(host_nodes, read, tiny):
    for missing in ("up", "down"):
        half = {key: tensor for key, tensor in low_rank(LINEAR, 128, 128).items() if f"lora_{missing}" not in key}
        for other in ({}, low_rank(CONV, 128, 128, kernel=(3, 3))):
            with pytest.raises(ValueError, match=f"^a.safetensors: {LINEAR}.lora_{missing}.weight is missing.*nothing was applied$"):
                read(tiny.patcher, half | other)
            foreign = {key.replace("diffusion_model.", "transformer.base_model.model."): tensor for key, tensor in half.items()}
            with pytest.raises(ValueError, match=f"^a.safetensors: transformer.base_model.model.*lora_{missing}.weight is missing.*nothing was applied$"):
                read(tiny.patcher, foreign | other)


# Where it is shown


@pytest.fixture
def shown(pack_module, monkeypatch):
    texts = []
    monkeypatch.setattr(pack_module("nodes.compat"), "show_text", lambda text, node_id: texts.append(text))
    return texts


STRAY = low_rank("lora_unet_nowhere", 3, 3) | {"bundle_emb.sks.clip_l": normal(4, 768)}


def test_it_stands_on_every_node_that_leaves_something_out(host_nodes, tiny, saved, shown, hook):
    name = saved(low_rank(LINEAR, 128, 128) | STRAY)
    adapter = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)[0]
    (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", lora_name=name, strength_model=1.0, strength_clip=1.0, keep_rank=0)
    runs = {
        "TriLoRALoader": {"model": tiny.patcher, "lora_name": name, "strength_model": 1.0},
        "TriLoRAApplyStack": {"model": tiny.patcher, "stack": stack}, "TriLoRABakeAdapter": {"model": tiny.patcher, "adapter": adapter},
        "TriLoRASaveAdapter": {"adapter": adapter, "name": "x", "dtype": "fp32", "model": tiny.patcher},
        "TriLoRAMergeAdapters": {"adapter_a": adapter, "adapter_b": adapter, "weight_a": 1.0, "weight_b": 1.0, "model": tiny.patcher},
    }  # fmt: skip
    for node, inputs in runs.items():
        del shown[:]
        run_node(host_nodes, node, **inputs)
        (text,) = shown
        assert "1 of 2 layers left out" in text and "lora_unet_nowhere" in text and "bundle_emb.sks.clip_l" in text, node
    del shown[:]
    patcher = tiny.patcher.clone()
    patcher.register_all_hook_patches(hook(name, strength_model=1.0), comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    assert "1 of 2 layers left out" in shown[-1]


def test_inspect_adapter_tells_all_of_it(host_nodes, tiny, saved):
    """With MODEL, where the layers go, block by block; without it what the file is."""
    odd = LINEAR.replace("middle_block", "middle_blocc")
    adapter = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=saved(low_rank(LINEAR, 128, 128) | low_rank(odd, 128, 128) | STRAY))[0]
    _, alone = run_node(host_nodes, "TriLoRAInspectAdapter", adapter=adapter)
    lines = dict(line.split("  ", 1) for line in alone.splitlines() if "  " in line.strip())
    assert "in the model" not in alone and lines["extra"].strip() == "1 tensor of no layer: bundle_emb.sks.clip_l" and "ComfyUI's own" in lines["names"]
    _, report = run_node(host_nodes, "TriLoRAInspectAdapter", adapter=adapter, model=tiny.patcher)
    assert "1 of 3 layers found a place" in report and "MID1 1 of 1" in report
    assert f"{odd}: {LINEAR}, " in report and "lora_unet_nowhere: nothing is like it" in report
    with pytest.raises(ValueError, match="clip: is only used beside MODEL"):
        run_node(host_nodes, "TriLoRAInspectAdapter", adapter=adapter, clip=object())
