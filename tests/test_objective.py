"""The loss in x0 space is the classical loss of every kind of model, and places in the schedule are drawn as said."""

import pytest
import torch
from comfyui_trilora.training.objective import WEIGHTS, draw_u, loss_weight, x0_loss
from comfyui_trilora.trilora_ops.errors import TriLoRAError

from .toy_host import ToyHost, book_loss

SIGMA = {"eps": [0.03, 0.5, 1.0, 4.0, 60.0], "v": [0.03, 0.5, 1.0, 4.0, 60.0], "flow": [0.02, 0.3, 0.5, 0.9, 0.999]}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.0, 5.0, 1.0], ids=["plain", "gamma-5", "gamma-1"])
@pytest.mark.parametrize("prediction", SIGMA)
def test_the_loss_is_the_classical_one(prediction, gamma):
    """Weighted squared error of x0 = squared error of eps, v or velocity, with the capped weights of eps and v."""
    sigma = torch.tensor(SIGMA[prediction], dtype=torch.float64)
    x0, noise, raw = draw(5, 3, 4, 6), draw(5, 3, 4, 6, seed=1), draw(5, 3, 4, 6, seed=2)
    host = ToyHost(prediction)
    estimate = host.estimate(host.add_noise(x0, noise, sigma), sigma, raw)
    found = loss_weight(prediction, sigma, 1.0, gamma).double() * (estimate - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(found, book_loss(prediction, raw, x0, noise, sigma, gamma), rtol=1e-5, atol=0)
    in_fp32 = x0_loss(estimate.float(), x0.float(), loss_weight(prediction, sigma, 1.0, gamma))
    assert in_fp32.dtype == torch.float32
    torch.testing.assert_close(in_fp32.double(), found, rtol=1e-3, atol=0)


def test_edm_weight():
    """With sigma_data d the v weight is 1 / c_out^2, so the loss is that of EDM's F (arXiv:2206.00364, eq. 7 and 8)."""
    sigma, data = torch.tensor([0.1, 0.5, 7.0], dtype=torch.float64), 0.5
    x0, noise, raw = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1), draw(3, 2, 4, 4, seed=2)
    s = sigma.view(-1, 1, 1, 1)
    skip, out = data**2 / (s**2 + data**2), s * data / (s**2 + data**2).sqrt()
    target = (x0 - skip * (x0 + s * noise)) / out
    estimate = skip * (x0 + s * noise) + out * raw
    found = loss_weight("v", sigma, data).double() * (estimate - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(found, (raw - target).square().flatten(1).mean(1), rtol=1e-5, atol=0)
    capped = (1 + (data / sigma).square()).clamp_max(5.0) / data**2
    torch.testing.assert_close(loss_weight("v", sigma, data, 5.0).double(), capped, rtol=1e-6, atol=0)


def test_only_tested_predictions_have_a_weight():
    assert set(WEIGHTS) == {"eps", "v", "flow"}


def test_the_loss_is_computed_in_fp32():
    """Half-precision estimates are widened before they are squared."""
    x0, estimate = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)
    assert x0_loss(estimate, x0, torch.ones(1)).item() == 90000.0


def test_an_unknown_prediction_is_refused():
    with pytest.raises(TriLoRAError, match="prediction='cascade': .*use an eps, v or flow model"):
        loss_weight("cascade", torch.ones(1))


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@pytest.mark.parametrize("timesteps", ["auto", "uniform", "logit_normal"])
def test_draw_u(timesteps, prediction):
    """Open interval, seeded, with the distribution's quartiles: uniform 1/4, 1/2, 3/4; sigmoid of a normal 0.337, 1/2, 0.663."""
    generator = torch.Generator().manual_seed(3)
    u = draw_u(4000, timesteps, prediction, generator)
    assert u.shape == (4000,) and 0 < u.min() and u.max() < 1
    normal = timesteps == "logit_normal" or (timesteps == "auto" and prediction == "flow")
    expected = torch.tensor([0.3375, 0.5, 0.6625] if normal else [0.25, 0.5, 0.75])
    torch.testing.assert_close(u.quantile(torch.tensor([0.25, 0.5, 0.75])), expected, atol=0.025, rtol=0)
    assert torch.equal(draw_u(4000, timesteps, prediction, torch.Generator().manual_seed(3)), u)


def test_extreme_draws_stay_inside():
    """The ends, where a schedule may put sigma at 0 or infinity, are never reached."""
    u = draw_u(200_000, "uniform", "eps", torch.Generator().manual_seed(0))
    assert u.min().item() == pytest.approx(1e-3) and u.max().item() == pytest.approx(1 - 1e-3)
