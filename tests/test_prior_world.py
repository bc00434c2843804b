"""Prior preservation on the small world, at a tiny budget: forgetting of the base model falls with the weight w."""

import dataclasses

import pytest
from comfyui_trilora.benchmarks.world import demo, prior


@pytest.fixture(scope="module")
def rows():
    """The base model, then w = 0 (no set), 0.3 and 3, after 16 quick steps of batch 4."""
    config = dataclasses.replace(demo.SETTINGS, steps=16, batch_size=4, learning_rate=1.2e-2)
    return list(prior.run((0.0, 0.3, 3.0), config, kept=16, prompts=6, sampler_steps=5))


def test_forgetting_falls_with_the_weight(rows):
    base, none, some, much = (row["forgotten"] for row in rows)
    assert base == 0
    assert much < 0.75 * some < 0.75 * none


def test_the_style_is_learned_under_its_trigger_all_the_same(rows):
    base, *trained = (row["to the style"] for row in rows)
    assert trained == sorted(trained) and trained[-1] < 0.7 * base


def test_the_losses_tell_the_same(rows):
    """The prior's loss on fixed noise falls with w, and the data's is paid for it."""
    _, none, some, much = rows
    assert much["prior"] < some["prior"] < none["prior"]
    assert none["data"] < much["data"]
