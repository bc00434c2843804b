"""Whole adapters made smaller, rebalanced and added up, against the dense products of their layers."""

import json

import pytest
import torch
from comfyui_trilora.trilora_ops.checkpoint import (
    AdapterState,
    FileLayer,
    canonical_state,
    peft_state,
    read_adapter,
    split_layers,
    write_adapter,
)
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.factors import LowRank
from comfyui_trilora.trilora_ops.resize import merge_adapters, resize

LAYERS = {"lora_unet_down_blocks_0_x": (13, 9, ()), "lora_unet_mid_block_y": (6, 5, (3, 2)), "lora_unet_up_blocks_1_z": (4, 7, (1, 1))}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def adapter(ranks=(5, 3, 2), seed=0, names=tuple(LAYERS), metadata=None, scale=0.3) -> AdapterState:
    tensors = {}
    for (name, (out, inp, kernel)), rank in zip(LAYERS.items(), ranks, strict=True):
        if name in names:
            pair = LowRank(draw(out, rank, seed=seed), draw(rank, inp * torch.Size(kernel).numel(), seed=seed + 1), scale)
            tensors |= FileLayer(pair, kernel).tensors(name)
    return AdapterState(tensors, metadata)


def dense(state) -> dict[str, torch.Tensor]:
    return {name: layer.pair.scale * (layer.pair.up.double() @ layer.pair.down.double()) for name, layer in split_layers(state)[0].items()}


def best(matrix, rank):
    U, sigma, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ Vt[:rank]


