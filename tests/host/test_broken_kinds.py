"""Files that are almost right: each node refuses them in one sentence, or computes finite numbers, and nothing is half-applied."""

import os
import random

import pytest
import torch
from comfyui_trilora.tests.fuzz import files, mutations, nodes
from comfyui_trilora.tests.host.adapter_files import CONV, LINEAR
from comfyui_trilora.tests.host.foreign_writers import weight_of
from comfyui_trilora.tests.host.tiny_run import list_saved_adapters, weights_hash

UP, DOWN = f"{LINEAR}.lora_up.weight", f"{LINEAR}.lora_down.weight"
CONV_UP, CONV_DOWN = f"{CONV}.lora_up.weight", f"{CONV}.lora_down.weight"
REFUSED, FINE = "refused", "fine"


def n(*shape):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


PAIR = {UP: n(128, 3), DOWN: n(3, 128)}
OTHER = {CONV.replace("in_layers.2", "out_layers.3") + ".lora_up.weight": n(128, 2, 1, 1), CONV.replace("in_layers.2", "out_layers.3") + ".lora_down.weight": n(2, 128, 3, 3)}
RING = {f"{LINEAR}.transform.m": torch.ones(128), f"{LINEAR}.residual.up": n(128, 2), f"{LINEAR}.residual.down": n(2, 128)}
RESHAPE = f"{LINEAR}.reshape_weight"
# what is wrong -> (tensors, what the Loader does)
CASES = {
    "reshape to a number": (PAIR | {RESHAPE: torch.tensor(7)}, REFUSED),
    "reshape to floats": (PAIR | {RESHAPE: torch.tensor([130.0, 128.0])}, REFUSED),
    "reshape to a matrix": (PAIR | {RESHAPE: torch.tensor([[130, 128]])}, REFUSED),
    "reshape to 4 TB": (PAIR | {RESHAPE: torch.tensor([10**6, 10**6])}, REFUSED),
    "reshape to 4 TB with factors of that size": ({UP: n(10**5, 1), DOWN: n(1, 10**5), RESHAPE: torch.tensor([10**5, 10**5])}, REFUSED),
    "reshape to other sizes than the factors": (PAIR | {RESHAPE: torch.tensor([40000, 128])}, REFUSED),
    "reshape to one axis more": (PAIR | {RESHAPE: torch.tensor([130, 128, 1])}, REFUSED),
    "reshape to nothing": (PAIR | {RESHAPE: torch.tensor([], dtype=torch.int64)}, REFUSED),
    "reshape of rank 0": ({UP: n(130, 0), DOWN: n(0, 128), RESHAPE: torch.tensor([130, 128])}, REFUSED),
    "reshape": ({UP: n(130, 2), DOWN: n(2, 140), RESHAPE: torch.tensor([130, 140])}, FINE),
    "BOFT without alpha": (OTHER | {f"{LINEAR}.oft_blocks": n(3, 32, 4, 4)}, FINE),
    "BOFT with more stages than rows": (OTHER | {f"{LINEAR}.oft_blocks": n(9, 32, 4, 4)}, REFUSED),
    "BOFT of blocks of 1 x 1": (OTHER | {f"{LINEAR}.oft_blocks": n(16, 8, 1, 1)}, REFUSED),
    "OFT, rescale of another size": (OTHER | {f"{LINEAR}.oft_blocks": n(32, 4, 4), f"{LINEAR}.alpha": torch.tensor(1.0), f"{LINEAR}.rescale": n(7, 1)}, REFUSED),
    "OFT, blocks of 1 x 1": ({f"{LINEAR}.oft_blocks": n(128, 1, 1)}, FINE),
    "OFT of complex numbers": (OTHER | {f"{LINEAR}.oft_blocks": torch.randn(32, 4, 4, dtype=torch.complex64), f"{LINEAR}.alpha": torch.tensor(1.0)}, REFUSED),
    "OFT of huge blocks, which turn everything round": ({f"{LINEAR}.oft_blocks": 1e30 * n(32, 4, 4)}, FINE),
    "residual.scale of two": (RING | {f"{LINEAR}.residual.scale": torch.tensor([1.0, 2.0])}, REFUSED),
    "residual.up a vector": (RING | {f"{LINEAR}.residual.up": n(128), f"{LINEAR}.residual.scale": torch.tensor(1.0)}, REFUSED),
    "residual.down a vector": (RING | {f"{LINEAR}.residual.down": n(128), f"{LINEAR}.residual.scale": torch.tensor(1.0)}, REFUSED),
    "a transform that overflows": (RING | {f"{LINEAR}.transform.m": torch.full((128,), 1e38), f"{LINEAR}.residual.scale": torch.tensor(1.0)}, REFUSED),
    "a residual that overflows": (RING | {f"{LINEAR}.residual.up": torch.full((128, 2), 1e30), f"{LINEAR}.residual.scale": torch.tensor(1e15)}, REFUSED),
    "Tucker core, a vector for up": ({CONV_UP: n(128), CONV_DOWN: n(4, 128, 1, 1), f"{CONV}.lora_mid.weight": n(4, 4, 3, 3)}, REFUSED),
    "Tucker core of rank 0": ({CONV_UP: n(128, 0, 1, 1), CONV_DOWN: n(4, 128, 1, 1), f"{CONV}.lora_mid.weight": n(0, 4, 3, 3)}, REFUSED),
    "Tucker core of another kernel": ({CONV_UP: n(128, 4, 1, 1), CONV_DOWN: n(4, 128, 1, 1), f"{CONV}.lora_mid.weight": n(4, 4, 1, 9)}, REFUSED),
    "a core of one number on a linear layer": (OTHER | {UP: n(128, 4), DOWN: n(4, 128), f"{LINEAR}.lora_mid.weight": n(4, 4, 1)}, FINE),
    "a core on a linear layer": (OTHER | {UP: n(128, 4), DOWN: n(4, 128), f"{LINEAR}.lora_mid.weight": n(4, 4, 3, 3)}, REFUSED),
    "GLoRA of numbers": ({f"{LINEAR}.{a}.weight": torch.tensor(1.0) for a in ("a1", "a2", "b1", "b2")}, REFUSED),
    "LoHa with an axis of one": ({f"{LINEAR}.hada_w1_a": n(128, 4, 1), f"{LINEAR}.hada_w1_b": n(4, 128, 1), f"{LINEAR}.hada_w2_a": n(128, 4), f"{LINEAR}.hada_w2_b": n(4, 128)}, FINE),
    "LoHa of three axes": ({f"{LINEAR}.hada_w1_a": n(128, 4, 2), f"{LINEAR}.hada_w1_b": n(4, 128), f"{LINEAR}.hada_w2_a": n(128, 4), f"{LINEAR}.hada_w2_b": n(4, 128)}, REFUSED),
    "LoHa of rank 0": ({f"{LINEAR}.hada_w1_a": n(128, 0), f"{LINEAR}.hada_w1_b": n(0, 128), f"{LINEAR}.hada_w2_a": n(128, 0), f"{LINEAR}.hada_w2_b": n(0, 128)}, REFUSED),
    "LoKr of three axes": ({f"{LINEAR}.lokr_w1": n(8, 8), f"{LINEAR}.lokr_w2_a": n(16, 4, 3), f"{LINEAR}.lokr_w2_b": n(4, 16, 1)}, REFUSED),
    "LoKr of flat factors, as ComfyUI's trainer writes it": ({f"{CONV}.lokr_w1": n(8, 9), f"{CONV}.lokr_w2": n(16, 128)}, FINE),
    "alpha of 1e300": (PAIR | {f"{LINEAR}.alpha": torch.tensor(1e300, dtype=torch.float64)}, REFUSED),
    "alpha of 3e38": (PAIR | {f"{LINEAR}.alpha": torch.tensor(3e38)}, REFUSED),
    "alpha of 1e18": (PAIR | {f"{LINEAR}.alpha": torch.tensor(1e18)}, REFUSED),
    "alpha complex": (PAIR | {f"{LINEAR}.alpha": torch.tensor(1 + 2j)}, REFUSED),
    "alpha of two numbers": (PAIR | {f"{LINEAR}.alpha": torch.ones(2)}, REFUSED),
    "alpha true": (PAIR | {f"{LINEAR}.alpha": torch.tensor(True)}, FINE),
    "alpha 0": (PAIR | {f"{LINEAR}.alpha": torch.tensor(0.0)}, FINE),
    "1e30 times 1e30": ({UP: torch.full((128, 3), 1e30), DOWN: torch.full((3, 128), 1e30)}, REFUSED),
    "1e30 times 1e30 times 1e-60": ({UP: torch.full((128, 3), 1e30), DOWN: torch.full((3, 128), 1e30), f"{LINEAR}.alpha": torch.tensor(1e-58, dtype=torch.float64)}, REFUSED),
    "1e30 times 1e-30": ({UP: torch.full((128, 3), 1e30), DOWN: torch.full((3, 128), 1e-32)}, FINE),
    "LoKr that overflows": ({f"{LINEAR}.lokr_w1": 1e30 * torch.ones(8, 8), f"{LINEAR}.lokr_w2": 1e30 * torch.ones(16, 16)}, REFUSED),
    "LoHa that overflows": ({f"{LINEAR}.hada_w{i}_{a}": 1e10 * torch.ones(*shape) for i in (1, 2) for a, shape in (("a", (128, 2)), ("b", (2, 128)))}, REFUSED),
    "GLoRA that overflows": ({f"{LINEAR}.{a}.weight": 1e20 * torch.ones(*shape) for a, shape in (("a1", (128, 2)), ("a2", (2, 128)), ("b1", (128, 2)), ("b2", (2, 128)))}, REFUSED),
    "magnitudes of 1e38": (PAIR | {f"{LINEAR}.dora_scale": torch.full((128, 1), 1e38)}, REFUSED),
    "magnitudes of 0": (PAIR | {f"{LINEAR}.dora_scale": torch.zeros(128, 1)}, FINE),
    "a difference of 1e38": ({f"{LINEAR}.diff": torch.full((128, 128), 1e38)}, REFUSED),
    "small factors of a matrix of 4 TB": ({UP: torch.full((10**6, 1), 1e10), DOWN: torch.full((1, 10**6), 1e10)}, REFUSED),
    "LoKr of a matrix of 4 TB": ({f"{LINEAR}.lokr_w1": torch.full((1000, 1000), 1e3), f"{LINEAR}.lokr_w2": torch.full((1000, 1000), 1e3)}, REFUSED),
    "GLoRA of a matrix of 4 TB": ({f"{LINEAR}.{a}.weight": torch.full(shape, 1e6) for a, shape in
                                   (("a1", (10**6, 1)), ("a2", (1, 10**6)), ("b1", (10**6, 1)), ("b2", (1, 10**6)))}, REFUSED),
    "complex factors": ({UP: torch.randn(128, 3, dtype=torch.complex64), DOWN: torch.randn(3, 128, dtype=torch.complex64)}, REFUSED),
    "complex NaN": ({UP: torch.full((128, 3), complex("nan")), DOWN: torch.randn(3, 128, dtype=torch.complex64)}, REFUSED),
    "integer factors": ({UP: torch.ones(128, 3, dtype=torch.int64), DOWN: torch.ones(3, 128, dtype=torch.int64)}, REFUSED),
    "boolean factors": ({UP: torch.ones(128, 3, dtype=torch.bool), DOWN: torch.ones(3, 128, dtype=torch.bool)}, REFUSED),
    "integers for a weight": ({f"{LINEAR}.set_weight": torch.ones(128, 128, dtype=torch.int32)}, REFUSED),
    "half a LoRA": ({UP: n(128, 3)}, REFUSED), "half a LoHa": ({f"{LINEAR}.hada_w2_b": n(3, 128)}, REFUSED), "AdaLoRA": (PAIR | {f"{LINEAR}.lora_E": n(3, 1)}, REFUSED),
    "PEFT's OFT alone": ({f"{LINEAR}.oft_R.weight": n(16, 28)}, REFUSED), "PEFT's OFT beside a LoRA": (PAIR | {f"{LINEAR}.oft_R.weight": n(16, 28)}, FINE),
    "PEFT's OFT on another layer than a LoRA": (OTHER | {f"{LINEAR}.oft_R.weight": n(16, 28)}, FINE),
    "a key of 100,000 letters": ({"a" * 100_000: n(1)}, REFUSED), "a layer of 100,000 letters": ({"a" * 100_000 + ".lora_up.weight": n(3, 2)}, REFUSED),
    "a layer of 100,000 letters beside another": (PAIR | {"a" * 100_000 + ".lora_up.weight": n(3, 2), "a" * 100_000 + ".lora_down.weight": n(2, 3)}, FINE),
    "8-bit factors": ({UP: n(128, 3).to(torch.float8_e4m3fn), DOWN: n(3, 128).to(torch.float8_e4m3fn)}, FINE),
    "double factors": ({UP: n(128, 3).double(), DOWN: n(3, 128).double()}, FINE),
    "double factors beyond single": ({UP: n(128, 3).double() * 1e200, DOWN: n(3, 128).double()}, REFUSED),
}  # fmt: skip


