"""The training loop: gradients of a step against the formulas, and what makes two runs equal."""

import logging

import pytest
import torch
from comfyui_trilora.training import loop
from comfyui_trilora.training.batches import batches
from comfyui_trilora.training.config import TrainingConfig
from comfyui_trilora.training.loop import Progress, TrainingStopped, evaluate, train
from comfyui_trilora.training.schedule import rate_factor
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig
from comfyui_trilora.trilora_ops.residuals.trilora import TriLoraConfig

from .toy_host import (
    ToyHost,
    adapters_on,
    book_gradients,
    equal,
    make_samples,
    overridden,
    parameters_of,
    snapshot,
    without_caption,
)

LORA, TRILORA = LoraConfig(rank=2), TriLoraConfig(rank=2)
QUICK = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "warmup": 0.0, "seed": 7}


def run(host=None, samples=None, on_step=lambda progress: None, empty=None, method=LORA, **options):
    """(progress, adapters, their start) of a short run."""
    host, samples = host or ToyHost(), samples or make_samples(5, sizes=((4, 5), (3, 3)))
    adapters = adapters_on(host, method, moved=0)
    start = snapshot(adapters)
    progress = train(host, adapters, samples, empty or without_caption(samples), TrainingConfig(**{**QUICK, **options}), on_step)
    return progress, adapters, start


def step_gradients(host, adapters, passes, config):
    """(loss, gradients) of one optimizer step over the given passes of (samples, noise, u)."""
    parameters = parameters_of(adapters)
    optimizer, scaler = torch.optim.SGD(parameters), torch.amp.GradScaler("cpu", enabled=False)
    for parameter in parameters:
        parameter.grad = None
    loss, _ = loop._accumulate(host, adapters, passes, [], config, scaler, optimizer, Progress(1))
    return loss, [p.grad for p in parameters]


def assert_gradients(found, expected):
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        assert other.any() and (one - other).abs().max() <= 1e-5 * max(1.0, other.abs().max().item())


def four(lengths=(2,), seed=8):
    """Four samples with noise and places of their own."""
    draw = torch.Generator().manual_seed(seed)
    samples = make_samples(4, lengths=lengths)
    return samples, [torch.randn(s.x0.shape, generator=draw) for s in samples], torch.tensor([0.2, 0.45, 0.6, 0.9])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("gamma", [0.0, 5.0], ids=["plain", "min-snr"])
@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_a_batch_is_the_mean_of_its_samples(prediction, gamma, checkpointing):
    """Loss and gradients of one pass over four samples = the mean of the classical losses, one by one, of the merged model."""
    host, (samples, noise, u) = ToyHost(prediction), four()
    adapters = adapters_on(host, TRILORA)
    config = TrainingConfig(min_snr_gamma=gamma, checkpointing=checkpointing)
    assert_gradients(step_gradients(host, adapters, [(samples, noise, u)], config), book_gradients(host, adapters, samples, noise, u, gamma))
    assert len(host.collated) == 1


@pytest.mark.parametrize("split", [(2, 2), (3, 1), (1, 1, 1, 1)], ids=str)
def test_accumulation_is_a_larger_batch(split):
    """Every sample weighs the same, however many passes the step is made of."""
    host, (samples, noise, u) = ToyHost(), four()
    adapters, config, passes, at = adapters_on(host, TRILORA), TrainingConfig(), [], 0
    for size in split:
        passes.append((samples[at:at + size], noise[at:at + size], u[at:at + size]))
        at += size
    expected = step_gradients(host, adapters, [(samples, noise, u)], config)
    assert_gradients(step_gradients(host, adapters, passes, config), expected)
    assert len(host.collated) == 1 + len(split)


def test_dropped_captions_of_another_length_run_apart():
    """A batch whose texts differ in length is split by signature; loss and gradients stay the mean over all samples."""
    host, (samples, noise, u) = ToyHost(), four(lengths=(2, 3, 2, 2))
    adapters = adapters_on(host, TRILORA)
    found = step_gradients(host, adapters, [(samples, noise, u)], TrainingConfig(min_snr_gamma=0.0))
    assert host.collated == [["sample0", "sample2", "sample3"], ["sample1"]]
    assert_gradients(found, book_gradients(host, adapters, samples, noise, u))


