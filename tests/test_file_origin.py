"""What a file's names, sizes and metadata tell of it, and the command that says so."""

import pytest
import torch
from comfyui_trilora.cli import main
from comfyui_trilora.trilora_ops.file_origin import family_told, program_told, spellings_told
from comfyui_trilora.trilora_ops.key_doctor import in_runs
from comfyui_trilora.trilora_ops.message_words import counted, short, some
from safetensors.torch import save_file


def blocks(pattern: str, **counts: int) -> list[str]:
    return [pattern.format(group, number) for group, count in counts.items() for number in range(count)]


@pytest.mark.parametrize(
    ("names", "told"),
    [(blocks("lora_unet_{}_{}_img_attn_qkv", double_blocks=19) + blocks("lora_unet_{}_{}_linear1", single_blocks=38), "Flux.1 or Chroma"),
     (blocks("diffusion_model.{}.{}.img_attn.qkv", double_blocks=20) + blocks("diffusion_model.{}.{}.linear1", single_blocks=40), "HunyuanVideo or HunyuanImage 2.1"),
     (blocks("transformer.{}.{}.img_mlp.net.2", transformer_blocks=60), "Qwen-Image"), (blocks("lora_unet_{}_{}_attention_qkv", layers=30, noise_refiner=2), "Z-Image"),
     (blocks("diffusion_model.{}.{}.x_block.attn.qkv", joint_blocks=38), "SD3.5 Large"), (["lora_te_text_model_encoder_layers_0_mlp_fc1"], "a text encoder alone"),
     (blocks("transformer.{}.{}.attn.add_q_proj", transformer_blocks=19) + blocks("transformer.{}.{}.proj_mlp", single_transformer_blocks=38), "Flux.1 or Chroma"),
     (["lora_unet_down_blocks_0_attentions_0_proj_in"], "a U-Net (SD1.5, SD2, SDXL)"), (["lora_unet_nowhere"], ""), ([], ""),
     # some of the blocks: what has room for them, never what is just as long by chance, or has a part of the same name elsewhere
     (["transformer.transformer_blocks.3.ff.net.0.proj", "transformer.single_transformer_blocks.5.proj_mlp"], "Flux or HunyuanVideo"),
     (["lora_transformer_single_transformer_blocks_5_proj_mlp"], "Flux or HunyuanVideo"), (["lora_unet_double_blocks_7_img_attn_qkv"], "Flux or HunyuanVideo"),
     (["lora_unet_double_blocks_7_img_attn_qkv", "lora_unet_single_blocks_23_linear1"], "Flux or HunyuanVideo"),
     (blocks("lora_unet_{}_{}_img_attn_qkv", double_blocks=8), "Flux or HunyuanVideo"), (["diffusion_model.layers.25.attention.qkv"], "Lumina 2 or Z-Image or OmniGen2 or Ideogram 4"),
     (["lora_unet_double_blocks_53_img_attn_qkv"], "HunyuanVideo 1.5")],
)  # fmt: skip
def test_the_family_is_told_by_the_names(names, told):
    assert family_told(dict.fromkeys(names)) == told


@pytest.mark.parametrize(("width", "told"), [(768, "SD1.5"), (1024, "SD2"), (2048, "SDXL")])
@pytest.mark.parametrize("name", ["lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"])
def test_a_u_net_is_told_by_what_its_cross_attention_reads(name, width, told):
    assert family_told({name: (640, width), "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k": (640, 640)}) == told


def test_whose_names_and_which_program():
    assert spellings_told(["lora_unet_a", "lora_te_b", "base_model.model.c"], {}) == "kohya's, PEFT's"
    assert spellings_told(["blocks.0.q"], {"ss_network_module": "networks.lora"}) == "the model's own without a beginning; written by kohya's scripts (networks.lora)"
    assert spellings_told([], {}) == "none"
    for metadata, program in (({"trilora.format": "trilora", "ss_network_module": "x"}, "TriLoRA"), ({"ot_revision": "1"}, "OneTrainer"), ({"lora_adapter_metadata": "{}"}, "diffusers"),
                              ({"software": '{"name": "ai-toolkit", "version": "1"}'}, "ai-toolkit"), ({"software": "kept " * 100}, ("kept " * 12)[:60]),
                              ({"software": "[" * 100_000}, "[" * 60), ({"software": "[1]"}, "[1]"), ({}, "")):  # fmt: skip
        assert program_told(metadata) == program


def test_blocks_in_runs():
    assert in_runs({"D00": (8, 8), "D01": (8, 8), "D02": (0, 8), "S00": (0, 8), "EMB": (1,), "BASE": (1,)}) == "D00-D01 8 of 8, D02 0 of 8, S00 0 of 8, EMB 1, BASE 1"
    assert in_runs({}) == ""


def test_names_in_messages_are_short_and_in_one_line():
    assert short("a.b") == "a.b" and len(short("x" * 100_000)) < 200 and short("a\nb\x00\u202e") == "a?b??"
    assert some([]) == "" and some(["a", "b"]) == "a, b" and some(["a"] * 7) == "a, a, a, a, a and 2 more" and counted(1, "layer") + counted(0, "layer") == "1 layer0 layers"


def test_the_command_says_what_a_file_is(tmp_path, capsys):
    """Kind, family, program and blocks; one sentence where there is no file or it is broken."""
    tensors = {"bundle_emb.sks": torch.ones(2, 2)}
    for number in range(3):
        name = f"lora_unet_double_blocks_{number}_img_attn_qkv"
        tensors |= {f"{name}.lora_up.weight": torch.ones(6, 2), f"{name}.lora_down.weight": torch.ones(2, 2), f"{name}.alpha": torch.tensor(1.0)}
    tensors |= {"lora_unet_double_blocks_0_txt_attn_qkv.hada_w1_a": torch.ones(6, 2)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"ss_network_module": "networks.lora_flux", "trilora.trigger": "sks"})
    assert main(["inspect", str(path)]) == 0
    lines = {line.split("  ")[0]: line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines()}
    assert lines["names"] == "kohya's; written by kohya's scripts (networks.lora_flux)" and lines["trigger"] == "sks"
    assert lines["blocks"] == "D00 2, D01-D02 1" and lines["extra"] == "1 tensor of no layer: bundle_emb.sks" and "Flux" in lines["model family"]
    for name, words in (("none.safetensors", "there is no such file"), ("a.ckpt", "there is no such file")):
        assert main(["inspect", str(tmp_path / name)]) == 1 and words in capsys.readouterr().err
    path.write_bytes(b"broken")
    assert main(["inspect", str(path)]) == 1 and capsys.readouterr().err.startswith("trilora: a.safetensors: damaged or incomplete")