@pytest.fixture
def check(host_nodes, tiny, error):
    """Function: tensors -> way -> "ok" or the refusal; the base is untouched."""
    before = weights_hash(tiny.patcher)
    yield lambda tensors: nodes.check(host_nodes, tiny.patcher, error, tensors, list_saved_adapters() / "broken.safetensors")
    assert weights_hash(tiny.patcher) == before
    for file in list_saved_adapters().glob("fuzzed_*"):
        file.unlink()


@pytest.mark.parametrize("case", CASES)
def test_almost_a_layer(check, case, caplog):
    tensors, expected = CASES[case]
    outcomes = check(tensors)
    assert (outcomes["Loader"] == "ok") == (expected == FINE), outcomes["Loader"]
    assert outcomes["Loader"] == outcomes["keep_rank"] == outcomes["block weights"]
    if expected == REFUSED:
        assert outcomes["Loader"].startswith("broken.safetensors: ") and outcomes["Bake"] != "ok"
    assert max((len(record.getMessage()) for record in caplog.records), default=0) <= 1000


@pytest.mark.parametrize(("case", "words"), [
    ("half a LoRA", r"lora_down.weight is missing, the other half of .*lora_up.weight"), ("half a LoHa", r"hada_w1_a is missing, the other half of .*hada_w2_b"),
    ("PEFT's OFT alone", "holds PEFT's OFT .* not supported"), ("AdaLoRA", "AdaLoRA, whose scale only its configuration tells"), ("1e30 times 1e30", "multiply to numbers beyond 65504"),
])  # fmt: skip
def test_the_reason_is_said(check, case, words):
    import re

    assert re.search(words, check(CASES[case][0])["Loader"])


