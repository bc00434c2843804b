"""A file gives every layer once and whole, or nothing of it is applied: the host itself would drop the rest in silence."""

import logging

import pytest
import torch
from comfyui_trilora.tests.host.tiny_run import load_checkpoint

LAYER = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
OTHER = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k"
NORM = "diffusion_model.middle_block.1.transformer_blocks.0.norm1"


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(host_nodes, models_dir):
    return load_checkpoint(host_nodes)[0]


@pytest.fixture(scope="module")
def width(model):
    return model.model.state_dict()[LAYER + ".weight"].shape[0]


@pytest.fixture
def read(pack_module, model):
    patches = pack_module("nodes.comfy_patches")
    checkpoint = pack_module("trilora_ops.checkpoint")
    return lambda tensors: patches.patches_from_state(checkpoint.AdapterState(tensors), model, None, "a.safetensors")


def pair(name, width, up=".lora_up.weight", down=".lora_down.weight"):
    return {name + up: draw(width, 2), name + down: draw(2, width)}


TWICE = {
    "two names": lambda n: pair(LAYER, n) | pair(KOHYA, n),
    "two endings": lambda n: pair(LAYER, n) | pair(LAYER, n, ".lora_B.weight", ".lora_A.weight"),
    "a pair and a difference": lambda n: pair(LAYER, n) | {LAYER + ".diff": draw(n, n)},
    "a pair and a transform": lambda n: pair(LAYER, n) | {LAYER + ".transform.m": torch.ones(n)},
    "LoHa and LoKr": lambda n: {f"{LAYER}.hada_w{i}_{c}": draw(*((n, 2) if c == "a" else (2, n))) for i in (1, 2) for c in "ab"}
    | {LAYER + ".lokr_w1": draw(2, 2), LAYER + ".lokr_w2": draw(n // 2, n // 2)},
}


@pytest.mark.parametrize("case", TWICE)
def test_two_layers_for_one_place_are_refused(read, width, case):
    with pytest.raises(ValueError, match="a.safetensors: .* and .* are two layers for one place"):
        read(TWICE[case](width) | pair(OTHER, width))


@pytest.mark.parametrize("left", [".lora_down.weight", ".hada_w1_a", ".residual.up"])
def test_a_part_of_a_layer_is_refused(read, width, left):
    with pytest.raises(ValueError, match="a.safetensors: "):
        read(pair(OTHER, width) | {LAYER + left: draw(2, width)})


def test_what_no_reader_takes_is_counted(read, width, caplog):
    caplog.set_level(logging.WARNING)
    assert len(read(pair(OTHER, width) | {LAYER + ".lora_foo.weight": draw(2, 2), LAYER + ".alpha": torch.tensor(1.0)})) == 1
    assert "lora_foo" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "words"),
    [(lambda n: {LAYER + ".lora_up.weight": draw(n, 0), LAYER + ".lora_down.weight": draw(0, n)}, "cannot be multiplied"),
     (lambda n: {LAYER + ".oft_blocks": draw(n // 4, 4, 5)}, "not square"),
     (lambda n: pair(LAYER, n) | {LAYER + ".reshape_weight": torch.tensor([n, n // 2])}, "smaller"),
     (lambda n: {LAYER + ".lokr_w1": draw(2), LAYER + ".lokr_w2": draw(n // 2, n // 2)}, "no matrix"),
     (lambda n: {NORM + ".transform.m": torch.ones(n)}, "not a matrix"),
     (lambda n: pair(LAYER, n) | {LAYER + ".alpha": torch.ones(2)}, "expected one number")],
    ids=["rank 0", "oft", "reshape", "lokr", "norm", "alpha"],
)  # fmt: skip
def test_impossible_layers_are_refused(read, width, tensors, words):
    with pytest.raises(ValueError, match=f"a.safetensors: .*{words}"):
        read(tensors(width))


def test_companions_are_no_second_layer(read, width, model):
    """Magnitudes, alpha and the difference of a bias stand beside a pair."""
    out = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0"
    bias = model.model.state_dict()[out + ".bias"]
    found = read(pair(LAYER, width) | {LAYER + ".alpha": torch.tensor(1.0), LAYER + ".dora_scale": draw(width, 1)}
                 | pair(out, width) | {out + ".diff_b": torch.zeros_like(bias)})
    assert len(found) == 3
