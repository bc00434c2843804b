"""The forms that files of other trainers come in: split into the right layers, with the delta those trainers apply.

What peft, diffusers and LyCORIS really write and read is tested in interchange/.
"""

import pytest
import torch
from comfyui_trilora.trilora_ops.checkpoint import (
    AdapterState,
    canonical_state,
    read_adapter,
    split_layers,
    write_adapter,
)
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.files.low_rank import PAIRS
from safetensors.torch import save_file
from torch import nn


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_layers(path, expected: dict, tmp_path) -> None:
    """The file's layers and its canonical copy's are the expected deltas, and every layer has the weight's kernel."""
    assert expected
    state = read_adapter(path)
    copy = read_adapter(write_adapter(tmp_path / "canonical.safetensors", canonical_state(state), torch.float32))
    assert copy.canonical and not state.canonical
    for layers, rest in (split_layers(state), split_layers(copy)):
        assert not rest and layers.keys() == expected.keys()
        for name, delta in expected.items():
            torch.testing.assert_close(layers[name].pair.dense(), delta, atol=2e-6, rtol=1e-5)
            assert layers[name].kernel == ((3, 2) if name.endswith("conv") else ())


@pytest.mark.parametrize("alpha", [None, 4.0, 1.0, 0.5])
def test_kohya(tmp_path, alpha):
    """delta = alpha / rank * up * down; without an alpha the scale is 1."""
    up, down = {"lora_unet_fc": draw(9, 4), "lora_unet_conv": draw(5, 4, 1, 1, seed=1)}, {"lora_unet_fc": draw(4, 6), "lora_unet_conv": draw(4, 4, 3, 2, seed=2)}
    tensors = {f"{name}.lora_up.weight": value for name, value in up.items()} | {f"{name}.lora_down.weight": value for name, value in down.items()}
    if alpha is not None:
        tensors |= {f"{name}.alpha": torch.tensor(alpha) for name in up}
    path = tmp_path / "kohya.safetensors"
    save_file(tensors, path, metadata={"ss_network_module": "networks.lora"})
    scale = 1.0 if alpha is None else alpha / 4
    assert_layers(path, {name: scale * up[name].flatten(1) @ down[name].flatten(1) for name in up}, tmp_path)


def test_kohyas_formula_is_a_pair_of_convolutions():
    """The flattened product is the kernel of `up` (1x1) after `down` (k x k), as trainers compute it."""
    up, down = draw(5, 4, 1, 1), draw(4, 3, 3, 2, seed=1)
    dense = split_layers({"x.lora_up.weight": up, "x.lora_down.weight": down})[0]["x"].pair.dense().view(5, 3, 3, 2)
    x = draw(2, 3, 6, 7, seed=2)
    torch.testing.assert_close(nn.functional.conv2d(x, dense), nn.functional.conv2d(nn.functional.conv2d(x, down), up), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("up", "down"), PAIRS, ids=[up for up, _ in PAIRS])
def test_every_spelling_of_a_pair(up, down):
    tensors = {f"a.b{up}": draw(7, 2), f"a.b{down}": draw(2, 5, seed=1), "a.b.alpha": torch.tensor(1.0), "other": draw(3)}
    layers, rest = split_layers(tensors)
    assert list(layers) == ["a.b"] and list(rest) == ["other"]
    torch.testing.assert_close(layers["a.b"].pair.dense(), 0.5 * draw(7, 2) @ draw(2, 5, seed=1))


COMPANIONS = {"lora_mid.weight": draw(2, 2, 3), "dora_scale": draw(7, 1), "reshape_weight": torch.tensor([9, 5]), "lora_magnitude_vector": draw(7)}


@pytest.mark.parametrize("companion", COMPANIONS)
def test_layers_with_a_companion_stay_whole(companion):
    tensors = {"x.lora_up.weight": draw(7, 2), "x.lora_down.weight": draw(2, 5), "x.alpha": torch.tensor(1.0), f"x.{companion}": COMPANIONS[companion]}
    layers, rest = split_layers(tensors)
    assert layers == {} and rest.keys() == tensors.keys()


def test_a_lone_factor_is_refused():
    for name, other in (("x.lora_up.weight", "x.lora_down.weight"), ("x.lora_A.weight", "x.lora_B.weight")):
        with pytest.raises(TriLoRAError, match=f"{other} is missing"):
            split_layers({name: draw(7, 2), "z.hada_w1_a": draw(2, 2)})


@pytest.mark.parametrize(("up", "down"), [((7, 2), (3, 5)), ((7,), (2, 5)), ((2, 7), (7,))], ids=str)
def test_factors_that_do_not_fit_are_refused(up, down):
    tensors = AdapterState({"x.lora_up.weight": draw(*up), "x.lora_down.weight": draw(*down)})
    with pytest.raises(TriLoRAError, match="x.lora_up.weight is .* and x.lora_down.weight is .*: expected"):
        canonical_state(tensors)
