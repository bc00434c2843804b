"""The adapter file: writing, strict reading of ours, refusing what is broken, and what never happens to a file on disk."""

import errno
import os
import re

import pytest
import torch
from comfyui_trilora.trilora_ops import atomic_files, checkpoint
from comfyui_trilora.trilora_ops.atomic_files import NameTaken
from comfyui_trilora.trilora_ops.checkpoint import (
    AdapterState,
    FileLayer,
    canonical_state,
    read_adapter,
    split_layers,
    write_adapter,
)
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.factors import LowRank, canonicalise
from comfyui_trilora.trilora_ops.one_alpha import one_alpha
from safetensors.torch import load_file, save_file

MARK = {"trilora.format": "trilora", "trilora.version": "1", "trilora.form": "svd"}
LINEAR, CONV = "diffusion_model.a", "diffusion_model.b.c"


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter_state(metadata=None, seed=0) -> AdapterState:
    """A linear layer of 7x12 and a convolution of 5x(4*3*2), in canonical form."""
    linear = canonicalise(LowRank(draw(7, 3, seed=seed), draw(3, 12, seed=seed + 1), 0.01))
    conv = canonicalise(LowRank(draw(5, 2, seed=seed + 2), draw(2, 24, seed=seed + 3), 2.0))
    pairs = one_alpha({LINEAR: linear, CONV: conv})
    tensors = FileLayer(pairs[LINEAR]).tensors(LINEAR) | FileLayer(pairs[CONV], (3, 2)).tensors(CONV)
    return AdapterState(tensors, MARK if metadata is None else metadata)


def data_of(path) -> bytes:
    """The tensors of a safetensors file, without the header."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little"):]


def broken_file(tmp_path, change, metadata=None):
    """A file of ours as another program might have left it."""
    state = dict(adapter_state())
    change(state)
    path = tmp_path / "broken.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata=MARK if metadata is None else metadata)
    return path


def refusal(action, *words) -> str:
    """The message of the one error that `action` must raise; it is one line and holds all `words`."""
    with pytest.raises(TriLoRAError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not re.search(r"\.\s+[A-Z]", message), f"more than one sentence: {message}"
    return message


def test_shapes_are_what_loaders_expect():
    state = adapter_state()
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        f"{LINEAR}.lora_up.weight": (7, 3), f"{LINEAR}.lora_down.weight": (3, 12), f"{LINEAR}.alpha": (),
        f"{CONV}.lora_up.weight": (5, 2, 1, 1), f"{CONV}.lora_down.weight": (2, 4, 3, 2), f"{CONV}.alpha": (),
    }  # fmt: skip
    layers, rest = split_layers(state)
    assert layers[CONV].kernel == (3, 2) and layers[LINEAR].kernel == () and not rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_round_trip(tmp_path, dtype):
    """Tensors come back bit by bit in the dtype asked for, alpha in fp32, the metadata as they were."""
    state = adapter_state({**MARK, "note": "ünïcode \"quoted\""})
    path = write_adapter(tmp_path / "new" / "a.safetensors", state, dtype)
    back = read_adapter(path)
    assert path.parent == tmp_path / "new" and os.listdir(path.parent) == ["a.safetensors"]
    assert back.metadata == state.metadata and back.keys() == state.keys() and back.canonical
    for key, tensor in state.items():
        expected = tensor if key.endswith(".alpha") else tensor.to(dtype)
        assert back[key].dtype == expected.dtype and torch.equal(back[key], expected), key


def test_writing_takes_any_memory_layout(tmp_path):
    """Transposed, sliced and gradient-carrying tensors, whole numbers, and a marked file's half precision."""
    state = AdapterState({"a.t": draw(4, 6).t(), "a.s": draw(4, 6)[:2], "a.g": draw(3, 2).requires_grad_(), "a.i": torch.arange(4)})
    back = load_file(write_adapter(tmp_path / "a.safetensors", state, torch.float32))
    assert all(torch.equal(back[key], state[key].detach()) for key in state) and back["a.i"].dtype == torch.int64


