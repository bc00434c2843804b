"""Block-wise LoRA's recipe on the small world: a full-block character with a style trained, or applied, in some blocks only.

    python -m comfyui_trilora.benchmarks.world.blockwise [--steps 200] [--style neon] [--prompts 36] [--seed 0]

The claims under test (Li et al., arXiv:2403.07500): a character of all blocks with a style of some blocks combines better
than two of all blocks; the upper blocks are the best; blocks chosen at training are better than blocks chosen at inference. The
character is a shape that the world has never seen, in scenes of every colour; the style is one of `scenes.STYLES`; no training
picture has both. The world's U-Net has SD1.x's twelve input and output blocks on four levels, so that the presets mean the
same there. Distances are root mean squared differences of pictures in [0, 1], mean over prompts that ask for both:

* both: to the character drawn in the style. The one number that must fall.
* style: to the nearest drawing in the style, of whatever shape.
* character: to the nearest drawing of the character, in the style or without it.

Recognised: share of the pictures to which, of all shapes drawn in the style, the character's drawing is the nearest.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...training.config import TrainingConfig
from ...training.export import export_tensors
from ...training.loop import train
from ...training.plan import build_adapters, learning_rates, parameter_count
from ...trilora_ops.block_plan import BlockPlan
from ...trilora_ops.block_syntax import parse
from ...trilora_ops.blocks import Blocks
from ...trilora_ops.checkpoint import AdapterState
from ...trilora_ops.naming import UNetLayout, public_name
from ...trilora_ops.registry import Method
from ...trilora_ops.residuals.lora import LoraConfig
from . import demo
from .host import FAMILY, WorldHost
from .prior import Captioned
from .scenes import CHARACTERS, SHAPES, STYLES, Scene, caption, draw, draw_set, random_scene
from .world import World, to_tensor

LEVELS = ("upper", "middle", "bottom")
PLANS = {level: f"Block-wise {level} (SD1.x)" for level in ("full", *LEVELS)}
METHOD = Method(LoraConfig(rank=8))
TARGET = "linear+conv"  # the paper's LoCon
CHARACTER = CHARACTERS[0]


def lessons_of_character(count: int, seed: int) -> list[Captioned]:
    """Pictures of the character in random scenes, in the world's own style; its name is the trigger."""
    rng = np.random.default_rng(seed)
    scenes = [with_character(random_scene(rng)) for _ in range(count)]
    return [(draw(scene), caption(scene)) for scene in scenes]


def lessons_of_style(count: int, seed: int, style: str) -> list[Captioned]:
    """Pictures of known shapes in the style."""
    return [(picture, caption(scene, demo.TRIGGER)) for picture, scene in draw_set(count, seed, style)]


def with_character(scene: Scene) -> Scene:
    return dataclasses.replace(scene, shape=CHARACTER)


def learn(world: World, lessons: Sequence[Captioned], config: TrainingConfig, plan: str = "full") -> tuple[AdapterState, int]:
    """An adapter of the plan's blocks, and the number of its parameters."""
    host = WorldHost(world)
    read = BlockPlan(PLANS[plan]).read(Blocks.of(host.layers()), METHOD)
    with host.session():
        data, empty = ([host.prepare(f"{i}", picture, prompt if captioned else "") for i, (picture, prompt) in enumerate(lessons)] for captioned in (True, False))
        adapters = build_adapters(host, METHOD, TARGET, config.seed, read)
        train(host, adapters, data, empty, config, rates=learning_rates(adapters, read))
    tensors, _ = export_tensors(adapters, FAMILY, host.layers())
    return AdapterState(tensors, {}), parameter_count(adapters)


def applied_in(state: AdapterState, plan: str) -> AdapterState:
    """What block weights leave of an adapter: its layers in the plan's blocks."""
    keys = WorldHost(World.load()).layers()
    blocks, layout = Blocks.of(keys), UNetLayout.of(keys)
    weights = parse(PLANS[plan], blocks)
    on = {public_name(key, FAMILY, layout) for key in keys if weights.at(blocks.place(key))}
    return AdapterState({key: tensor for key, tensor in state.items() if key.split(".")[0] in on}, state.metadata)


def combined(*states: AdapterState) -> World:
    """The world with all of these in its weights."""
    world = World.load()
    for state in states:
        WorldHost(world).merge(state)
    return world


