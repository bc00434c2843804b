"""peft, both ways: what it saves is read with the delta it merges; what we save in its keys gives it the same delta."""

import pytest
import torch
from comfyui_trilora.tests.interchange.small_models import (
    ADAPTED,
    KERNELS,
    Small,
    added,
    assert_same,
    copies,
    draw,
    file_deltas,
    randomise,
)
from comfyui_trilora.trilora_ops.checkpoint import (
    canonical_state,
    peft_state,
    read_adapter,
    split_layers,
    write_adapter,
)
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.resize import resize

WRAPPER = "base_model.model."
OPTIONS = {
    "alpha = r": {"r": 3, "lora_alpha": 3},
    "alpha = 2 r": {"r": 3, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 3, "lora_alpha": 2, "rank_pattern": {"conv1": 2}, "alpha_pattern": {"conv1": 5, "down_blocks.1.attn.to_q": 1}},
    "an anchored pattern": {"r": 2, "lora_alpha": 2, "alpha_pattern": {"^down_blocks.0.conv1": 7}},
}


@pytest.fixture(scope="session")
def peft():
    import peft

    return peft


def trained(peft, **options):
    """(model wrapped by peft with random adapters, its weights before)."""
    base = Small()
    before = copies(base)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=list(ADAPTED), init_lora_weights=False, **options))
    randomise(p for p in model.parameters() if p.requires_grad)
    return model, before


def saved(peft, folder, **options):
    """(the file that peft saves, the deltas that peft merges, by the file's names)."""
    model, before = trained(peft, **options)
    model.save_pretrained(folder)
    deltas = added(before, copies(model.merge_and_unload()))
    return folder / "adapter_model.safetensors", {WRAPPER + name: delta for name, delta in deltas.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_file_of_peft_is_read_as_peft_merges_it(peft, tmp_path, options):
    """And so is its canonical copy, alone in another place."""
    path, expected = saved(peft, tmp_path, **options)
    assert set(expected) == {WRAPPER + name for name in ADAPTED}
    state = read_adapter(path)
    assert_same(file_deltas(state), expected)
    assert {name: layer.kernel for name, layer in split_layers(state)[0].items()} == {WRAPPER + n: k for n, k in KERNELS.items()}
    elsewhere = write_adapter(tmp_path / "loras" / "copy.safetensors", canonical_state(state), torch.float32)
    copy = read_adapter(elsewhere)
    assert copy.canonical and not state.canonical
    assert_same(file_deltas(copy), expected)


def test_trained_by_a_real_step(peft, tmp_path):
    """Not random numbers but what an optimizer leaves."""
    base = Small()
    before = copies(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        layers = [block.attn["to_q"] for block in base.down_blocks]
        sum(layer(draw(5, 6)).square().mean() for layer in layers).backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    expected = {WRAPPER + name: delta for name, delta in added(before, copies(model.merge_and_unload())).items()}
    assert len(expected) == 2
    assert_same(file_deltas(read_adapter(tmp_path / "adapter_model.safetensors")), expected, 1e-5)


def test_the_tensors_alone_do_not_hold_alpha(peft, tmp_path):
    """A file that has lost its adapter_config.json is read as every other loader reads it, at scale 1."""
    path, expected = saved(peft, tmp_path, r=3, lora_alpha=6)
    (tmp_path / "adapter_config.json").unlink()
    assert_same(file_deltas(read_adapter(path)), {name: delta / 2 for name, delta in expected.items()})


def test_the_configuration_of_another_file_is_not_read(peft, tmp_path):
    path, expected = saved(peft, tmp_path, r=3, lora_alpha=6)
    other = path.rename(tmp_path / "mine.safetensors")
    assert_same(file_deltas(read_adapter(other)), {name: delta / 2 for name, delta in expected.items()})


BROKEN = {
    "no JSON": "{",
    "a list": "[1]",
    "nested without end": "[" * 100_000,
    "true for alpha": '{"lora_alpha": true}',
    "patterns in a list": '{"lora_alpha": 1, "alpha_pattern": [2]}',
    "a word for alpha": '{"lora_alpha": "big"}',
    "alpha 0": '{"lora_alpha": 0}',
    "alpha NaN": '{"lora_alpha": NaN}',
    "a pattern that is not read": '{"lora_alpha": 1, "alpha_pattern": {"(?=a)b": 2}}',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_configuration_that_cannot_be_understood_is_an_error(peft, tmp_path, text):
    path, _ = saved(peft, tmp_path, r=3, lora_alpha=6)
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(TriLoRAError, match=r"adapter_model.safetensors: .*(expected|alpha_pattern)"):
        read_adapter(path)


def test_dora_is_not_taken_for_plain_low_rank(peft, tmp_path):
    """With a magnitude beside them up and down are not the delta: such a layer stays as it is, whole."""
    path, _ = saved(peft, tmp_path, r=3, lora_alpha=3, use_dora=True)
    state = read_adapter(path)
    layers, rest = split_layers(state)
    assert layers == {} and rest.keys() == state.keys() and len(rest) == 3 * len(ADAPTED)
    result = canonical_state(state)
    assert not result.canonical and result.keys() == state.keys() and all(result[key] is state[key] for key in state)


def best(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of a rank."""
    U, sigma, Vt = torch.linalg.svd(delta.double(), full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vt[:rank]


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("way", ["load_adapter", "set_peft_model_state_dict"])
def test_peft_reads_what_we_have_resized(peft, tmp_path, way, dtype, rank):
    """In its keys and without any alpha: with lora_alpha = r, which is then the scale, its delta is the truncated one."""
    path, deltas = saved(peft, tmp_path / "theirs", r=4, lora_alpha=6)
    smaller, _ = resize(read_adapter(path), rank=rank)
    ours = write_adapter(tmp_path / "ours" / "adapter_model.safetensors", peft_state(smaller), torch.float16 if dtype == "fp16" else torch.float32)
    assert_same(file_deltas(read_adapter(ours)), {name: best(delta, rank) for name, delta in deltas.items()}, 3e-6 if dtype == "fp32" else 2e-3)
    base = Small()
    before = copies(base)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ADAPTED))
    if way == "load_adapter":
        config.save_pretrained(ours.parent)
        model = peft.PeftModel.from_pretrained(base, ours.parent)
    else:
        model = peft.get_peft_model(base, config)
        result = peft.set_peft_model_state_dict(model, dict(read_adapter(ours)))
        assert result.unexpected_keys == []
    found = {WRAPPER + name: delta for name, delta in added(before, copies(model.merge_and_unload())).items()}
    assert_same(found, file_deltas(read_adapter(ours)), 3e-6)


def test_layers_of_different_ranks_go_back_to_peft(peft, tmp_path):
    """Cut by energy every layer has a rank of its own; peft takes them with a rank_pattern and the same alpha_pattern."""
    path, _ = saved(peft, tmp_path / "theirs", r=4, lora_alpha=6)
    smaller, report = resize(read_adapter(path), energy=0.9)
    ranks = {change.name.removeprefix(WRAPPER): change.after for change in report.layers}
    assert len(set(ranks.values())) > 1
    ours = write_adapter(tmp_path / "ours.safetensors", peft_state(smaller), torch.float32)
    base = Small()
    before = copies(base)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=list(ADAPTED), rank_pattern=ranks, alpha_pattern=ranks))
    peft.set_peft_model_state_dict(model, dict(read_adapter(ours)))
    found = {WRAPPER + name: delta for name, delta in added(before, copies(model.merge_and_unload())).items()}
    assert_same(found, file_deltas(smaller), 3e-6)
