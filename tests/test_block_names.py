"""Blocks of a file's layers without its model. Against the host's own key maps: tests/host/test_block_names.py."""

import random

import pytest
from comfyui_trilora.trilora_ops.block_names import InFile, blocks_in_file


@pytest.mark.parametrize(
    ("name", "block", "rest"),
    [("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q", "IN02", "1_transformer_blocks_0_attn1_to_q"),
     ("unet.down_blocks.3.resnets.1.conv1", "IN11", "0_conv1"), ("lora_unet_up_blocks_1_upsamplers_0_conv", "OUT05", "2_conv"),
     ("lycoris_mid_block_resnets_1_conv2", "MID2", "conv2"), ("lora_unet_input_blocks_10_0_in_layers_2", "IN10", "0_in_layers_2"),
     ("diffusion_model.time_embed.0", "EMB", "0"), ("diffusion_model.out.2", "FINAL", "2"), ("diffusion_model.single_blocks.37.linear1", "S37", "linear1"),
     ("lora_unet_double_blocks_0_img_mod_lin", "D00", "img_mod_lin"), ("diffusion_model.joint_blocks.7.x_block.attn.qkv", "J07", "x_block_attn_qkv"),
     ("lora_unet_blocks_29_self_attn_q", "B29", "self_attn_q"), ("diffusion_model.transformer_blocks.59.attn.to_q", "B59", "attn_to_q"),
     ("diffusion_model.vace_blocks.3.ffn.0", "V03", "ffn_0"), ("diffusion_model.llm_adapter.blocks.5.mlp.0", "A5", "mlp_0"),
     ("lora_te_text_model_encoder_layers_3_mlp_fc1", "TE1.03", "mlp_fc1"), ("text_encoder_2.text_model.encoder.layers.31.mlp.fc2", "TE2.31", "mlp_fc2"),
     ("text_encoder.encoder.layers.0.mlp.fc1", "TE1.00", "mlp_fc1"), ("lora_te2_encoder_block_23_layer_0_SelfAttention_q", "T5.23", "layer_0_SelfAttention_q"),
     ("text_encoders.qwen3_4b.transformer.model.layers.35.self_attn.q_proj", "LLM.35", "self_attn_q_proj"),
     ("lora_te_layers_2_mlp_up_proj", "LLM.02", "mlp_up_proj"), ("text_encoders.clip_l.transformer.text_projection", "TE1.EMB", "text_projection"),
     ("diffusion_model.odd_list.4.attn.q", "odd_list.04", "attn_q"), ("lora_unet_odd", "BASE", "odd")],
)  # fmt: skip
def test_one_layer(name, block, rest):
    assert blocks_in_file([name]) == {name: InFile(block, rest)}


def test_what_diffusers_calls_a_block_depends_on_what_else_there_is():
    """`transformer_blocks.3` is D03 in Flux, J03 in SD3, B03 in Qwen-Image; where a file does not tell, its own name stays."""
    block = "transformer.transformer_blocks.3."
    flux = blocks_in_file([f"{block}attn.to_q", "transformer.single_transformer_blocks.4.attn.to_q", "transformer.x_embedder"])
    assert [place.block for place in flux.values()] == ["IN", "D03", "S04"]
    assert [place.block for place in blocks_in_file([f"{block}attn.to_q", f"{block}img_mlp.net.2"]).values()] == ["B03", "B03"]
    assert [place.block for place in blocks_in_file([f"{block}attn.to_q", f"{block}attn2.to_q"]).values()] == ["J03", "J03"]
    assert [place.block for place in blocks_in_file([f"{block}attn.to_q", f"{block}ff.net.2"]).values()] == ["transformer_blocks.03"] * 2
    aura = blocks_in_file(["transformer.joint_transformer_blocks.3.attn.to_q", "transformer.single_transformer_blocks.31.attn.to_q"])
    assert [place.block for place in aura.values()] == ["D03", "S31"]


def test_what_families_call_differently_is_left_open():
    """`img_in` alone is IN of Flux or EMB of Qwen-Image; with a block beside it the file tells."""
    assert blocks_in_file(["diffusion_model.img_in"])["diffusion_model.img_in"].block == "BASE"
    assert blocks_in_file(["diffusion_model.img_in", "diffusion_model.single_blocks.0.linear1"])["diffusion_model.img_in"].block == "IN"
    assert blocks_in_file(["diffusion_model.img_in", "diffusion_model.transformer_blocks.0.txt_mlp.net.2"])["diffusion_model.img_in"].block == "EMB"


def test_layers_come_as_the_model_runs_in_any_order_of_the_file():
    names = ["lora_te1_text_model_encoder_layers_2_mlp_fc1", "lora_te1_text_model_encoder_layers_10_mlp_fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1",
             "lora_unet_time_embed_0", "lora_unet_input_blocks_4_1_proj_in", "lora_unet_input_blocks_4_1_transformer_blocks_2_attn1_to_q",
             "lora_unet_input_blocks_4_1_transformer_blocks_10_attn1_to_q", "lora_unet_input_blocks_11_0_in_layers_2", "lora_unet_middle_block_1_proj_in",
             "lora_unet_output_blocks_2_1_proj_in", "lora_unet_output_blocks_10_1_proj_in", "lora_unet_out_2"]
    for seed in range(5):
        assert list(blocks_in_file(random.Random(seed).sample(names, len(names)))) == names


def test_nothing_gives_nothing():
    assert blocks_in_file([]) == {}