def test_the_penalty_is_added_once_a_step():
    host, (samples, noise, u) = ToyHost(), four()
    plain, penalised = adapters_on(host, TRILORA), adapters_on(host, TriLoraConfig(rank=2, orthogonality=0.3))
    passes = [(samples[:2], noise[:2], u[:2]), (samples[2:], noise[2:], u[2:])]
    loss, gradients = step_gradients(host, penalised, passes, TrainingConfig())
    base, without = step_gradients(host, plain, passes, TrainingConfig())
    extra = torch.autograd.grad(sum(a.penalty() for a in penalised.values()), parameters_of(penalised), allow_unused=True)
    for found, one, more in zip(gradients, without, extra, strict=True):
        torch.testing.assert_close(found, one if more is None else one + more, atol=1e-5, rtol=1e-4)
    assert loss.item() == pytest.approx(base.item(), rel=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_model_that_overwrites_activations(checkpointing, caplog):
    """Copies are switched on by themselves, once, and the run equals that of the same model written out of place."""
    caplog.set_level(logging.INFO, "trilora")
    plain, expected, _ = run(ToyHost(), checkpointing=checkpointing)
    progress, adapters, _ = run(ToyHost(in_place=True), checkpointing=checkpointing)
    assert progress.cloning and not plain.cloning and progress.skipped == 0
    assert [r.message for r in caplog.records] == ["this model writes into activations in place; training keeps copies of them"]
    for one, other in zip(snapshot(adapters), snapshot(expected), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_other_failures_of_a_pass_are_not_retried():
    host = ToyHost()

    def fail(number):
        raise RuntimeError("CUDA out of memory")

    host.before_pass = fail
    with pytest.raises(TrainingStopped) as stop:
        run(host)
    assert str(stop.value.__cause__) == "CUDA out of memory" and len(host.collated) == 1


def test_a_run_learns_and_reports():
    """The loss on fixed noise falls; every step is reported with its loss and the schedule's rate; the model is untouched."""
    host, samples = ToyHost(), make_samples(3)
    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    config = TrainingConfig(steps=25, batch_size=3, learning_rate=2e-2, schedule="linear", warmup=0.2, caption_dropout=0.0)
    adapters, seen = adapters_on(host, LORA, moved=0), []
    first = evaluate(host, adapters, samples, config)
    progress = train(host, adapters, samples, without_caption(samples), config, lambda p: seen.append((p.done, p.learning_rate, len(p.losses))))
    assert evaluate(host, adapters, samples, config) < 0.9 * first
    assert seen == [(i + 1, 2e-2 * rate_factor(i, 25, "linear", 0.2), i + 1) for i in range(25)]
    assert progress.done == len(progress.losses) == 25 and progress.skipped == 0 and progress.rate > 0 and progress.grad_norm > 0
    assert progress.smooth_loss == pytest.approx(sum(progress.losses[-20:]) / 20)
    assert all(torch.equal(v, before[k]) for k, v in host.model.state_dict().items())
    assert not overridden(host.model) and all(p.grad is None for p in parameters_of(adapters))


def test_runs_are_seeded():
    """Same seed, same adapters bit by bit, whatever the global random state; another seed, another run."""
    torch.manual_seed(1)
    _, one, start = run()
    host = ToyHost()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    _, two, _ = run(host)
    assert torch.equal(torch.get_rng_state(), state)
    _, other, same_start = run(seed=8)
    assert equal(snapshot(one), snapshot(two)) and equal(start, same_start)
    assert not equal(snapshot(one), snapshot(other)) and not equal(snapshot(one), start)


def test_evaluation_is_fixed_and_disturbs_nothing():
    """The same value every time, from draws of its own: a run with evaluations in between is the run without."""
    host, samples = ToyHost(), make_samples(5, sizes=((4, 5), (3, 3)))
    values, config = [], TrainingConfig(**QUICK)
    fresh = adapters_on(host, LORA, moved=0)
    _, watched, _ = run(on_step=lambda progress: values.append(evaluate(host, fresh, samples, config)))
    _, alone, _ = run()
    assert equal(snapshot(watched), snapshot(alone)) and len(values) == 6 and len(set(values)) == 1
    assert all(p.grad is None for p in parameters_of(fresh))


def test_evaluation_sees_every_noise_level_and_spreads_over_samples():
    host, samples = ToyHost("flow"), make_samples(20)
    seen, sigma = [], host.sigma
    host.sigma = lambda u: seen.append(u.item()) or sigma(u)
    evaluate(host, {}, samples, TrainingConfig())
    assert seen == pytest.approx([(i + 0.5) / 8 for i in range(8)])
    assert [names[0] for names in host.collated] == [f"sample{i}" for i in (0, 2, 5, 7, 10, 12, 15, 17)]
    few = ToyHost()
    evaluate(few, {}, samples[:3], TrainingConfig())
    assert [names[0] for names in few.collated] == [f"sample{i % 3}" for i in range(8)]


@pytest.mark.parametrize("dropout", [0.0, 0.5, 0.9])
def test_caption_dropout(dropout):
    host = ToyHost()
    run(host, steps=50, batch_size=4, caption_dropout=dropout, samples=make_samples(4))
    names = [name for batch in host.collated for name in batch]
    share = sum(name.endswith("-empty") for name in names) / len(names)
    assert len(names) == 200 and share == pytest.approx(dropout, abs=0.1 if dropout else 0)


def test_the_order_is_that_of_batches():
    samples = make_samples(5, sizes=((4, 5), (3, 3)))
    host = ToyHost()
    run(host, samples, caption_dropout=0.0, steps=4)
    first = next(batches(samples, 2, torch.Generator().manual_seed(7)))
    assert host.collated[0] == [f"sample{i}" for i in first] and len(host.collated) == 4


def test_clipping_and_weight_decay(monkeypatch):
    """The optimizer sees gradients of at most grad_clip; the norm before clipping is reported; decay spares the cores."""
    norms, groups = [], []

    def spy(optimizer, *args, **kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])).item())
        groups[:] = [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    free, adapters, _ = run(grad_clip=0.0, steps=1, method=TRILORA, weight_decay=0.03)
    clipped, _, _ = run(grad_clip=1e-3, steps=1, method=TRILORA)
    assert norms[0] == pytest.approx(free.grad_norm, rel=1e-5) and free.grad_norm == pytest.approx(clipped.grad_norm, rel=1e-5)
    assert norms[0] > 0.01 and norms[1] == pytest.approx(1e-3, rel=1e-2)
    assert groups == [(2 * len(adapters), 0.01), (len(adapters), 0.0)]


def test_loss_scaling_changes_nothing():
    """A model that computes in fp16 is trained with scaled losses; the scale is a power of two and divides out exactly."""
    plain, scaled = ToyHost(), ToyHost()
    scaled.compute_dtype = torch.float16
    _, expected, _ = run(plain)
    progress, found, _ = run(scaled)
    assert equal(snapshot(found), snapshot(expected)) and progress.skipped == 0
