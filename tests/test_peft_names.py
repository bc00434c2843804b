"""PEFT's spelling: names of layers against diffusers' modules, and files under its endings that read back whole."""

import pytest
import torch
from comfyui_trilora.tests.test_checkpoint import CONV, LINEAR, adapter_state, draw, refusal
from comfyui_trilora.tests.test_naming import KEYS, LAYOUT, diffusers_modules
from comfyui_trilora.trilora_ops.checkpoint import (
    AdapterState,
    canonical_state,
    peft_state,
    read_adapter,
    split_layers,
    write_adapter,
)
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.naming import UNetLayout, peft_name, peft_spellings, spelling
from safetensors.torch import save_file


def test_every_layer_of_sd15_is_a_module_of_diffusers():
    names = [peft_name(key, "sd1", LAYOUT) for key in KEYS]
    assert len(set(names)) == len(names) and set(names) == {"unet." + module for module in diffusers_modules()}


def sdxl_keys() -> list[str]:
    """The places of SDXL's U-Net that show its layout: three levels, depths 0, 2 and 10."""
    paths = ["input_blocks.0.0", "label_emb.0.0", "label_emb.0.2", "out.2", "time_embed.2"]
    paths += [f"input_blocks.{n}.0.op" for n in (3, 6)] + [f"input_blocks.{n}.0.in_layers.2" for n in (1, 2, 4, 5, 7, 8)]
    paths += [f"input_blocks.{n}.1.transformer_blocks.1.attn2.to_out.0" for n in (4, 5, 7, 8)]
    paths += [f"output_blocks.{n}.0.skip_connection" for n in range(9)] + ["output_blocks.2.2.conv", "output_blocks.5.2.conv"]
    paths += [f"output_blocks.{n}.1.transformer_blocks.9.ff.net.0.proj" for n in range(3)] + ["middle_block.1.transformer_blocks.9.attn1.to_q"]
    return [f"diffusion_model.{path}.weight" for path in paths]


