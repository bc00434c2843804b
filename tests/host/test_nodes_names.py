"""The names that we write into files: every host knows them, for every layer of every layout, at full size."""

import dataclasses

import comfy.ldm.flux.model
import comfy.lora
import comfy.model_base
import comfy.supported_models
import pytest
import torch
from comfyui_trilora.tests.host.tiny_models import as_patcher

UNET = {
    "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4,
    "model_channels": 320, "adm_in_channels": None, "use_linear_in_transformer": False, "use_temporal_attention": False,
}  # fmt: skip
FOUR_LEVELS = {
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
}  # fmt: skip
XL = {"num_classes": "sequential", "adm_in_channels": 2816, "context_dim": 2048, "use_linear_in_transformer": True,
      "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4]}  # fmt: skip
FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
    "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
SD3 = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 24, "input_size": None, "adm_in_channels": 2048,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
    "num_patches": 36864, "pos_embed_max_size": 192, "pos_embed_scaling_factor": None, "qk_norm": "rms",
}  # fmt: skip
# layout -> (the host's configuration, its U-Net or DiT configuration, our family, number of linear layers and convolutions)
LAYOUTS = {
    "SD1.5": ("SD15", {**UNET, **FOUR_LEVELS, "context_dim": 768, "num_heads": 8}, "sd1"),
    "SD2": ("SD20", {**UNET, **FOUR_LEVELS, "context_dim": 1024, "use_linear_in_transformer": True, "num_head_channels": 64}, "sd2"),
    "SDXL": ("SDXL", {**UNET, **XL, "transformer_depth": [0, 0, 2, 2, 10, 10], "num_head_channels": 64,
                      "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10}, "sdxl"),
    "SSD-1B": ("SSD1B", {**UNET, **XL, "transformer_depth": [0, 0, 2, 2, 4, 4], "num_head_channels": 64,
                         "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4], "transformer_depth_middle": -1}, "sdxl"),
    "Flux": ("Flux", FLUX, "generic"),
    "SD3": ("SD3", SD3, "generic"),
}  # fmt: skip


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, pack_module):
    """(ComfyHost of a model of full size without weights, expected family)."""
    name, network, family = LAYOUTS[request.param]
    if request.param == "Flux":
        known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
        network = {"image_model": "flux", **{key: value for key, value in network.items() if key in known}}
    with torch.inference_mode():
        config = getattr(comfy.supported_models, name)(dict(network))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=torch.device("meta"))
        return pack_module("nodes.comfy_host").ComfyHost(as_patcher(model)), family


def test_every_layers_name_leads_back_to_its_own_weight(layout, pack_module):
    """key -> our public name -> the host's key map -> key, for all layers, no name twice."""
    host, family = layout
    naming = pack_module("trilora_ops.naming")
    assert host.family() == family
    known = comfy.lora.model_lora_keys_unet(host.model, {})
    unet = naming.UNetLayout.of(host.layers())
    names = {key: naming.public_name(key, family, unet) for key in host.layers()}
    assert {key: known.get(name) for key, name in names.items()} == {key: key for key in names}
    assert len(set(names.values())) == len(names) > 200


def test_every_weight_matrix_of_the_model_is_among_the_layers(layout):
    """No linear layer or convolution is overlooked, whatever class the host gives it."""
    host, _ = layout
    matrices = {key for key, tensor in host.model.state_dict().items() if key.endswith(".weight") and tensor.ndim >= 2}
    assert {key for key in matrices if key not in host.layers()} == set()


def test_attention_is_what_the_papers_adapt(layout, pack_module):
    """The target "attention" names q, k, v and out of every attention, and nothing else."""
    host, family = layout
    chosen = pack_module("trilora_ops.targets").select(pack_module("training.plan").adaptable(host), "attention")
    if family == "generic":
        assert all(".attn" in key or "_attn" in key or "single_blocks" in key for key in chosen)
        return
    attentions = [name for name, module in host.model.named_modules() if name.endswith((".attn1", ".attn2"))]
    assert len(chosen) == 4 * len(attentions) > 0


def test_unet_names_are_the_ones_other_tools_write(layout, pack_module):
    """diffusers' levels for SD1.x and SD2, the original blocks for SDXL: samples from files that people share."""
    host, family = layout
    naming = pack_module("trilora_ops.naming")
    unet = naming.UNetLayout.of(host.layers())
    names = {naming.public_name(key, family, unet) for key in host.layers()}
    shared = {
        "sd1": {"lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q", "lora_unet_mid_block_attentions_0_proj_in",
                "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj", "lora_unet_down_blocks_2_downsamplers_0_conv",
                "lora_unet_up_blocks_1_upsamplers_0_conv", "lora_unet_up_blocks_2_resnets_0_conv_shortcut", "lora_unet_conv_in"},
        "sdxl": {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_input_blocks_3_0_op",
                 "lora_unet_output_blocks_3_1_proj_out", "lora_unet_middle_block_0_in_layers_2"},
        "generic": set(),
    }  # fmt: skip
    assert shared[{"sd2": "sd1"}.get(family, family)] <= names