def test_an_alpha_of_zero_is_said(tiny, pack_module):
    notices = pack_module("nodes.notices")
    with notices.collected() as said:
        pack_module("nodes.comfy_patches").patches_from_state(pack_module("trilora_ops.checkpoint").AdapterState(CASES["alpha 0"][0]), tiny.patcher, None, "a file")
    assert said == [f"a file: an alpha of 0, with which a layer changes nothing, in 1 layer ({LINEAR})"]


def test_peft_oft_beside_a_lora_is_named(host_nodes, tiny, pack_module, caplog):
    """The LoRA applies, and what does not is said where the person looks."""
    notices = pack_module("nodes.notices")
    with notices.collected() as said:
        found = pack_module("nodes.comfy_patches").patches_from_state(pack_module("trilora_ops.checkpoint").AdapterState(CASES["PEFT's OFT beside a LoRA"][0]), tiny.patcher, None, "a file")
    assert list(found) == [f"{LINEAR}.weight"]
    assert said == [f"a file: 1 tensor of PEFT's OFT without its adapter_config.json, which is not supported, left out ({LINEAR}.oft_R.weight)"]


@pytest.mark.parametrize("seed", range(int(os.environ.get("TRILORA_FUZZ", "40"))))
def test_files_with_random_faults(check, tiny, seed):
    """The same that tests/fuzz does for hours."""
    rng = random.Random(seed)
    names = (LINEAR, CONV, LINEAR.replace("attn1.to_q", "ff.net.2"), LINEAR.replace("attn1.to_q", "norm1"), CONV.replace("in_layers.2", "emb_layers.1"))
    tensors, faults = mutations.mutated(rng, files.file(rng, {name: tuple(weight_of(tiny.patcher, f"{name}.weight").shape) for name in names}))
    try:
        check(tensors)
    except Exception as error:
        told = {key[:90]: (tuple(tensor.shape), str(tensor.dtype)) for key, tensor in tensors.items()}
        raise AssertionError(f"{faults}: {type(error).__name__}: {error}; {told}") from error
