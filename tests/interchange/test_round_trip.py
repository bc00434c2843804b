"""Laws over every form and every writer: read, canonicalised, written and read again, a delta is the same."""

import dataclasses

import pytest
import torch
from comfyui_trilora.tests.interchange.small_models import assert_same, draw, file_deltas, random_adapter
from comfyui_trilora.trilora_ops.checkpoint import (
    AdapterState,
    canonical_state,
    peft_state,
    read_adapter,
    split_layers,
    write_adapter,
)
from comfyui_trilora.trilora_ops.factors import LowRank, canonicalise, is_canonical, spectrum
from comfyui_trilora.trilora_ops.files.low_rank import PAIRS
from comfyui_trilora.trilora_ops.one_alpha import LARGEST, one_alpha

SHAPES = {"a.to_q": (17, 6), "a.to_out.0": (5, 23), "b.conv": (9, 7, 3, 2), "b.time": (11, 4, 3), "c.block.video": (3, 5, 1, 2, 2), "d": (30, 31)}
DTYPES = {"fp32": (torch.float32, 1e-6), "fp16": (torch.float16, 1e-3), "bf16": (torch.bfloat16, 8e-3)}
WRITERS = {"kohya": canonical_state, "peft": peft_state}


def foreign(up: str, down: str, rank: int, with_alpha: bool) -> AdapterState:
    """A random adapter under other endings."""
    ours = random_adapter(SHAPES, rank)
    tensors = {name.replace(".lora_up.weight", up).replace(".lora_down.weight", down): tensor for name, tensor in ours.items()}
    return AdapterState({key: tensor for key, tensor in tensors.items() if with_alpha or not key.endswith(".alpha")})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("with_alpha", [True, False], ids=["alpha", "no alpha"])
@pytest.mark.parametrize(("up", "down"), PAIRS, ids=[up for up, _ in PAIRS])
def test_round_trip(tmp_path, up, down, with_alpha, writer, dtype):
    """Of every form in which pairs come, in either of our forms, twice in a row."""
    state, (dtype, tolerance) = foreign(up, down, 4, with_alpha), DTYPES[dtype]
    expected = file_deltas(state)
    first = read_adapter(write_adapter(tmp_path / "first.safetensors", WRITERS[writer](state), dtype))
    assert_same(file_deltas(first), expected, tolerance)
    kernels = {name: layer.kernel for name, layer in split_layers(first)[0].items()}
    assert kernels == {name: SHAPES[name][2:] for name in expected}
    for again in WRITERS.values():
        second = read_adapter(write_adapter(tmp_path / f"{again.__name__}.safetensors", again(first), dtype))
        assert_same(file_deltas(second), expected, 2 * tolerance)


@pytest.mark.parametrize("rank", [1, 4, 40])
def test_our_files_have_one_alpha(rank):
    """Whatever alphas and ranks came in; in both forms the tensors say all, and no metadata of others are kept that say otherwise."""
    state = canonical_state(random_adapter(SHAPES, rank))
    layers, rest = split_layers(state)
    assert not rest and len({float(tensor) for key, tensor in state.items() if key.endswith(".alpha")}) == 1
    assert max(float(layer.pair.up.norm(dim=0).max()) for layer in layers.values()) <= 1.5 * LARGEST
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in peft_state(state))


def test_a_file_of_ours_from_before_gets_one_alpha_too():
    """Canonical already, and marked so, but with an alpha for each layer: only that changes."""
    pairs = {"a": canonicalise(LowRank(draw(9, 3), draw(3, 8), 4.0)), "b": canonicalise(LowRank(draw(7, 3), draw(3, 5), 0.01))}
    marked = canonical_state(random_adapter({"a": (9, 8), "b": (7, 5)}))
    state = AdapterState({f"{name}{end}": value for name, pair in pairs.items() for end, value in (
        (".lora_up.weight", pair.up), (".lora_down.weight", pair.down), (".alpha", torch.tensor(pair.alpha)))}, marked.metadata)  # fmt: skip
    assert state.canonical
    result = canonical_state(state)
    assert canonical_state(result) is result and result["a.alpha"] == result["b.alpha"]
    assert torch.equal(result["a.lora_down.weight"], state["a.lora_down.weight"])
    assert_same(file_deltas(result), file_deltas(state), 1e-7)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 2, 1), (5, 3, 7)], ids=str)
def test_one_alpha_keeps_products_and_canonical_form(ranks):
    """Exactly where ranks differ by powers of two; else to one rounding, and then the scales are no powers of two."""
    pairs = {str(n): canonicalise(LowRank(draw(12, r, seed=n), draw(r, 9, seed=n + 9), 100.0**-n)) for n, r in enumerate(ranks)}
    result = one_alpha(pairs)
    assert len({pair.alpha for pair in pairs.values()}) == 3 and len({pair.alpha for pair in result.values()}) == 1
    exact = all(r & (r - 1) == 0 for r in ranks)
    for name, pair in pairs.items():
        assert torch.equal(result[name].down, pair.down)
        torch.testing.assert_close(spectrum(result[name]), spectrum(pair), rtol=0 if exact else 3e-7, atol=0)
        torch.testing.assert_close(result[name].dense(), pair.dense(), rtol=1e-6, atol=1e-7 * float(spectrum(pair)[0]))
        assert not exact or is_canonical(result[name])


@pytest.mark.parametrize("alphas", [(1.0,), (2.0, 2.0)], ids=str)
def test_one_alpha_leaves_what_has_one(alphas):
    pairs = {str(n): LowRank(draw(5, 2), draw(2, 4), alpha / 2) for n, alpha in enumerate(alphas)}
    assert one_alpha(pairs) == pairs


def test_one_alpha_of_nothing_trained():
    """Zero layers, beside each other or beside others, stay zero."""
    zero = {str(r): canonicalise(LowRank(torch.zeros(6, r), draw(r, 5), 1.0)) for r in (1, 3)}
    for pairs in (zero, zero | {"x": canonicalise(LowRank(draw(6, 2), draw(2, 5)))}):
        result = one_alpha(pairs)
        assert len({pair.alpha for pair in result.values()}) == 1
        for name, pair in pairs.items():
            torch.testing.assert_close(result[name].dense(), pair.dense())


@pytest.mark.parametrize(("ratio", "error"), [(1.0, 1e-3), (1e-3, 1.5e-3), (1e-4, 3e-3)])
def test_a_weak_layer_keeps_its_digits_in_fp16(ratio, error):
    """What one alpha for all layers costs the weakest of them in half precision."""
    strong, weak = (canonicalise(LowRank(draw(640, 8, seed=n), draw(8, 320, seed=n + 9))) for n in (0, 1))
    weak = dataclasses.replace(weak, scale=weak.scale * ratio)
    found = one_alpha({"strong": strong, "weak": weak})["weak"]
    half = LowRank(found.up.half(), found.down.half(), found.scale).dense()
    assert float((half - weak.dense()).norm() / weak.dense().norm()) <= error