def test_a_marked_file_passes_unchanged(tmp_path):
    """Loaded, brought into canonical form and saved once more, it is the same file (its metadata have no order)."""
    first = write_adapter(tmp_path / "a.safetensors", adapter_state(), torch.float16)
    state = read_adapter(first)
    assert canonical_state(state) is state
    second = write_adapter(tmp_path / "b.safetensors", canonical_state(read_adapter(first)), torch.float16)
    assert data_of(first) == data_of(second) and read_adapter(second).metadata == state.metadata


def test_an_unmarked_file_is_brought_into_canonical_form():
    """Its delta is kept and its own metadata too; kinds that are not plain low rank stay, and then it gets no mark."""
    foreign = AdapterState({"x.lora_B.weight": draw(7, 4), "x.lora_A.weight": draw(4, 9, seed=1), "x.alpha": torch.tensor(2.0)}, {"ss_note": "kept"})
    result = canonical_state(foreign)
    assert sorted(result) == ["x.alpha", "x.lora_down.weight", "x.lora_up.weight"]
    assert result.canonical and result.metadata == {"ss_note": "kept", **MARK}
    dense = split_layers(result)[0]["x"].pair.dense()
    torch.testing.assert_close(dense, 0.5 * draw(7, 4) @ draw(4, 9, seed=1), atol=1e-6, rtol=1e-5)
    other = AdapterState({**foreign, "y.diff": draw(3)})
    mixed = canonical_state(other)
    assert torch.equal(mixed["y.diff"], other["y.diff"]) and not mixed.canonical and "trilora.format" not in mixed.metadata


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda s: s.update({"extra.diff": draw(3)}), ["unknown: extra.diff"]),
     (lambda s: s.update({f"{LINEAR}.transform.0": draw(3)}), [f"unknown: {LINEAR}.transform.0"]),
     (lambda s: s.pop(f"{LINEAR}.lora_up.weight"), [f"missing: {LINEAR}.lora_up.weight"]),
     (lambda s: s.pop(f"{CONV}.lora_down.weight"), [f"missing: {CONV}.lora_down.weight"]),
     (lambda s: s.pop(f"{LINEAR}.alpha"), [f"missing: {LINEAR}.alpha"]),
     (lambda s: s.update({f"{LINEAR}.lora_up.weight": draw(7, 4)}), [f"{LINEAR}.lora_up.weight", "(7, 4)", "(3, 12)"]),
     (lambda s: s.update({f"{LINEAR}.lora_up.weight": draw(7)}), [f"{LINEAR}.lora_up.weight", "(7,)"]),
     (lambda s: s.update({f"{CONV}.alpha": draw(2)}), [f"{CONV}.alpha", "(2,)", "one number"]),
     (lambda s: s[f"{CONV}.lora_down.weight"].view(-1)[3].fill_(float("nan")), [f"{CONV}.lora_down.weight", "NaN"]),
     (lambda s: s[f"{LINEAR}.alpha"].fill_(float("inf")), [f"{LINEAR}.alpha", "infinite"])],
    ids=["unknown", "unknown-ending", "no-up", "no-down", "no-alpha", "wrong-rank", "one-axis", "alpha-shape", "nan", "inf"],
)  # fmt: skip
def test_a_damaged_file_of_ours_is_refused(tmp_path, change, words):
    path = broken_file(tmp_path, change)
    refusal(lambda: read_adapter(path), "broken.safetensors", *words)


def test_the_same_file_undamaged_is_read(tmp_path):
    assert len(read_adapter(broken_file(tmp_path, lambda state: None))) == 6


@pytest.mark.parametrize("version", ["2", "", None])
def test_another_version_is_refused(tmp_path, version):
    metadata = {**MARK, "trilora.version": version} if version is not None else {"trilora.format": "trilora"}
    path = broken_file(tmp_path, lambda state: None, metadata)
    refusal(lambda: read_adapter(path), "broken.safetensors", f"trilora.version={version!r}", "version 1", "update")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=["fp16", "fp8"])
