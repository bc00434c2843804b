"""A regularisation set: loss = data + w * prior, what every step draws, and what stays as it was without one."""

import math
from dataclasses import replace

import pytest
import torch
from comfyui_trilora.training import loop
from comfyui_trilora.training.batches import batches
from comfyui_trilora.training.config import TrainingConfig
from comfyui_trilora.training.loop import Progress, TrainingStopped, train
from comfyui_trilora.training.objective import draw_u
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
QUICK = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant", "seed": 7}


def prior_samples(count=4, sizes=((5, 3), (2, 6)), lengths=(3,)):
    """Samples of other sizes and text lengths than the data's, by the names prior0, prior1 ..."""
    return [replace(s, name=s.name.replace("sample", "prior")) for s in make_samples(count, sizes, lengths, seed=20)]


def run(host=None, prior=None, on_step=lambda progress: None, samples=None, moved=0.0, **options):
    """(progress, adapters) of a short run; prior: the samples of a regularisation set, None for no set."""
    host, samples = host or ToyHost(), samples or make_samples(5)
    adapters = adapters_on(host, LORA, moved=moved)
    extra = {} if prior is None else {"prior": prior, "prior_empty": without_caption(prior)}
    return train(host, adapters, samples, without_caption(samples), TrainingConfig(**{**QUICK, **options}), on_step, **extra), adapters