@pytest.mark.parametrize(
    ("path", "name"),
    [("input_blocks.4.1.transformer_blocks.1.attn2.to_out.0", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0"),
     ("input_blocks.8.1.transformer_blocks.1.attn2.to_out.0", "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_out.0"),
     ("input_blocks.6.0.op", "down_blocks.1.downsamplers.0.conv"), ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
     ("output_blocks.8.0.skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
     ("output_blocks.1.1.transformer_blocks.9.ff.net.0.proj", "up_blocks.0.attentions.1.transformer_blocks.9.ff.net.0.proj"),
     ("middle_block.1.transformer_blocks.9.attn1.to_q", "mid_block.attentions.0.transformer_blocks.9.attn1.to_q"),
     ("label_emb.0.2", "add_embedding.linear_2"), ("time_embed.2", "time_embedding.linear_2")],
)  # fmt: skip
def test_sdxl_has_diffusers_names_too(path, name):
    keys = sdxl_keys()
    assert f"diffusion_model.{path}.weight" in keys
    assert peft_name(f"diffusion_model.{path}.weight", "sdxl", UNetLayout.of(keys)) == f"unet.{name}"


def test_other_families_and_text_encoders_keep_the_hosts_names():
    assert peft_name("diffusion_model.double_blocks.0.img_attn.qkv.weight", "generic") == "diffusion_model.double_blocks.0.img_attn.qkv"
    assert peft_name("clip_l.transformer.x.weight", "sd1", LAYOUT) == "clip_l.transformer.x"


@pytest.mark.parametrize(
    ("hosts", "todays"),
    [("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
     ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0")],
)  # fmt: skip
def test_what_the_host_calls_a_processor(hosts, todays):
    assert peft_spellings(hosts) == (f"unet.{todays}", f"base_model.model.{todays}")


def test_only_names_of_u_nets_have_other_spellings():
    assert peft_spellings("unet.conv_in") == ("base_model.model.conv_in",)
    assert peft_spellings("mid_block.attn1.processor.to_q") == peft_spellings("diffusion_model.x") == ()


def test_spellings_are_told_apart():
    """Names that the same tool gives to one part of a model are of one spelling, names of different tools are not."""
    together = [
        ["lora_unet_down_blocks_0_x", "lora_unet_up_blocks_1_x", "lora_unet_mid_block_x", "lora_unet_conv_in"],
        ["lora_unet_input_blocks_4_1_x", "lora_unet_output_blocks_0_0_x", "lora_unet_middle_block_1_x", "lora_unet_time_embed_0"],
        ["unet.down_blocks.0.x", "unet.conv_in"], ["diffusion_model.input_blocks.0.0", "diffusion_model.out.2"],
        ["lora_te1_text_model_x", "lora_te2_text_model_x"], ["lora_te_text_model_x"],
        ["text_encoder.text_model.x", "text_encoder_2.text_model.x"], ["text_encoders.clip_l.x"],
        ["unet.mid_block.attn1.processor.to_q"], ["base_model.model.x"], ["transformer.single_transformer_blocks.0.x"],
    ]  # fmt: skip
    found = [{spelling(name) for name in names} for names in together]
    assert all(len(kinds) == 1 for kinds in found) and len(set.union(*found)) == len(together)
    assert spelling("text_encoder.x")[0] == spelling("lora_te1_x")[0] == "text encoder" and spelling("anything")[0] == "denoiser"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_peft_file_reads_back_as_the_same_adapter(tmp_path, dtype):
    """Strictly, as a file of ours; up x down with no alpha is the whole delta; back in canonical form it has kohya's endings."""
    state = adapter_state({**adapter_state().metadata, "note": "kept"})
    path = write_adapter(tmp_path / "a.safetensors", peft_state(state), dtype)
    back = read_adapter(path)
    assert sorted(back) == sorted(f"{name}.lora_{half}.weight" for name in (LINEAR, CONV) for half in "AB")
    assert back.metadata["trilora.form"] == "peft" and back.metadata["note"] == "kept" and not back.canonical
    again = canonical_state(back)
    assert again.canonical and again.keys() == state.keys()
    for name, layer in split_layers(state)[0].items():
        for other in (split_layers(back)[0][name], split_layers(again)[0][name]):
            assert other.kernel == layer.kernel
            scale = layer.pair.dense().abs().max().item()
            torch.testing.assert_close(other.pair.dense(), layer.pair.dense(), rtol=0, atol=scale * (1e-6 if dtype is torch.float32 else 1e-3))


def test_other_kinds_do_not_fit_into_a_peft_file():
    """Named by what they are, not by whichever of their keys comes first."""
    dora = {"a.lora_up.weight": draw(3, 2), "a.lora_down.weight": draw(2, 3), "a.alpha": torch.tensor(2.0), "a.dora_scale": draw(3, 1)}
    lokr = {"a.lokr_w1": draw(2, 2), "a.lokr_w2_a": draw(3, 1), "a.lokr_w2_b": draw(1, 3), "a.alpha": torch.tensor(1.0)}
    for other, said in (({"x.diff": draw(3)}, "x is a layer of kind full difference"), ({"a.transform.core0": draw(2)}, "a is a layer of kind transform"),
                        (dora, "a is a layer of kind DoRA"), (lokr, "a is a layer of kind LoKr"), ({"x.diff_b": draw(3)}, "x is a layer of kind bias"),
                        ({"a_key": draw(1)}, "a_key is of no layer")):  # fmt: skip
        with pytest.raises(TriLoRAError, match=f"^keys=peft: {said}, and PEFT files hold plain LoRA layers only; save with keys=kohya$"):
            peft_state(AdapterState({**adapter_state(), **other}, {}))


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda s: s.pop(f"{LINEAR}.lora_A.weight"), [f"missing: {LINEAR}.lora_A.weight"]),
     (lambda s: s.pop(f"{CONV}.lora_B.weight"), [f"missing: {CONV}.lora_B.weight"]),
     (lambda s: s.update({f"{LINEAR}.alpha": torch.tensor(1.0)}), [f"missing: {LINEAR}.lora_down.weight"]),
     (lambda s: s.update({f"{LINEAR}.lora_magnitude_vector": draw(7)}), [f"unknown: {LINEAR}.lora_magnitude_vector"]),
     (lambda s: s.update({f"{LINEAR}.lora_B.weight": draw(7, 4)}), [f"{LINEAR}.lora_B.weight", "(7, 4)"])],
    ids=["no A", "no B", "an alpha", "magnitudes", "shape"],
)  # fmt: skip
def test_an_incomplete_peft_file_of_ours_is_refused(tmp_path, change, words):
    state = peft_state(adapter_state())
    change(state)
    path = tmp_path / "broken.safetensors"
    save_file(dict(state), path, metadata=state.metadata)
    refusal(lambda: read_adapter(path), "broken.safetensors", *words)
