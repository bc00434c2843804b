"""What Inspect Adapter computes, against dense formulas; and what it draws, for adapters from one layer to hundreds."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_trilora.training.export import export_tensors
from comfyui_trilora.trilora_ops import registry
from comfyui_trilora.trilora_ops.analysis import analyse, by_block, effective_rank
from comfyui_trilora.trilora_ops.registry import Method
from torch import nn

Q = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q"


def draw(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(name, out, inp, rank, kernel=(), alpha=1.5, seed=0, dtype=torch.float32):
    """A plain low-rank layer under kohya's endings, not canonical."""
    return {f"{name}.lora_up.weight": draw((out, rank, *[1] * len(kernel)), seed).to(dtype),
            f"{name}.lora_down.weight": draw((rank, inp, *kernel), seed + 1).to(dtype), f"{name}.alpha": torch.tensor(alpha)}  # fmt: skip


@pytest.mark.parametrize("shape", [(12, 30, 4, ()), (30, 12, 1, ()), (8, 6, 5, (3, 3)), (6, 9, 3, (3,)), (5, 4, 9, ())], ids=str)
def test_singular_values_and_energy_are_those_of_the_dense_layer(shape):
    out, inp, rank, kernel = shape
    tensors = layer("diffusion_model.x", out, inp, rank, kernel)
    R = 1.5 / rank * tensors["diffusion_model.x.lora_up.weight"].double().flatten(1) @ tensors["diffusion_model.x.lora_down.weight"].double().flatten(1)
    (facts,) = analyse(tensors)
    assert facts.kind == "low-rank" and facts.change is None and facts.rank == min(rank, out, R.shape[1])
    torch.testing.assert_close(facts.sigma.double(), torch.linalg.svdvals(R)[:facts.rank], rtol=1e-5, atol=1e-6)
    assert facts.energy == pytest.approx(float(R.square().sum()), rel=1e-5)
    assert facts.bytes == 4 * (out * rank + inp * math.prod(kernel) * rank + 1)


def test_effective_rank():
    """r for r equal directions, 1 for a single one, unchanged by scale, and exp of the entropy of sigma^2 between."""
    assert effective_rank(torch.full((7,), 3.0)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1) and effective_rank(torch.zeros(4)) == 0
    sigma = torch.tensor([2.0, 1.0, 0.5])
    p = np.array([4, 1, 0.25]) / 5.25
    assert effective_rank(sigma) == pytest.approx(math.exp(-(p * np.log(p)).sum())) == pytest.approx(effective_rank(100 * sigma))
    assert 1 < effective_rank(sigma) < 3


PAIRS = [(t, r) for t in registry.TRANSFORMS for r in registry.RESIDUALS if t != "none"]


@pytest.mark.parametrize("module", [nn.Linear(12, 20), nn.Linear(24, 6), nn.Conv2d(10, 12, 3), nn.Conv2d(6, 9, 1)], ids=["wide", "tall", "conv", "conv-1x1"])
@pytest.mark.parametrize(("transform", "residual"), PAIRS)
def test_layers_with_a_transform(transform, residual, module):
    """From a file's tensors alone: the pair's name, |T - I|_F / sqrt(J) of the dense T, and the spectrum of the residual."""
    options = {"rank": 2} if "rank" in {f.name for f in dataclasses.fields(registry.RESIDUALS[residual])} else {}
    method = Method(registry.RESIDUALS[residual](**options), registry.TRANSFORMS[transform]())
    adapter = method.build(module, module.weight.detach(), torch.Generator().manual_seed(1))
    for number, parameter in enumerate(adapter.parameters()):
        parameter.data += 0.2 * draw(parameter.shape, number)
    tensors, _ = export_tensors({"diffusion_model.x.weight": adapter}, "generic", ["diffusion_model.x.weight"])
    (facts,) = analyse(tensors)
    J = adapter.shape.inp
    T = adapter.transform.rows(torch.eye(J)).detach()
    assert facts.change == pytest.approx(float((T - torch.eye(J)).norm()) / J**0.5, rel=1e-4)
    assert facts.bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert facts.kind == "+".join(k for k in (transform, "lora" if residual == "trilora" else residual) if k != "none")
    if residual == "none":
        assert facts.sigma is None and facts.energy == 0
    else:
        torch.testing.assert_close(facts.sigma, torch.linalg.svdvals(adapter.residual.delta().detach())[:facts.rank], rtol=1e-4, atol=1e-5)


