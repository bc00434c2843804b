"""Names of layers in files, against kohya's own, over the complete layout of SD1.5's U-Net."""

import pytest
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.naming import FAMILIES, UNetLayout, public_name

RESNET = ("in_layers.2", "emb_layers.1", "out_layers.3")
ATTENTION = tuple(f"{attn}.{part}" for attn in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0"))
TRANSFORMER = ("proj_in", "proj_out", *(f"transformer_blocks.0.{part}" for part in (*ATTENTION, "ff.net.0.proj", "ff.net.2")))


def sd15_paths() -> list[str]:
    """Every linear layer and convolution of SD1.5's U-Net, as ComfyUI spells them."""
    paths = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2"]
    for number in range(1, 12):
        if number in (3, 6, 9):
            paths.append(f"input_blocks.{number}.0.op")
            continue
        paths += [f"input_blocks.{number}.0.{part}" for part in RESNET + (("skip_connection",) if number in (4, 7) else ())]
        paths += [f"input_blocks.{number}.1.{part}" for part in TRANSFORMER if number < 9]
    paths += [f"middle_block.{slot}.{part}" for slot in (0, 2) for part in RESNET] + [f"middle_block.1.{part}" for part in TRANSFORMER]
    for number in range(12):
        paths += [f"output_blocks.{number}.0.{part}" for part in (*RESNET, "skip_connection")]
        paths += [f"output_blocks.{number}.1.{part}" for part in TRANSFORMER if number > 2]
        if number in (2, 5, 8):
            paths.append(f"output_blocks.{number}.{1 if number == 2 else 2}.conv")
    return paths


def diffusers_modules() -> set[str]:
    """The same layers as diffusers' UNet2DConditionModel names them: four levels, two residual blocks down, three up."""
    def resnet(parent, index, shortcut):
        return {f"{parent}.resnets.{index}.{part}" for part in ("conv1", "conv2", "time_emb_proj") + (("conv_shortcut",) if shortcut else ())}

    def attention(parent, index):
        return {f"{parent}.attentions.{index}.{part}" for part in TRANSFORMER}

    modules = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    modules |= resnet("mid_block", 0, False) | resnet("mid_block", 1, False) | attention("mid_block", 0)
    for level in range(4):
        for index in range(2):
            modules |= resnet(f"down_blocks.{level}", index, index == 0 and level in (1, 2))
            modules |= attention(f"down_blocks.{level}", index) if level < 3 else set()
        for index in range(3):
            modules |= resnet(f"up_blocks.{level}", index, True)
            modules |= attention(f"up_blocks.{level}", index) if level > 0 else set()
        if level < 3:
            modules |= {f"down_blocks.{level}.downsamplers.0.conv", f"up_blocks.{level}.upsamplers.0.conv"}
    return modules


KEYS = [f"diffusion_model.{path}.weight" for path in sd15_paths()]
LAYOUT = UNetLayout.of(KEYS)
# as they stand in files of kohya's trainer
KOHYA = {
    "input_blocks.0.0": "lora_unet_conv_in",
    "time_embed.0": "lora_unet_time_embedding_linear_1",
    "time_embed.2": "lora_unet_time_embedding_linear_2",
    "input_blocks.1.0.in_layers.2": "lora_unet_down_blocks_0_resnets_0_conv1",
    "input_blocks.1.1.proj_in": "lora_unet_down_blocks_0_attentions_0_proj_in",
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "input_blocks.2.1.transformer_blocks.0.attn2.to_out.0": "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0",
    "input_blocks.3.0.op": "lora_unet_down_blocks_0_downsamplers_0_conv",
    "input_blocks.4.0.skip_connection": "lora_unet_down_blocks_1_resnets_0_conv_shortcut",
    "input_blocks.5.0.emb_layers.1": "lora_unet_down_blocks_1_resnets_1_time_emb_proj",
    "input_blocks.8.1.transformer_blocks.0.ff.net.0.proj": "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_ff_net_0_proj",
    "input_blocks.9.0.op": "lora_unet_down_blocks_2_downsamplers_0_conv",
    "input_blocks.10.0.in_layers.2": "lora_unet_down_blocks_3_resnets_0_conv1",
    "input_blocks.11.0.out_layers.3": "lora_unet_down_blocks_3_resnets_1_conv2",
    "middle_block.0.in_layers.2": "lora_unet_mid_block_resnets_0_conv1",
    "middle_block.1.transformer_blocks.0.attn2.to_k": "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
    "middle_block.2.out_layers.3": "lora_unet_mid_block_resnets_1_conv2",
    "output_blocks.0.0.in_layers.2": "lora_unet_up_blocks_0_resnets_0_conv1",
    "output_blocks.2.1.conv": "lora_unet_up_blocks_0_upsamplers_0_conv",
    "output_blocks.3.1.transformer_blocks.0.attn1.to_v": "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_v",
    "output_blocks.5.2.conv": "lora_unet_up_blocks_1_upsamplers_0_conv",
    "output_blocks.8.1.proj_out": "lora_unet_up_blocks_2_attentions_2_proj_out",
    "output_blocks.8.2.conv": "lora_unet_up_blocks_2_upsamplers_0_conv",
    "output_blocks.9.0.skip_connection": "lora_unet_up_blocks_3_resnets_0_conv_shortcut",
    "output_blocks.11.1.transformer_blocks.0.ff.net.2": "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2",
    "out.2": "lora_unet_conv_out",
}


@pytest.mark.parametrize(("path", "name"), KOHYA.items(), ids=list(KOHYA))
def test_kohyas_names(path, name):
    assert f"diffusion_model.{path}.weight" in KEYS
    assert public_name(f"diffusion_model.{path}.weight", "sd1", LAYOUT) == name


def test_every_layer_of_sd15_has_its_own_name():
    """The names are exactly diffusers' modules; 192 of them belong to transformers, as kohya's trainer counts them."""
    names = [public_name(key, "sd1", LAYOUT) for key in KEYS]
    assert len(set(names)) == len(names)
    assert set(names) == {"lora_unet_" + module.replace(".", "_") for module in diffusers_modules()}
    assert sum("_attentions_" in name for name in names) == 192


def test_the_layout_is_read_from_any_order_of_keys():
    assert UNetLayout.of(sorted(KEYS, reverse=True)) == LAYOUT
    assert LAYOUT.inputs[1] == (0, 0) and LAYOUT.inputs[11] == (3, 1) and LAYOUT.outputs[0] == (0, 0) and LAYOUT.outputs[11] == (3, 2)


def test_sdxl_keeps_the_original_names():
    key = "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_out.0.weight"
    assert public_name(key, "sdxl") == "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0"
    assert public_name("diffusion_model.label_emb.0.2.weight", "sdxl") == "lora_unet_label_emb_0_2"
    assert public_name("diffusion_model.middle_block.0.in_layers.2.weight", "sdxl") == "lora_unet_middle_block_0_in_layers_2"


@pytest.mark.parametrize("path", ["double_blocks.0.img_attn.qkv", "blocks.3.cross_attn.k_img", "final_layer.linear"])
def test_other_families_keep_the_hosts_names(path):
    assert public_name(f"diffusion_model.{path}.weight", "generic", UNetLayout.of([])) == f"diffusion_model.{path}"


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_outside_the_denoiser_are_left_alone(family):
    assert public_name("clip_l.transformer.q_proj.weight", family, LAYOUT) == "clip_l.transformer.q_proj"


def test_a_layer_diffusers_has_no_name_for():
    assert public_name("diffusion_model.label_emb.0.0.weight", "sd1", LAYOUT) == "lora_unet_label_emb_0_0"


def test_an_unknown_family_is_refused():
    with pytest.raises(TriLoRAError, match="family='sd9': choose one of sd1, sd2, sdxl, generic"):
        public_name(KEYS[0], "sd9", LAYOUT)
