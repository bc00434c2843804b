"""Layers that are there twice, by halves, or in shapes and numbers that cannot be: an error that names the key, or no harm."""

import dataclasses
import json

import pytest
import torch
from comfyui_trilora.trilora_ops.adapter import Adapter, LayerShape
from comfyui_trilora.trilora_ops.checkpoint import SVD_MARK, AdapterState, read_adapter, split_layers, write_adapter
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.factors import LowRank, canonicalise, spectrum
from comfyui_trilora.trilora_ops.merge import add_low_rank_
from comfyui_trilora.trilora_ops.registry import Method
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig
from comfyui_trilora.trilora_ops.residuals.none import NoResidual
from comfyui_trilora.trilora_ops.residuals.tensor_ring import TensorRingResidual
from comfyui_trilora.trilora_ops.resize import resize
from comfyui_trilora.trilora_ops.transforms.diagonal import DiagonalConfig
from safetensors.torch import save_file
from torch import nn


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(name="x", rank=2):
    pair = canonicalise(LowRank(draw(6, rank), draw(rank, 5, seed=1)))
    return {f"{name}.lora_up.weight": pair.up, f"{name}.lora_down.weight": pair.down, f"{name}.alpha": torch.tensor(pair.alpha)}


def marked(path, tensors, **metadata):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {**SVD_MARK, **metadata})
    return path


def test_one_layer_twice_is_refused(tmp_path):
    twice = plain() | {"x.lora_B.weight": draw(6, 2), "x.lora_A.weight": draw(2, 5)}
    with pytest.raises(TriLoRAError, match=r"x\.lora_B\.weight.*twice"):
        split_layers(twice)
    beside = plain() | {"x.transform.m": torch.ones(5), "x.residual.up": draw(6, 1), "x.residual.down": draw(1, 5), "x.residual.scale": torch.tensor(1.0)}
    with pytest.raises(TriLoRAError, match=r"x.*twice"):
        read_adapter(marked(tmp_path / "a.safetensors", beside))


@pytest.mark.parametrize("missing", ["x.lora_up.weight", "x.lora_down.weight"])
def test_half_a_layer_is_refused(missing):
    tensors = plain("y") | {key: tensor for key, tensor in plain().items() if key != missing}
    with pytest.raises(TriLoRAError, match=rf"{missing}.*missing"):
        resize(AdapterState(tensors), rank=1)


def test_companions_explain_a_half():
    """What makes a layer another kind stays in the second part, untouched."""
    dora = plain() | {"x.dora_scale": draw(6, 1)}
    layers, rest = split_layers(dora)
    assert not layers and rest.keys() == dora.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"x.lora_up.weight": torch.zeros(6, 0), "x.lora_down.weight": torch.zeros(0, 5)}, "rank 0"),
     ({"x.lora_down.weight": torch.tensor(1.0)}, r"\(r, in\)"),
     ({"x.lora_up.weight": torch.ones(6, 2, dtype=torch.int64)}, "int64")],
    ids=["rank", "shape", "dtype"],
)  # fmt: skip
@pytest.mark.parametrize("ours", [False, True])
def test_impossible_factors_are_refused(tmp_path, change, words, ours):
    path = tmp_path / "a.safetensors"
    save_file(plain() | change, path, SVD_MARK if ours else None)
    with pytest.raises(TriLoRAError, match=rf"x\.lora_up\.weight.*{words}"):
        split_layers(read_adapter(path))