def test_other_kinds_are_counted_and_named():
    """By the table's names; what is not whole is broken, and what no kind knows is unknown."""
    n = torch.ones
    tensors = {"a.hada_w1_a": n(5, 2), "a.hada_w1_b": n(2, 4), "a.hada_w2_a": n(5, 2), "a.hada_w2_b": n(2, 4), "a.alpha": n(()), "b.lokr_w1": n(2, 2), "b.lokr_w2": n(3, 3),
               "c.oft_blocks": n(3, 2, 2), "d.diff": n(3), "d.diff_b": n(3), "k.diff_b": n(3), "e.a1.weight": n(4, 2), "e.a2.weight": n(2, 4), "e.b1.weight": n(5, 2),
               "e.b2.weight": n(2, 4), "f.w_norm": n(3), "g.mystery": n(3), "l.hada_w1_a": n(3), "m.lora_up.weight": n(3, 2), "o.oft_R": n(3, 6)}  # fmt: skip
    tensors |= layer("h", 5, 4, 2) | {"h.dora_scale": n(5)} | layer("i", 5, 4, 2) | {"i.lora_mid.weight": n(2, 2, 1)} | layer("j", 5, 4, 2)
    found = {facts.name: facts.kind for facts in analyse(tensors)}
    assert found == {"a": "LoHa", "b": "LoKr", "c": "OFT", "d": "full difference", "k": "bias", "e": "GLoRA", "f": "full difference", "g.mystery": "unknown", "h": "DoRA",
                     "i": "Tucker LoCon", "j": "low-rank", "l": "broken LoHa", "m": "broken low rank", "o": "an older PEFT's OFT"}
    assert sum(facts.bytes for facts in analyse(tensors)) == sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_transform_that_no_kind_reads_is_counted():
    (facts,) = analyse({"x.transform.strange": torch.ones(3), "x.residual.up": torch.ones(4, 1), "x.residual.down": torch.ones(1, 3), "x.residual.scale": torch.tensor(1.0)})
    assert facts.kind == "unknown transform" and facts.rank == 0 and facts.change is None and facts.bytes == 44


@pytest.mark.parametrize(
    ("name", "short"),
    [(Q, "IN02 · attn1_to_q"), ("lora_unet_mid_block_attentions_0_proj_in", "MID1 · proj_in"),
     ("lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj", "OUT11 · ff_net_0_proj"),
     ("lora_unet_down_blocks_2_downsamplers_0_conv", "IN09 · conv"), ("diffusion_model.output_blocks.11.1.proj_out", "OUT11 · proj_out"),
     ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q", "IN04 · t1 attn1_to_q"),
     ("diffusion_model.double_blocks.3.img_attn.qkv", "D03 · img_attn_qkv"), ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "TE2.03 · mlp_fc1"),
     ("x", "BASE · x")],
)  # fmt: skip
def test_a_layers_short_name(name, short):
    (facts,) = analyse(layer(name, 5, 4, 2))
    assert facts.short_name == short and facts.block == short.partition(" ")[0]


