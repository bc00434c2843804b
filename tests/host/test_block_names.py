"""Blocks that are read from the names in a file against where the host puts those names."""

import re

import comfy.lora
import pytest
from comfyui_trilora.tests.host import meta_encoders, meta_models
from comfyui_trilora.trilora_ops.block_names import blocks_in_file
from comfyui_trilora.trilora_ops.blocks import BASE, EMB, Blocks

# one spelling each, as files have it; the host's map holds all of them together
SPELLINGS = (r"lora_unet_(?:down|up|mid)_", r"lora_unet_(?!down_|up_|mid_|conv_|time_embedding|add_embedding|class_embedding)", r"lora_transformer_",
             r"lora_te\d?_", r"lycoris_", r"diffusion_model\.(?!transformer_blocks|all_)", r"transformer\.", r"base_model\.model\.", r"unet\.",
             r"text_encoder(?:_\d)?\.", r"text_encoders\.\w+\.transformer\.")  # fmt: skip
NETWORKS = {name: network for name, network in meta_models.NETWORKS.items() if network.family != "generic" and "KOALA" not in name}
# without those that files call what others are called, or of which a file cannot say that there are two
ENCODERS = {name: entry for name, entry in meta_encoders.ENCODERS.items()
            if name not in ("SDXL refiner", "Stable Cascade", "Stable Audio 3", "MiniMax Music", "ACE-Step 1.5")}


def check(names: dict, keys) -> int:
    """Compares every spelling's layers; returns how many."""
    blocks, compared = Blocks.of(keys), 0
    for spelling in SPELLINGS:
        targets = {name: target if isinstance(target, str) else target[0] for name, target in names.items() if re.match(spelling, name)}
        targets = {name: target for name, target in targets.items() if target in keys}
        found = blocks_in_file(targets)
        for name, target in targets.items():
            expected, block = blocks.place(target).block, found[name].block
            # a name that does not tell keeps its own list's, and is never put in another block
            told = "." not in block and block != BASE if target.startswith("diffusion_model.") else not block.endswith(EMB)
            assert block == expected or not told, name
            compared += told
    return compared


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_of_the_denoiser(name):
    try:
        model = meta_models.build(NETWORKS[name])
    except meta_models.NotInHost as missing:
        pytest.skip(str(missing))
    assert check(comfy.lora.model_lora_keys_unet(model, {}), model.state_dict().keys()) > 100


@pytest.mark.parametrize("name", ENCODERS)
def test_layers_of_text_encoders(name):
    try:
        encoders = meta_encoders.build(ENCODERS[name])
    except (ModuleNotFoundError, AttributeError) as error:
        pytest.skip(f"this host has no such text encoder: {error}")
    assert check(comfy.lora.model_lora_keys_clip(encoders, {}), encoders.state_dict().keys()) > 50
