"""Settings of a run: what is refused, the course of the learning rate, the order in which samples are seen."""

import dataclasses
import math
from collections import Counter
from itertools import islice

import pytest
import torch
from comfyui_trilora.training.batches import batches, by_signature
from comfyui_trilora.training.config import TrainingConfig
from comfyui_trilora.training.schedule import SCHEDULES, rate_factor
from comfyui_trilora.trilora_ops.errors import TriLoRAError

from .toy_host import make_samples


@pytest.mark.parametrize(
    ("options", "words"),
    [({"steps": 0}, "steps=0: a whole number of 1 or more"), ({"batch_size": 0}, "batch_size=0"), ({"accumulation": -2}, "accumulation=-2"),
     ({"steps": 2.5}, "steps=2.5"), ({"batch_size": float("nan")}, "batch_size=nan"),
     ({"learning_rate": 0.0}, "learning_rate=0.0: a positive number"), ({"learning_rate": float("nan")}, "learning_rate=nan"),
     ({"learning_rate": float("inf")}, "learning_rate=inf"), ({"weight_decay": -0.1}, "weight_decay=-0.1"), ({"grad_clip": -1.0}, "grad_clip=-1.0"),
     ({"grad_clip": float("inf")}, "grad_clip=inf"), ({"min_snr_gamma": -5.0}, "min_snr_gamma=-5.0"), ({"prior_weight": -0.1}, "prior_weight=-0.1: a number of 0 (off) or more"),
     ({"prior_weight": float("nan")}, "prior_weight=nan"), ({"warmup": 1.0}, "warmup=1.0"), ({"warmup": -0.1}, "warmup=-0.1"),
     ({"caption_dropout": 1.0}, "caption_dropout=1.0"), ({"schedule": "step"}, "schedule='step': choose one of constant, cosine, linear"),
     ({"timesteps": "mode"}, "timesteps='mode': choose one of auto, uniform, logit_normal")],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_settings_are_refused(options, words):
    with pytest.raises(TriLoRAError) as error:
        TrainingConfig(**options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_settings_travel_as_plain_values():
    config = TrainingConfig(steps=7, schedule="linear", checkpointing=True)
    assert TrainingConfig(**config.as_dict()) == config
    assert all(isinstance(value, (int, float, str, bool)) for value in config.as_dict().values())


def rates(schedule, steps, warmup):
    return [rate_factor(step, steps, schedule, warmup) for step in range(steps)]


def test_schedule_values():
    """Warm-up rises linearly to 1; then constant, a line to 0, or half a cosine wave, over the remaining steps."""
    assert rates("constant", 4, 0.0) == [1, 1, 1, 1]
    assert rates("linear", 4, 0.0) == [1, 0.75, 0.5, 0.25]
    assert rates("cosine", 4, 0.0) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert rates("linear", 8, 0.5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 0.75, 0.5, 0.25])
    assert rates("constant", 10, 0.3) == pytest.approx([0.25, 0.5, 0.75] + [1] * 7)


@pytest.mark.parametrize("steps", [1, 2, 3, 17, 500])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_of_every_schedule_moves(schedule, warmup, steps):
    found = rates(schedule, steps, warmup)
    assert all(0 < rate <= 1 for rate in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1]) and found[top:] == sorted(found[top:], reverse=True)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
def test_an_epoch_shows_every_sample_once(size):
    """Batches never mix signatures; only the last of a signature is smaller; the order changes from epoch to epoch."""
    samples = make_samples(17, sizes=((4, 5), (3, 2)), lengths=(2, 2, 3))
    groups = Counter(sample.signature for sample in samples)
    per_epoch = sum(math.ceil(count / size) for count in groups.values())
    stream = batches(samples, size, torch.Generator().manual_seed(0))
    epochs = [list(islice(stream, per_epoch)) for _ in range(3)]
    assert len(groups) == 4 and epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(17))
        assert all(len({samples[i].signature for i in batch}) == 1 for batch in epoch)
        full = Counter(samples[batch[0]].signature for batch in epoch if len(batch) == size)
        assert all(full[signature] == count // size for signature, count in groups.items())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_epoch_shows_every_sample_as_often_as_it_says(size):
    """Repeats are shuffled through the epoch, not shown one after the other, and mix with nothing of another signature."""
    samples = [dataclasses.replace(s, repeats=1 + i % 3) for i, s in enumerate(make_samples(8, sizes=((4, 5), (3, 2))))]
    groups = Counter()
    for sample in samples:
        groups[sample.signature] += sample.repeats
    per_epoch = sum(math.ceil(count / size) for count in groups.values())
    stream = batches(samples, size, torch.Generator().manual_seed(0))
    for epoch in [list(islice(stream, per_epoch)) for _ in range(3)]:
        assert Counter(i for batch in epoch for i in batch) == {i: s.repeats for i, s in enumerate(samples)}
        assert all(len({samples[i].signature for i in batch}) == 1 for batch in epoch)
    twenty = [dataclasses.replace(s, repeats=25) for s in make_samples(20)]
    order = [i for i, in islice(batches(twenty, 1, torch.Generator().manual_seed(1)), 500)]
    assert Counter(order) == dict.fromkeys(range(20), 25) and sum(a == b for a, b in zip(order, order[1:], strict=False)) < 60


def test_batches_are_seeded():
    samples = make_samples(9, sizes=((4, 5), (3, 2)))
    one, two, other = (list(islice(batches(samples, 2, torch.Generator().manual_seed(seed)), 12)) for seed in (1, 1, 2))
    assert one == two != other


def test_signatures_are_mixed_within_an_epoch():
    """Neither size is seen all at once: the batches of an epoch come in random order too."""
    samples = make_samples(16, sizes=((4, 5), (3, 2)))
    epoch = [samples[i].signature for (i,) in islice(batches(samples, 1, torch.Generator().manual_seed(3)), 16)]
    assert sum(epoch[i] != epoch[i + 1] for i in range(15)) > 3


def test_by_signature_keeps_order():
    samples = make_samples(6, lengths=(2, 3, 2))
    assert by_signature(samples) == [[0, 2, 3, 5], [1, 4]]