def test_a_configured_alpha_that_is_no_number(tmp_path):
    folder = tmp_path / "peft"
    folder.mkdir()
    tensors = {"base_model.model.x.lora_A.weight": draw(2, 5), "base_model.model.x.lora_B.weight": draw(6, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    for alpha, told in (("1e300", "lora_alpha"), ("1" + "0" * 400, "adapter_config.json: .* a number of 401 digits")):
        (folder / "adapter_config.json").write_text('{"lora_alpha": ' + alpha + ', "r": 2}', encoding="utf-8")
        with pytest.raises(TriLoRAError, match=told):
            read_adapter(folder / "adapter_model.safetensors")


def test_a_path_with_our_words_in_it_is_a_plain_layer(tmp_path):
    name = "diffusion_model.blocks.0.residual.fc"
    resized, _ = resize(AdapterState(plain(name)), rank=1)
    path = write_adapter(tmp_path / "a.safetensors", AdapterState(resized, {**SVD_MARK}), torch.float32)
    assert list(split_layers(read_adapter(path))[0]) == [name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_transform_keeps_its_digits(tmp_path, dtype):
    """1 + small does not fit into half precision: the numbers of a transform, and a scale, stay fp32."""
    tensors = {"x.transform.m": 1 + 1e-4 * draw(5), "x.residual.up": draw(6, 2), "x.residual.down": draw(2, 5), "x.residual.scale": torch.tensor(2.0**-26)}
    found = read_adapter(write_adapter(tmp_path / "a.safetensors", AdapterState(tensors), dtype))
    assert torch.equal(found["x.transform.m"], tensors["x.transform.m"]) and float(found["x.residual.scale"]) == 2.0**-26
    assert found["x.residual.up"].dtype == dtype


def test_a_written_file_does_not_claim_anothers_hash(tmp_path):
    state = AdapterState(plain(), {"sshs_model_hash": "1", "sshs_legacy_hash": "2", "modelspec.hash_sha256": "3", "modelspec.title": "t"})
    found = read_adapter(write_adapter(tmp_path / "a.safetensors", state, torch.float32))
    assert found.metadata == {"modelspec.title": "t"}


class Doubling(nn.Module):
    """T = 2 I, whose delta is the very tensor it is given."""

    def delta(self, weight):
        return weight


def test_a_transform_may_return_what_it_was_given():
    shape, weight = LayerShape(6, 5), draw(6, 5)
    residual = LoraConfig(2).build(shape, weight, torch.Generator().manual_seed(1))
    residual.up.data += 1
    for part, change in ((residual, weight + residual.delta()), (NoResidual(shape), weight)):
        adapter, before = Adapter(shape, Doubling(), part), weight.clone()
        torch.testing.assert_close(adapter.delta(weight), change)
        assert torch.equal(weight, before)
        target = weight.clone()
        torch.testing.assert_close(adapter.add_delta_(target, target, 0.5), weight + 0.5 * change.detach())


def test_a_negative_scale_has_no_negative_singular_values():
    pair = canonicalise(LowRank(draw(6, 3), draw(3, 5, seed=1)))
    torch.testing.assert_close(spectrum(dataclasses.replace(pair, scale=-pair.scale)), spectrum(pair))


def test_factors_beyond_half_precision_merge_into_it():
    """up in the hundred thousands beside a tiny down, and a huge scale on nothing: the sum is what counts."""
    up, down = 1e5 * draw(6, 2), 1e-7 * draw(2, 5, seed=1)
    ordinary = LowRank(draw(6, 1, seed=2), 1e-3 * draw(1, 5, seed=3))
    parts = [(LowRank(up, down), 1.0), (LowRank(torch.zeros(6, 1), draw(1, 5), 1e6), 1.0), (ordinary, 1.0)]
    found = add_low_rank_(torch.zeros(6, 5, dtype=torch.float16), parts)
    torch.testing.assert_close(found.float(), up @ down + ordinary.dense(), rtol=5e-3, atol=5e-6)


def test_a_ring_needs_cores_on_both_sides():
    with pytest.raises(TriLoRAError, match="residual"):
        TensorRingResidual.from_tensors(LayerShape(6, 1), {"core0": draw(2, 2, 2), "core1": draw(3, 2, 2)})


def test_a_trained_pair_still_reads_back(tmp_path):
    """The checks let pass what they must: a transform beside a residual, next to a plain layer."""
    layer = nn.Linear(5, 6)
    adapter = Method(LoraConfig(2), DiagonalConfig()).build(layer, layer.weight.detach(), torch.Generator().manual_seed(0))
    tensors = {f"y.transform.{n}": t for n, t in adapter.transform.tensors().items()} | {f"y.residual.{n}": t for n, t in adapter.residual.tensors().items()}
    path = marked(tmp_path / "a.safetensors", plain() | tensors, **{"trilora.plan": json.dumps({"x": 2, "y": 2})})
    assert read_adapter(path).keys() == (plain() | tensors).keys()