def drawn(samples, seed):
    """One pass over all of `samples`, as the loop's passes are: (samples, noise, u)."""
    draw = torch.Generator().manual_seed(seed)
    return samples, [torch.randn(s.x0.shape, generator=draw) for s in samples], torch.rand(len(samples), generator=draw) * 0.9 + 0.05


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("weight", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_the_gradient_is_that_of_data_plus_w_times_prior(prediction, weight, checkpointing):
    """Three data samples in two passes and four regularisation samples of other sizes in two, against the formula by hand."""
    host, samples, prior = ToyHost(prediction), make_samples(3), prior_samples()
    adapters = adapters_on(host, TRILORA)
    data_passes = [drawn(samples[:2], 1), drawn(samples[2:], 2)]
    prior_passes = [drawn(prior[::2], 3), drawn(prior[1::2], 4)]
    optimizer = torch.optim.SGD(parameters_of(adapters))
    config = TrainingConfig(prior_weight=weight, min_snr_gamma=5.0, checkpointing=checkpointing)
    means = loop._accumulate(host, adapters, data_passes, prior_passes, config, torch.amp.GradScaler("cpu", enabled=False), optimizer, Progress(1))
    found = [p.grad for p in parameters_of(adapters)]

    def by_hand(passes):
        batch, noise, u = ([x for p in passes for x in p[i]] for i in range(3))
        return book_gradients(host, adapters, batch, noise, u, gamma=5.0)

    (of_data, first), (of_prior, second) = by_hand(data_passes), by_hand(prior_passes)
    assert [float(mean) for mean in means] == pytest.approx([float(of_data), float(of_prior)], rel=1e-5)
    for gradient, a, b in zip(found, first, second, strict=True):
        assert b.any()
        torch.testing.assert_close(gradient, a + weight * b, rtol=1e-4, atol=1e-5 * max(1.0, float((a + weight * b).abs().max())))


def by_the_book(samples, seed, config, prediction):
    """The passes of the first step as they are stated: batches, one number a sample for its caption, then noise and u a batch."""
    draw = torch.Generator().manual_seed(seed)
    order = batches(samples, config.batch_size, draw)
    picked = [[(samples[i], float(torch.rand(1, generator=draw)) < config.caption_dropout) for i in next(order)] for _ in range(config.accumulation)]
    passes = []
    for batch in picked:
        members = [without_caption([sample])[0] if dropped else sample for sample, dropped in batch]
        noise = [torch.randn(sample.x0.shape, generator=draw) for sample in members]
        passes.append((members, noise, draw_u(len(members), config.timesteps, prediction, draw)))
    return passes


@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_a_step_draws_as_stated(prediction):
    """Loss and gradient norm of the first step, from draws made by hand: the data's by the seed, the set's by the seed + 2."""
    host, samples, prior = ToyHost(prediction), make_samples(5, sizes=((4, 5), (3, 3))), prior_samples(6)
    options = {"steps": 1, "accumulation": 2, "caption_dropout": 0.4, "prior_weight": 0.7, "grad_clip": 0.0}
    progress, _ = run(host, prior, samples=samples, moved=0.2, **options)
    config, fresh = TrainingConfig(**{**QUICK, **options}), adapters_on(host, LORA)
    results = []
    for chosen, seed in ((samples, 7), (prior, 9)):
        batch, noise, u = ([x for p in by_the_book(chosen, seed, config, prediction) for x in p[i]] for i in range(3))
        results.append(book_gradients(host, fresh, batch, noise, u, gamma=config.min_snr_gamma))
    (of_data, first), (of_prior, second) = results
    assert progress.data_losses == pytest.approx([float(of_data)], rel=1e-5)
    assert progress.prior_losses == pytest.approx([float(of_prior)], rel=1e-5)
    assert progress.losses == pytest.approx([float(of_data + 0.7 * of_prior)], rel=1e-5)
    total = torch.cat([(a + 0.7 * b).flatten() for a, b in zip(first, second, strict=True)])
    assert progress.grad_norm == pytest.approx(float(total.norm()), rel=1e-4)


def test_every_step_takes_as_many_batches_of_either_and_each_has_its_own_epochs():
    host, samples, prior = ToyHost(), make_samples(4), prior_samples(6, sizes=((5, 3),))
    run(host, prior, samples=samples, steps=6, accumulation=2, caption_dropout=0.0)
    passes = [(["data", "prior"][names[0].startswith("prior")], names) for names in host.collated]
    assert [kind for kind, _ in passes] == ["data", "data", "prior", "prior"] * 6
    assert all(len(names) == 2 for _, names in passes)
    for kind, size, each in (("data", 4, 6), ("prior", 6, 4)):  # 24 samples of either: six epochs of four, four of six
        seen = [name for found, names in passes if found == kind for name in names]
        epochs = [seen[i:i + size] for i in range(0, len(seen), size)]
        assert len(epochs) == each and all(len(set(epoch)) == size for epoch in epochs) and len(set(map(tuple, epochs))) > 1


def test_without_its_set_a_run_sees_the_same_data():
    """A regularisation set takes nothing from the data's generator: order, dropped captions, noise and places stay."""
    plain, with_set = ToyHost(), ToyHost()
    seen = {id(plain): [], id(with_set): []}
    for host in (plain, with_set):
        host.denoise = lambda x, sigma, conditions, host=host, denoise=host.denoise: (
            seen[id(host)].append((host.collated[-1], x.clone(), sigma)), denoise(x, sigma, conditions))[1]
    run(plain, caption_dropout=0.3)
    run(with_set, prior_samples(), caption_dropout=0.3)
    data = [entry for entry in seen[id(with_set)] if entry[0][0].startswith("sample")]
    assert len(data) == len(seen[id(plain)]) < len(seen[id(with_set)])
    for (names, x, sigma), (others, y, tau) in zip(data, seen[id(plain)], strict=True):
        assert names == others and torch.equal(x, y) and torch.equal(sigma, tau)


@pytest.mark.parametrize("case", ["weight 0", "empty set"])
def test_no_weight_or_no_set_is_the_plain_run(case):
    """Bit by bit, and at no cost: not one pass of the set is made."""
    host = ToyHost()
    plain, expected = run(ToyHost())
    progress, found = run(host, prior_samples() if case == "weight 0" else [], **({"prior_weight": 0.0} if case == "weight 0" else {}))
    assert equal(snapshot(found), snapshot(expected)) and progress.losses == plain.losses == progress.data_losses
    assert progress.prior_losses == [] and not [n for names in host.collated for n in names if n.startswith("prior")]


def test_runs_with_a_set_are_seeded():
    (one, first), (two, second) = run(prior=prior_samples()), run(prior=prior_samples())
    assert equal(snapshot(first), snapshot(second)) and one.losses == two.losses
    _, other = run(prior=prior_samples(), prior_weight=0.5)
    assert not equal(snapshot(first), snapshot(other))
    assert one.losses == pytest.approx([a + b for a, b in zip(one.data_losses, one.prior_losses, strict=True)])
    assert len(one.prior_losses) == 6 and min(one.prior_losses) > 0


def test_a_model_that_writes_in_place_is_run_again_with_the_set():
    """No gradient of the attempt that failed may stay."""
    _, expected = run(ToyHost(), prior_samples())
    progress, found = run(ToyHost(in_place=True), prior_samples())
    assert progress.cloning
    for one, other in zip(snapshot(found), snapshot(expected), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_loss_scaling_changes_nothing():
    scaled = ToyHost()
    scaled.compute_dtype = torch.float16
    (plain, expected), (progress, found) = run(ToyHost(), prior_samples()), run(scaled, prior_samples())
    assert equal(snapshot(found), snapshot(expected)) and progress.losses == plain.losses


def test_an_interrupt_in_a_pass_of_the_set_keeps_what_was_learned():
    """The step's data gradients are already there when it comes: none of them may reach the adapters."""
    _, expected = run(prior=prior_samples(), steps=3)
    host, done = ToyHost(), []

    def stop(number):
        if len(done) == 3 and host.collated[-1][0].startswith("prior"):
            raise KeyboardInterrupt

    host.before_pass = stop
    adapters = adapters_on(host, LORA, moved=0)
    samples, prior = make_samples(5), prior_samples()
    with pytest.raises(TrainingStopped) as error:
        train(host, adapters, samples, without_caption(samples), TrainingConfig(**QUICK), lambda progress: done.append(progress.done),
              prior=prior, prior_empty=without_caption(prior))
    progress = error.value.progress
    assert progress.done == 3 and len(progress.losses) == len(progress.data_losses) == len(progress.prior_losses) == 3
    assert equal(snapshot(adapters), snapshot(expected)) and not overridden(host.model)
    assert all(p.grad is None for p in parameters_of(adapters))


def test_a_set_whose_loss_is_not_finite_skips_the_step(caplog):
    host, seen = ToyHost(), []
    sigma, passes = host.sigma, []
    host.sigma = lambda u: passes.append(u) or (sigma(u) * float("nan") if len(passes) == 4 else sigma(u))
    adapters = adapters_on(host, LORA, moved=0)
    samples, prior = make_samples(4), prior_samples(4, sizes=((5, 3),))
    progress = train(host, adapters, samples, without_caption(samples), TrainingConfig(**{**QUICK, "caption_dropout": 0.0}),
                     lambda p: seen.append(snapshot(adapters)), prior=prior, prior_empty=without_caption(prior))
    assert progress.skipped == 1 and [len(x) for x in (progress.losses, progress.data_losses, progress.prior_losses)] == [5, 5, 5]
    assert equal(seen[1], seen[0]) and not equal(seen[2], seen[1]) and all(math.isfinite(x) for x in progress.losses)
    assert [r.message for r in caplog.records] == ["step 2: loss or gradient is not finite; step skipped"]


@pytest.mark.parametrize("kind", ["data", "prior"])
def test_repeats_count_in_either_set(kind):
    """The sample that an epoch shows five times is seen five times as often as its neighbours."""
    host = ToyHost()
    sets = {"data": make_samples(3), "prior": prior_samples(3, sizes=((5, 3),))}
    sets[kind][1] = replace(sets[kind][1], repeats=5)
    run(host, sets["prior"], samples=sets["data"], steps=7, batch_size=1, caption_dropout=0.0)
    names = [name for batch in host.collated for name in batch]
    name = {"data": "sample", "prior": "prior"}[kind]
    assert [names.count(f"{name}{i}") for i in range(3)] == [1, 5, 1]
