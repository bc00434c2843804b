"""LyCORIS, both ways: its low-rank files are read with the delta it merges, its other kinds pass through us untouched,
and from our files it merges the same delta.
"""

import pytest
import torch
from comfyui_trilora.tests.interchange.small_models import (
    ADAPTED,
    KERNELS,
    Small,
    added,
    assert_same,
    copies,
    file_deltas,
    random_adapter,
    randomise,
)
from comfyui_trilora.trilora_ops.checkpoint import canonical_state, read_adapter, split_layers, write_adapter

PREFIX = "lora_unet"
NAMES = {f"{PREFIX}_{name.replace('.', '_')}": name for name in ADAPTED}


@pytest.fixture
def lycoris():
    """The library, told to adapt the layers that the tests adapt and to name them as kohya's trainer does."""
    import lycoris

    lycoris.LycorisNetwork.apply_preset({"lora_prefix": PREFIX, "target_module": [], "target_name": list(ADAPTED)})
    yield lycoris
    lycoris.LycorisNetwork.apply_preset({"lora_prefix": "lycoris", "target_module": ["Linear", "Conv2d"], "target_name": []})


@pytest.fixture
def saved(lycoris, tmp_path, monkeypatch):
    """Function: options of create_lycoris -> (file that it saves, what it merges into each layer, by the file's names)."""
    # create_lycoris applies a preset of its own choice first
    monkeypatch.setattr(lycoris.LycorisNetwork, "apply_preset", lambda preset: None)

    def save(dtype=torch.float32, **options):
        base = Small()
        if not options["algo"].endswith("oft"):  # which inverts in fp32 alone
            base.double()  # what is added to a weight is then not rounded to the weight's digits
        before = copies(base)
        network = lycoris.create_lycoris(base, 1.0, **{"linear_dim": 3, "linear_alpha": 1.5, "conv_dim": 2, "conv_alpha": 1.5, **options})
        network.apply_to()
        with torch.no_grad():
            randomise(network.parameters(), size=0.3)
            for parameter in network.parameters():  # as the file will hold them, so that the deltas are the file's
                parameter.data = parameter.data.to(dtype).float()
        network.save_weights(str(tmp_path / "lycoris.safetensors"), dtype, {})
        network.restore()
        network.merge_to(1.0)
        deltas = added(before, copies(base))
        return tmp_path / "lycoris.safetensors", {name: deltas[module] for name, module in NAMES.items()}

    return save


LOW_RANK = {"LoRA and LoCon": {"algo": "lora"}, "locon, alpha = rank": {"algo": "locon", "linear_alpha": 3, "conv_alpha": 2}, "rs_lora": {"algo": "lora", "rs_lora": True},
            "a trained scalar": {"algo": "lora", "use_scalar": True}}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("options", LOW_RANK.values(), ids=LOW_RANK)
def test_low_rank_files_are_read_as_lycoris_merges_them(saved, tmp_path, options, dtype):
    path, expected = saved(dtype, **options)
    state = read_adapter(path)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3  # merge_to rounds alpha / rank and the like to the file's dtype
    assert_same(file_deltas(state), expected, tolerance)
    assert {name: layer.kernel for name, layer in split_layers(state)[0].items()} == {name: KERNELS[module] for name, module in NAMES.items()}
    copy = read_adapter(write_adapter(tmp_path / "copy.safetensors", canonical_state(state), dtype))
    assert copy.canonical
    assert_same(file_deltas(copy), expected, tolerance)


OTHERS = {
    "DoRA": {"algo": "lora", "dora_wd": True},
    "Tucker": {"algo": "lora", "use_tucker": True},
    "LoHa": {"algo": "loha"},
    "LoKr": {"algo": "lokr"},
    "LoKr, full matrices": {"algo": "lokr", "full_matrix": True},
    "GLoRA": {"algo": "glora"},
    "diag-OFT": {"algo": "diag-oft"},
    "BOFT": {"algo": "boft", "linear_dim": 8, "conv_dim": 8},
    "full": {"algo": "full"},
    "IA3": {"algo": "ia3"},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_other_kinds_pass_through_untouched(saved, tmp_path, options):
    """Read, canonicalised and saved again, every tensor of such a layer is the same, bit by bit, under its name."""
    path, deltas = saved(**options)
    assert all(delta.any() for delta in deltas.values())
    state = read_adapter(path)
    layers, rest = split_layers(state)
    # Tucker cores make only the convolution more than up * down
    assert {NAMES[name] for name in layers} == {name for name, kernel in KERNELS.items() if not kernel and options.get("use_tucker")}
    again = canonical_state(state)
    assert not again.canonical
    copy = read_adapter(write_adapter(tmp_path / "copy.safetensors", again, torch.float32))
    assert rest and all(torch.equal(copy[key], state[key]) for key in rest)
    if layers:
        assert_same(file_deltas({key: tensor for key, tensor in copy.items() if key not in rest}), {name: deltas[name] for name in layers})


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("rank", [3, 6])
def test_lycoris_merges_our_file(lycoris, tmp_path, rank, dtype):
    """`create_lycoris_from_weights` finds every layer, and merges the delta that we read."""
    base = Small().double()
    before = copies(base)
    foreign = random_adapter({name: tuple(before[module].shape) for name, module in NAMES.items()}, rank)
    path = write_adapter(tmp_path / "ours.safetensors", canonical_state(foreign), torch.float16 if dtype == "fp16" else torch.float32)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), base)
    assert {module.lora_name for module in network.loras} == set(NAMES)
    with torch.no_grad():
        network.merge_to(1.0)
    merged = added(before, copies(base))
    found = {name: merged[module] for name, module in NAMES.items()}
    assert_same(found, file_deltas(read_adapter(path)))
    assert_same(found, file_deltas(foreign), 2e-6 if dtype == "fp32" else 2e-3)