def distance(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("rank", [1, 2, 4, 100])
def test_a_rank_keeps_the_best_approximation(rank):
    """Of every layer, kernels kept, with the error that the report states."""
    state = adapter()
    small, report = resize(state, rank=rank)
    before, after = dense(state), dense(small)
    for change in report.layers:
        assert distance(after[change.name], best(before[change.name], rank)) <= 1e-5
        assert change.error == pytest.approx(distance(after[change.name], before[change.name]), abs=1e-6)
        assert (change.before, change.after) == (split_layers(state)[0][change.name].pair.rank, min(rank, change.before))
    assert {name: layer.kernel for name, layer in split_layers(small)[0].items()} == {name: kernel for name, (_, _, kernel) in LAYERS.items()}
    lost = sum(float((after[n] - before[n]).square().sum()) for n in before) / sum(float(before[n].square().sum()) for n in before)
    assert report.energy_lost == pytest.approx(lost, rel=1e-5, abs=1e-10) and report.kept == ()
    assert small.canonical


def test_energy_gives_every_layer_the_rank_it_needs():
    small, report = resize(adapter(), energy=0.9)
    assert all(change.error**2 <= 0.1 + 1e-6 for change in report.layers) and len({c.after for c in report.layers}) > 1
    both, _ = resize(adapter(), rank=1, energy=0.8)
    assert {layer.pair.rank for layer in split_layers(both)[0].values()} == {1}


def test_power_and_cap_are_on_each_layers_own_spectrum():
    state = adapter()
    found, report = resize(state, power=0.5, cap=0.7)
    for name, before in dense(state).items():
        U, sigma, Vt = torch.linalg.svd(before, full_matrices=False)
        wanted = (sigma[0] * (sigma / sigma[0]).sqrt()).clamp_max(0.7 * sigma[0]) * (sigma > 1e-9)
        assert distance(dense(found)[name], U * wanted @ Vt) <= 1e-5
        error = next(c.error for c in report.layers if c.name == name)
        assert error == pytest.approx(distance(dense(found)[name], before), rel=1e-4)


def test_other_kinds_are_carried_over_and_counted():
    other = {"x.set_weight": draw(3, 2), "y.dora_scale": draw(4), "lora_unet_w.diff": draw(3)}
    state = AdapterState({**adapter(), **other})
    small, report = resize(state, rank=1)
    assert report.kept == tuple(sorted(other)) and all(torch.equal(small[key], tensor) for key, tensor in other.items())
    assert not small.canonical and "3 tensors of other kinds" in report.text()


def test_metadata_say_what_was_done():
    """Every step stands in the provenance, oldest first; ranks are those of the file; what else was said stays."""
    state = adapter(metadata={"ss_network_dim": "5", "trilora.trigger": "sks", "note": "kept", "trilora.provenance": "broken{"})
    once, _ = resize(state, rank=2)
    twice, _ = resize(once, energy=0.9, cap=0.5)
    steps = json.loads(twice.metadata["trilora.provenance"])
    assert [step["action"] for step in steps] == ["resize", "resize"] and steps[0]["rank"] == 2 and steps[1]["cap"] == 0.5
    assert once.metadata["ss_network_dim"] == "2" and once.metadata["note"] == "kept" and once.metadata["trilora.trigger"] == "sks"
    assert json.loads(once.metadata["trilora.plan"]) == dict.fromkeys(LAYERS, 2)
    assert state.metadata["ss_network_dim"] == "5"


def test_the_report_names_what_changed_most():
    text = resize(adapter(), rank=1)[1].text()
    assert text.startswith("3 layers, 10 directions -> 3; error ") and "lora_unet_down_blocks_0_x: rank 5 -> 1, error" in text


def test_the_result_is_a_file_of_ours(tmp_path):
    for name, made in (("resized", resize(adapter(), rank=2)[0]), ("merged", merge_adapters([(adapter(), 1.0), (adapter(seed=9), 1.0)])[0])):
        back = read_adapter(write_adapter(tmp_path / f"{name}.safetensors", made, torch.float32))
        assert back.canonical and back.metadata == made.metadata and all(torch.equal(back[key], made[key]) for key in made)


def test_a_merge_is_the_dense_sum():
    """Over the union of the layers, each of its own rank, with negative weights; any endings and forms among the parts."""
    parts = [(adapter(), 0.7), (peft_state(adapter((2, 1, 1), 3)), -1.2), (adapter((1, 1, 4), 6, list(LAYERS)[:1]), 2.0)]
    merged, report = merge_adapters(parts)
    assert merged.canonical and dense(merged).keys() == LAYERS.keys()
    for name, found in dense(merged).items():
        wanted = sum(weight * dense(state)[name] for state, weight in parts if name in dense(state))
        assert distance(found, wanted) <= 1e-6
    assert all(change.error <= 1e-6 for change in report.layers)
    ranks = {change.name: change.after for change in report.layers}
    assert ranks["lora_unet_down_blocks_0_x"] == 8 and ranks["lora_unet_mid_block_y"] == 4
    assert {name: layer.kernel for name, layer in split_layers(merged)[0].items()} == {name: kernel for name, (_, _, kernel) in LAYERS.items()}


def test_a_merge_can_be_cut():
    parts = [(adapter(), 1.0), (adapter(seed=5), 0.5)]
    merged, report = merge_adapters(parts, rank=2)
    for name, found in dense(merged).items():
        whole = sum(weight * dense(state)[name] for state, weight in parts)
        assert distance(found, best(whole, 2)) <= 1e-5
        assert next(c.error for c in report.layers if c.name == name) == pytest.approx(distance(found, whole), rel=1e-4, abs=1e-6)
    assert all(layer.pair.rank <= 2 for layer in split_layers(merged)[0].values())


def test_an_adapter_merged_with_itself_needs_no_more_directions():
    merged, _ = merge_adapters([(adapter(), 0.5), (adapter(), 0.5)])
    assert {n: v.pair.rank for n, v in split_layers(merged)[0].items()} == {n: v.pair.rank for n, v in split_layers(adapter())[0].items()}


def test_merged_metadata_are_what_all_agree_on():
    one = adapter(metadata={"a": "1", "b": "2", "trilora.trigger": "sks", "modelspec.title": "cat"})
    two = adapter(seed=4, metadata={"a": "1", "b": "3", "modelspec.trigger_phrase": "ohwx, sks", "ss_output_name": "dog"})
    metadata = merge_adapters([(one, 0.5), (two, -1.0)])[0].metadata
    assert metadata["a"] == "1" and "b" not in metadata and "modelspec.title" not in metadata
    assert metadata["trilora.trigger"] == metadata["modelspec.trigger_phrase"] == "sks, ohwx"
    (step,) = json.loads(metadata["trilora.provenance"])
    assert step["of"] == [{"name": "cat", "weight": 0.5}, {"name": "dog", "weight": -1.0}]


def renamed(state, old, new) -> AdapterState:
    return AdapterState({key.replace(old, new): tensor for key, tensor in state.items()}, state.metadata)


@pytest.mark.parametrize("other", ["unet.down_blocks.0.", "lora_unet_input_blocks_1_1_", "diffusion_model.input_blocks.1.1."])
def test_two_spellings_are_never_added_up_by_name(other):
    """One layer could become two on one weight, of which the host applies one: the model must say which is which."""
    parts = [(adapter(), 1.0), (renamed(adapter(seed=2), "lora_unet_down_blocks_0_", other), 1.0)]
    with pytest.raises(TriLoRAError, match="spell the names of the denoiser's layers differently .* connect the model"):
        merge_adapters(parts)


def test_two_spellings_of_the_text_encoder_too():
    names = ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1")
    states = [renamed(adapter(), "lora_unet_down_blocks_0_x", name) for name in names]
    with pytest.raises(TriLoRAError, match="text encoder's layers differently"):
        merge_adapters([(state, 1.0) for state in states])
    assert merge_adapters([(states[0], 1.0), (states[0], 1.0)])


def transform():
    return AdapterState({"a.transform.core0": draw(2, 3, 4), "a.residual.lora_up": draw(3, 2)})


@pytest.mark.parametrize(
    ("action", "words"),
    [(lambda: resize(transform(), 2), "a.transform.core0: .* Extract Adapter"),
     (lambda: resize(AdapterState({"x.diff": draw(3, 2)}), 2), "no plain low-rank layer"),
     (lambda: resize(adapter(), rank=-1), "rank=-1"),
     (lambda: resize(adapter(), energy=1.5), "keep_energy=1.5"),
     (lambda: resize(adapter(), power=-1), "power=-1"),
     (lambda: resize(adapter(), cap=2), "cap=2"),
     (lambda: merge_adapters([]), "no adapter to merge"),
     (lambda: merge_adapters([(adapter(), 1.0), (transform(), 1.0)]), "a.transform.core0: .* merged .* Adapter Stack"),
     (lambda: merge_adapters([(AdapterState({**adapter(), "x.diff": draw(3, 2)}), 1.0)]), "x.diff: .* Bake Adapter, which adds them exactly"),
     (lambda: merge_adapters([(adapter(), float("nan"))]), "weight=nan"),
     (lambda: merge_adapters([(adapter(), 1.0), (AdapterState(FileLayer(LowRank(draw(13, 2), draw(2, 8))).tensors("lora_unet_down_blocks_0_x")), 1.0)]),
      r"lora_unet_down_blocks_0_x: .*\(13, 8.*\(13, 9.* different models"),
     (lambda: resize(AdapterState({**adapter(), "x.diff": torch.tensor([float("nan")])}), 2), "x.diff: holds NaN")],
    ids=["resize transform", "nothing", "rank", "energy", "power", "cap", "no parts", "merge transform", "merge diff", "weight", "sizes", "nan"],
)  # fmt: skip
def test_refusals(action, words):
    with pytest.raises(TriLoRAError, match=words):
        action()


def test_the_parts_are_not_changed():
    state = adapter(metadata={"a": "1"})
    before = {key: tensor.clone() for key, tensor in state.items()}
    resize(state, 1), merge_adapters([(state, 2.0), (state, 1.0)])
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items()) and state.metadata == {"a": "1"}


@pytest.mark.parametrize("gains", [(0.0,), (1.0, 0.5), (-1.0, 2.0, 0.25)], ids=str)
def test_gains_by_direction_and_their_error(gains):
    """Each layer's first directions times their factors, whatever order they are in afterwards; the stated error is the dense one."""
    state = adapter()
    result, report = resize(state, gains=gains)
    before, after = split_layers(canonical_state(state))[0], split_layers(result)[0]
    for change in report.layers:
        pair = before[change.name].pair
        factors = torch.ones(pair.rank)
        factors[: len(gains)] = torch.tensor(gains)[: pair.rank]
        wanted = pair.scale * (pair.up * factors) @ pair.down
        found = after[change.name].pair.dense()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * float(pair.dense().norm()))
        assert change.error == pytest.approx(float((found - pair.dense()).norm() / pair.dense().norm()), rel=1e-4)
    with pytest.raises(TriLoRAError, match="gains"):
        resize(state, gains=(float("nan"),))
