"""The parts of the recipe on the small world: its character, its plans, its distances, and what it says of them; training at a tiny budget."""

import dataclasses

import numpy as np
import pytest
import torch
from comfyui_trilora.benchmarks.world import blockwise, demo, scenes, text
from comfyui_trilora.benchmarks.world.world import World, to_tensor
from comfyui_trilora.trilora_ops.blocks import Blocks

QUICK = dataclasses.replace(demo.SETTINGS, steps=2, batch_size=2)
SCENES = [scenes.Scene("star", "yellow", "striped", "blue", "centre"), scenes.Scene("ring", "red", "solid", "sky", "top left", dr=0.01)]
SD = Blocks.layout("SD1.5")
# kohya's names of each level; a block's level on the way up counts from the bottom
NAMES = {"upper": ("down_blocks_0_", "up_blocks_3_"), "middle": ("down_blocks_1_", "up_blocks_2_"), "bottom": ("down_blocks_2_", "up_blocks_1_")}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def adapters():
    lessons = blockwise.lessons_of_style(4, 3, "stamp")
    return {plan: blockwise.learn(World.load(), lessons, QUICK, plan) for plan in blockwise.PLANS}


def layers(state) -> set[str]:
    return {key.split(".")[0] for key in state}


def test_the_character_is_new_to_the_world():
    assert blockwise.CHARACTER not in {scenes.random_scene(np.random.default_rng(seed)).shape for seed in range(300)}
    drawn = [scenes.draw(dataclasses.replace(SCENES[0], shape=shape)).astype(float) for shape in (blockwise.CHARACTER, *scenes.SHAPES)]
    assert min(np.abs(drawn[0] - other).mean() for other in drawn[1:]) > 5
    word, trigger = text.word_id(blockwise.CHARACTER), text.word_id(demo.TRIGGER)
    assert word != trigger and min(word, trigger) > len(text.WORDS), "rare words, each with a row of its own"
    for (_, prompt), again in zip(blockwise.lessons_of_character(5, 2), blockwise.lessons_of_character(5, 2), strict=True):
        assert blockwise.CHARACTER in prompt and demo.TRIGGER not in prompt and again[1] == prompt
    assert not any(blockwise.CHARACTER in prompt for _, prompt in blockwise.lessons_of_style(20, 2, "neon"))


def test_a_plan_trains_its_level_and_nothing_else(adapters):
    full, parameters = adapters["full"]
    for level, starts in NAMES.items():
        state, count = adapters[level]
        assert layers(state) == {name for name in layers(full) if name.removeprefix("lora_unet_").startswith(starts)} != set()
        assert count < parameters / 2
    assert not layers(adapters["upper"][0]) & layers(adapters["bottom"][0])


@pytest.mark.parametrize("level", blockwise.LEVELS)
def test_inference_leaves_what_training_would_train(adapters, level):
    part = blockwise.applied_in(adapters["full"][0], level)
    assert layers(part) == layers(adapters[level][0])
    assert all(torch.equal(tensor, adapters["full"][0][key]) for key, tensor in part.items())


def test_training_is_a_function_of_the_seed(adapters):
    again, _ = blockwise.learn(World.load(), blockwise.lessons_of_style(4, 3, "stamp"), QUICK, "upper")
    assert all(torch.equal(tensor, adapters["upper"][0][key]) for key, tensor in again.items())


def test_combining_adds_both_in_any_order(adapters):
    one, other = adapters["upper"][0], adapters["bottom"][0]
    plain, first, second = (world.unet.state_dict() for world in (World.load(), blockwise.combined(one, other), blockwise.combined(other, one)))
    changed = {key for key in plain if not torch.equal(plain[key], first[key])}
    assert all(torch.equal(first[key], second[key]) for key in plain) and changed
    assert {key.split(".")[0] for key in changed} == {"input_blocks", "output_blocks"}


def test_distances_tell_style_from_character():
    style = "stamp"
    own = [blockwise.with_character(scene) for scene in SCENES]
    found = [blockwise.distances(to_tensor([scenes.draw(scene, s) for scene in drawn]), SCENES, style)
             for drawn, s in ((own, style), (own, None), (SCENES, style), (SCENES, None))]
    assert all(value.shape == (2,) for each in found for value in each.values())
    assert not any(value.any() for value in found[0].values())
    assert not found[1]["character"].any() and (found[1]["both"] >= found[1]["style"]).all() and (found[1]["style"] > 0.1).all()
    assert not found[2]["style"].any() and (found[2]["both"] >= found[2]["character"]).all() and (found[2]["character"] > 0.05).all()
    assert all((value > 0.05).all() for value in found[3].values())
    assert (blockwise.recognised(found[0]), blockwise.recognised(found[2])) == (1.0, 0.0)


def test_a_run_has_a_row_for_every_combination():
    rows = list(blockwise.run(QUICK, "stamp", lessons=3, prompts=2, sampler_steps=2))
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) == 12 and names[0] == "base model"
    assert all(((row[kind] > 0) & (row[kind] <= row["both"]) & (row["both"] < 1)).all() for row in rows for kind in ("both", "style", "character"))
    assert len(blockwise.verdict(rows)) == 8


@pytest.mark.parametrize(("noise", "expected"), [
    (0.0, ["Holds", "Does", "Does", "Holds", "Holds", "Holds", "Does", "Holds"]),
    (3.0, ["Undecided"] * 8),
])  # fmt: skip
def test_what_it_says_follows_from_the_numbers(noise, expected):
    """Prompts differ a lot; what counts is the difference at each prompt, against its own spread."""
    draw = torch.Generator().manual_seed(4)
    prompts = 0.5 + torch.rand(40, generator=draw)

    def row(name: str, mean: float) -> dict:
        spread = torch.randn(40, generator=draw)
        return {"name": name, "both": prompts + mean + (0.01 + noise) * (spread - spread.mean())}

    rows = [row("character + style, full + full", 0.3)]
    for word, means in (("trained", (0.2, 0.35, 0.4)), ("applied", (0.25, 0.3, 0.45))):
        rows += [row(f"{word} {level}: character + style", mean) for level, mean in zip(blockwise.LEVELS, means, strict=True)]
    assert [sentence.split()[0] for sentence in blockwise.verdict(rows)] == expected