def distances(images: Tensor, scenes: Sequence[Scene], style: str) -> dict[str, Tensor]:
    """Name of a distance -> (B,). images: (B, 3, H, W) for prompts that ask for the character in the style; scenes: what else they ask for."""
    def to(drawings: list[list[np.ndarray]]) -> Tensor:
        """Of each picture to the nearest of its drawings."""
        return torch.stack([(images - to_tensor(drawn)).square().mean(dim=(1, 2, 3)).sqrt() for drawn in drawings]).amin(dim=0)

    own = [with_character(scene) for scene in scenes]
    others = [[draw(dataclasses.replace(scene, shape=shape), style) for scene in scenes] for shape in SHAPES]
    both, plain = [draw(scene, style) for scene in own], [draw(scene) for scene in own]
    return {"both": to([both]), "style": to([both, *others]), "character": to([both, plain])}


def recognised(row: dict) -> float:
    """Share of a row's pictures that are nearer to the character in the style than to any other shape in it."""
    return float((row["both"] <= row["style"]).float().mean())


def run(config: TrainingConfig, style: str = STYLES[0], lessons: int = 24, prompts: int = 36, sampler_steps: int = 20) -> Iterator[dict]:
    """A row for each combination: its name, (prompts,) of each distance, the style's parameters; all draws from config.seed."""
    seed = config.seed + 700
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(prompts)]
    asked = [caption(with_character(scene), demo.TRIGGER) for scene in scenes]

    def row(name: str, states: Sequence[AdapterState], parameters: int = 0) -> dict:
        images = combined(*states).sample(asked, seed=seed, steps=sampler_steps)
        return {"name": name, **distances(images, scenes, style), "parameters": parameters}

    yield row("base model", [])
    base = World.load()
    taught = lessons_of_character(lessons, config.seed + 50), lessons_of_style(lessons, config.seed + 100, style)
    character, size = learn(base, taught[0], config)
    yield row("character", [character], size)
    styles = {plan: learn(World.load(), taught[1], config, plan) for plan in PLANS}
    yield row("style", [styles["full"][0]], styles["full"][1])
    yield row("character + style, full + full", [character, styles["full"][0]], styles["full"][1])
    for level in LEVELS:
        yield row(f"trained {level}: character + style", [character, styles[level][0]], styles[level][1])
    for level in LEVELS:
        yield row(f"applied {level}: character + style", [character, applied_in(styles["full"][0], level)], styles["full"][1])
    partial, _ = learn(World.load(), taught[0], config, "upper")
    yield row("upper character + full style", [partial, styles["full"][0]], styles["full"][1])
    yield row("upper character + upper style", [partial, styles["upper"][0]], styles["upper"][1])


def verdict(rows: Sequence[dict]) -> list[str]:
    """What the rows say about each of the paper's claims, as sentences.

    Every prompt has the same noise in all rows, so that differences are taken prompt by prompt. A claim that a distance is
    smaller holds if the mean difference is below zero by two standard errors, and does not if it is above zero by as much.
    """
    at = {row["name"]: row["both"] for row in rows}
    full = at["character + style, full + full"]
    trained, applied = ({level: at[f"{word} {level}: character + style"] for level in LEVELS} for word in ("trained", "applied"))

    def says(claim: str, smaller: Tensor, larger: Tensor) -> str:
        difference = smaller - larger
        mean, error = float(difference.mean()), float(difference.std() / len(difference) ** 0.5)
        word = "Holds" if mean < -2 * error else "Does not hold" if mean > 2 * error else "Undecided"
        return f"{word} here: {claim} ({smaller.mean():.4f} against {larger.mean():.4f}, difference {mean:+.4f} ± {error:.4f})."

    return [
        *(says(f"a full character with a style trained in {level} blocks is better than full with full", trained[level], full) for level in LEVELS),
        *(says(f"upper blocks are better than {level} ones", trained["upper"], trained[level]) for level in LEVELS[1:]),
        *(says(f"{level} blocks at training are better than at inference", trained[level], applied[level]) for level in LEVELS),
    ]


def main() -> None:
    """Print the table as Markdown, and what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=demo.SETTINGS.steps)
    parser.add_argument("--style", choices=STYLES, default=STYLES[0])
    parser.add_argument("--prompts", type=int, default=36, help="scenes that are judged, which no training picture has")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the demo: the layers are too small to share
    config = dataclasses.replace(demo.SETTINGS, steps=options.steps, seed=options.seed)
    print("| combination | both | style | character | recognised | style's parameters |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = []
    for row in run(config, options.style, prompts=options.prompts):
        rows.append(row)
        print(f"| {row['name']} | {row['both'].mean():.4f} | {row['style'].mean():.4f} | {row['character'].mean():.4f} | {recognised(row):.0%} | {row['parameters'] or ''} |", flush=True)
    print("\n" + "\n".join(verdict(rows)))


if __name__ == "__main__":
    main()