def test_nan_in_foreign_files_is_refused_in_every_dtype(tmp_path, dtype):
    values = draw(4, 3)
    values[1, 2] = float("nan")
    path = tmp_path / "foreign.safetensors"
    save_file({"x.lora_up.weight": values.to(dtype)}, path)
    refusal(lambda: read_adapter(path), "foreign.safetensors", "x.lora_up.weight", "NaN")


@pytest.mark.parametrize("keep", [0, 5, 100, -10], ids=["empty", "in-length", "in-header", "in-data"])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = write_adapter(tmp_path / "cut.safetensors", adapter_state(), torch.float16)
    path.write_bytes(path.read_bytes()[:keep])
    refusal(lambda: read_adapter(path), "cut.safetensors", "damaged or incomplete")


def test_a_missing_file_is_refused(tmp_path):
    refusal(lambda: read_adapter(tmp_path / "gone.safetensors"), "gone.safetensors")


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "a.pth", "a", "a.safetensors.pt"])
def test_files_that_can_run_code_are_not_opened(tmp_path, name, monkeypatch):
    (tmp_path / name).write_bytes(b"\x80\x02")
    monkeypatch.setattr(checkpoint, "safe_open", lambda *a, **k: pytest.fail("opened"))
    refusal(lambda: read_adapter(tmp_path / name), name, "only .safetensors")


@pytest.mark.parametrize(
    ("value", "dtype", "words"), [(1e5, torch.float16, "too large for float16"), (float("nan"), torch.float32, "NaN")], ids=["overflow", "nan"]
)
def test_values_that_cannot_be_stored_are_refused(tmp_path, value, dtype, words):
    state = adapter_state()
    state[f"{CONV}.lora_up.weight"].view(-1)[0] = value
    message = refusal(lambda: write_adapter(tmp_path / "a.safetensors", state, dtype), f"{CONV}.lora_up.weight", words)
    assert os.listdir(tmp_path) == []
    if value != value:  # another dtype is no remedy for NaN
        assert "save the adapter as" not in message
        refusal(lambda: canonical_state(AdapterState(state)), f"{CONV}.lora_up.weight", words)


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"precious")
    refusal(lambda: write_adapter(path, adapter_state(), torch.float16), "a.safetensors", "exists already")
    assert path.read_bytes() == b"precious" and os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, failure):
    """Whatever stops a write, neither the file nor its partial form stays; a fault of the disk is one sentence."""

    def fail(file, content):
        file.write(content[:10])
        raise failure

    monkeypatch.setattr(atomic_files, "_write", fail)
    with pytest.raises(TriLoRAError if isinstance(failure, OSError) else KeyboardInterrupt) as error:
        write_adapter(tmp_path / "a.safetensors", adapter_state(), torch.float16)
    assert os.listdir(tmp_path) == []
    assert isinstance(error.value, KeyboardInterrupt) or "a.safetensors: cannot be written to" in str(error.value)


def test_a_file_appears_only_when_it_is_complete(tmp_path, monkeypatch):
    """Another writer takes the name while this one writes: its file stays, and this one says so."""
    write, seen = atomic_files._write, []

    def race(file, content):
        write(file, content)
        seen.extend(name for name in os.listdir(tmp_path) if name.endswith(".safetensors"))
        (tmp_path / "a.safetensors").write_bytes(b"the other's")

    monkeypatch.setattr(atomic_files, "_write", race)
    with pytest.raises(NameTaken):
        write_adapter(tmp_path / "a.safetensors", adapter_state(), torch.float16)
    assert seen == [] and os.listdir(tmp_path) == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == b"the other's"


def test_alpha_is_exact_in_half_precision():
    """alpha = rank * c would lose bits in bf16; it never is stored so."""
    pair = LowRank(draw(7, 5), draw(5, 9), 2.0**-9 * 1.001)
    tensors = FileLayer(pair).tensors("x")
    assert tensors["x.alpha"].dtype == torch.float32 and tensors["x.alpha"].item() == pytest.approx(5 * pair.scale, rel=1e-7)