def test_layers_come_in_the_models_order():
    names = ["lora_te_text_model_encoder_layers_3_mlp_fc1", "lora_unet_down_blocks_0_attentions_0_x", "lora_unet_down_blocks_0_attentions_1_x",
             "lora_unet_down_blocks_0_downsamplers_0_conv", "lora_unet_down_blocks_1_attentions_0_x", "lora_unet_mid_block_resnets_0_conv1",
             "lora_unet_up_blocks_0_resnets_2_conv1", "lora_unet_up_blocks_1_attentions_0_x", "lora_unet_conv_out"]
    tensors = {}
    for seed, name in enumerate(sorted(names)):
        tensors |= layer(name, 5, 4, 2, seed=seed)
    facts = analyse(tensors)
    assert [x.name for x in facts] == names
    shares = by_block(facts, lambda x: x.energy)
    assert list(shares) == ["TE1.03", "IN01", "IN02", "IN03", "IN04", "MID0", "OUT02", "OUT03", "FINAL"] and sum(shares.values()) == pytest.approx(sum(x.energy for x in facts))


def plots():
    """nodes/inspect_plots.py without its package, which imports the host."""
    path = Path(__file__).resolve().parents[1] / "nodes" / "inspect_plots.py"
    spec = importlib.util.spec_from_file_location("comfyui_trilora.nodes_without_host.inspect_plots", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def adapters():
    """Name -> tensors: one layer, some, hundreds with few and with many blocks, other kinds only, R = 0, a transform."""
    few = layer(Q, 12, 10, 3) | layer("lora_unet_mid_block_attentions_0_proj_in", 12, 10, 5)
    many = {}
    for block, count in ((4, 40), (5, 40), (7, 240), (8, 240)):
        for t in range(count):
            many |= layer(f"lora_unet_input_blocks_{block}_1_transformer_blocks_{t}_attn1_to_q", 8, 6, 4, seed=t)
    flux = {}
    for block in range(57):
        flux |= layer(f"diffusion_model.{'double' if block < 19 else 'single'}_blocks.{block % 19}.linear1", 6, 5, 2, seed=block)
    zero = {key: torch.zeros_like(t) if "up" in key else t for key, t in layer(Q, 12, 10, 3).items()}
    ring = {f"{Q}.transform.m": torch.ones(12), "x.hada_w1_a": torch.ones(2)}
    formula = layer("lora_unet_$\\frac$_x", 12, 10, 1)
    return {"one": layer(Q, 12, 10, 1), "$\\frac$ 5$": formula, "few": few, "hundreds": many, "many blocks": flux, "other kinds": {"a.hada_w1_a": torch.ones(4)}, "zero": zero, "transform": ring}


@pytest.mark.parametrize(("name", "count"), [("one", 4), ("$\\frac$ 5$", 4), ("few", 4), ("hundreds", 4), ("many blocks", 4), ("other kinds", 1), ("zero", 4), ("transform", 2)])
def test_pictures(name, count):
    """One 1600 x 1200 RGB picture a subject, each with something on it and none equal to another."""
    pytest.importorskip("matplotlib")
    pictures = plots().draw(analyse(adapters()[name]), name)
    assert len(pictures) == count and all(p.size == (1600, 1200) and p.mode == "RGB" for p in pictures)
    pixels = [np.asarray(p) for p in pictures]
    assert all((p != 255).any(-1).mean() > 0.01 for p in pixels)
    assert len({p.tobytes() for p in pixels}) == count


def test_the_heat_map_shows_the_singular_values():
    """Brighter where sigma is larger, column by column: two layers, the second a hundred times the first."""
    pytest.importorskip("matplotlib")
    weak, strong = layer(Q, 12, 10, 2, alpha=0.01), layer("lora_unet_mid_block_attentions_0_proj_in", 12, 10, 2, alpha=1.0)
    picture = np.asarray(plots().draw(analyse(weak | strong), "two")[0]).astype(int)
    rows = picture[300:700]
    left, right = rows[:, 300:500].mean((0, 1)), rows[:, 900:1100].mean((0, 1))
    assert right[1] > left[1] + 40, "viridis grows greener with the value"
