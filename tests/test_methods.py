"""What a method is built from: its options, the layers it can act on, TriLoRA's start."""

import pytest
import torch
from comfyui_trilora.trilora_ops import registry
from comfyui_trilora.trilora_ops.adapter import LayerShape
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig
from comfyui_trilora.trilora_ops.residuals.trilora import TriLoraConfig
from torch import nn


def build(config, module, seed=0):
    return registry.Method(config).build(module, module.weight, torch.Generator().manual_seed(seed))


def weight_with(sigma, out=9, columns=14, seed=1):
    """A linear layer whose weight has exactly these singular values."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(out, len(sigma), generator=draw)).Q
    right = torch.linalg.qr(torch.randn(columns, len(sigma), generator=draw)).Q
    layer = nn.Linear(columns, out).requires_grad_(False)
    layer.weight.copy_(left * torch.tensor(sigma) @ right.t())
    return layer


SIGMA = [4.0, 2.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("start", "expected"),
    [("svd", SIGMA), ("svd_relative", [1.0, 0.5, 0.25, 0.125]), ("ones", [1.0] * 4)],
    ids=["svd", "svd_relative", "ones"],
)
def test_the_core_starts_from_the_weights_spectrum(start, expected):
    layer = weight_with(SIGMA)
    diagonal = build(TriLoraConfig(rank=4, sigma_init=start), layer).residual
    torch.testing.assert_close(diagonal.C.detach(), torch.tensor(expected))
    full = build(TriLoraConfig(rank=4, rank_out=6, core="full", sigma_init=start), layer).residual
    assert full.U.shape == (9, 6) and full.C.shape == (6, 4) and full.Vt.shape == (4, 14)
    torch.testing.assert_close(full.C[:4].detach(), torch.diag(torch.tensor(expected)))
    assert not full.C[4:].any()


def test_u_is_gaussian_with_std_one_over_r2():
    layer = nn.Linear(32, 2000)
    for config, r2 in ((TriLoraConfig(rank=4), 4), (TriLoraConfig(rank=4, rank_out=8, core="full"), 8)):
        assert build(config, layer).residual.U.std().item() == pytest.approx(1 / r2, rel=0.03)


@pytest.mark.parametrize(
    ("energy", "rank"),
    # sigma^2 = 16, 4, 1, 1/4: shares 75.3 %, 94.1 %, 98.8 %, 100 %
    [(0.5, 1), (0.76, 2), (0.94, 2), (0.95, 3), (0.98, 3), (0.99, 4), (1.0, 4)],
)
def test_energy_chooses_the_smallest_rank(energy, rank):
    residual = build(TriLoraConfig(rank=6, energy=energy), weight_with(SIGMA)).residual
    assert len(residual.C) == rank and residual.Vt.shape[0] == rank and residual.U.shape[1] == rank
    assert residual.scale == 1.0  # alpha 0 means s = 1 whatever the rank


def test_energy_stops_at_the_cap():
    assert len(build(TriLoraConfig(rank=2, energy=1.0), weight_with(SIGMA)).residual.C) == 2
    wide = build(TriLoraConfig(rank=4, rank_out=3, core="full", energy=0.9), weight_with(SIGMA)).residual
    assert wide.C.shape == (2, 2)


def test_weight_decay_leaves_the_core_alone():
    adapter = build(TriLoraConfig(rank=3), nn.Linear(11, 7))
    decay, keep = adapter.parameter_groups()
    assert [p is adapter.residual.C for p in keep] == [True]
    assert {id(p) for p in decay} == {id(adapter.residual.U), id(adapter.residual.Vt)}


@pytest.mark.parametrize("config", [LoraConfig(rank=4, alpha=2.0), TriLoraConfig(rank=4, alpha=2.0)], ids=["lora", "trilora"])
def test_alpha_over_rank_is_the_scale(config):
    assert build(config, nn.Linear(11, 7)).residual.scale == 0.5


def test_the_name_of_a_method():
    assert registry.Method().name == "trilora" and registry.Method(LoraConfig()).name == "lora"


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [(LoraConfig, {"rank": 0}, "rank=0"), (LoraConfig, {"alpha": -1.0}, "alpha=-1.0"), (LoraConfig, {"alpha": float("nan")}, "alpha=nan"),
     (TriLoraConfig, {"core": "round"}, "core='round'"), (TriLoraConfig, {"sigma_init": "x"}, "sigma_init='x'"),
     (TriLoraConfig, {"rank_out": -1}, "rank_out=-1"), (TriLoraConfig, {"rank": 4, "rank_out": 3}, "diagonal core is square"),
     (TriLoraConfig, {"energy": 1.5}, "energy=1.5"), (TriLoraConfig, {"orthogonality": -0.1}, "orthogonality=-0.1")],
)  # fmt: skip
def test_bad_options_are_refused(config, options, words):
    with pytest.raises(TriLoRAError, match=words):
        config(**options)


@pytest.mark.parametrize("config", [LoraConfig(rank=8), TriLoraConfig(rank=8), TriLoraConfig(rank=2, core="full", rank_out=8)])
def test_a_rank_above_the_layer_is_refused(config):
    with pytest.raises(TriLoRAError, match="=8 is larger than the layer: a weight of 7x11 has rank 7 at the most"):
        build(config, nn.Linear(11, 7))


@pytest.mark.parametrize(
    ("module", "words"),
    [(nn.Conv2d(4, 6, 3, groups=2), "groups=2"), (nn.Conv2d(4, 6, 3, padding_mode="reflect"), "padding_mode='reflect'"),
     (nn.ConvTranspose2d(4, 6, 3), "ConvTranspose2d is neither"), (nn.LayerNorm(4), "LayerNorm is neither")],
)  # fmt: skip
def test_layers_that_cannot_carry_an_adapter(module, words):
    with pytest.raises(TriLoRAError, match=words):
        LayerShape.of(module)


def test_a_method_changes_something():
    with pytest.raises(TriLoRAError, match=r"choose one of lora, trilora"):
        registry.Method(registry.RESIDUALS["none"](), registry.TRANSFORMS["none"]())
