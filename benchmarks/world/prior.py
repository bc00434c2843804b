"""Prior preservation on the small world: what a style adapter makes the base model forget, by the weight of a regularisation set.

    python -m comfyui_trilora.benchmarks.world.prior [--steps 300] [--weights 0 0.1 0.3 1 3] [--trigger first]

The data recipe of Block-wise LoRA (arXiv:2403.07500): twenty pictures of a style, the trigger in front of every caption, and a
regularisation set that the base model drew itself from prompts without it. Every run starts from the same adapter, sees the
same data in the same order, and differs in w alone of loss = data + w * prior (DreamBooth, arXiv:2208.12242). Two distances,
root mean squared over pictures in [0, 1]:

* forgotten: pictures for prompts without the trigger, adapted against base, same seeds; no prompt is of either set.
* to the style: pictures for prompts with the trigger against the same scenes drawn in the style.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ...training.captions import with_trigger
from ...training.config import TrainingConfig
from ...training.export import export_tensors
from ...training.loop import evaluate, train
from ...training.plan import build_adapters
from ...trilora_ops.checkpoint import AdapterState
from ...trilora_ops.registry import Method
from . import demo
from .host import FAMILY, WorldHost
from .scenes import STYLES, caption, draw, draw_set, random_scene
from .world import World, to_tensor

LESSONS = 20
# where the trigger stands: "zxv, a red circle on ..." as the dataset nodes have it, or "a red circle on ..., in zxv style"
CAPTIONS = {"first": lambda scene: with_trigger(caption(scene), demo.TRIGGER), "last": lambda scene: caption(scene, demo.TRIGGER)}
Captioned = tuple[np.ndarray, str]  # (H, W, 3) uint8 picture, prompt


def drawn_by_the_model(world: World, count: int, seed: int, steps: int = 20) -> list[Captioned]:
    """A regularisation set: `count` pictures of the base model for prompts of random scenes, without a trigger."""
    rng = np.random.default_rng(seed)
    prompts = [caption(random_scene(rng)) for _ in range(count)]
    images = world.sample(prompts, seed=seed * 1000, steps=steps)
    return [(pixels, prompt) for pixels, prompt in zip((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), prompts, strict=True)]


def learn(world: World, lessons: Sequence[Captioned], kept: Sequence[Captioned], config: TrainingConfig,
          method: Method = demo.METHOD, target: str = demo.TARGET) -> tuple[AdapterState, dict[str, float]]:
    """An adapter trained on `lessons` with the regularisation set `kept`, and its losses on fixed noise after training."""
    host = WorldHost(world)
    with host.session():
        (data, empty), (prior, prior_empty) = (
            ([host.prepare(f"{i}", picture, prompt) for i, (picture, prompt) in enumerate(pairs)],
             [host.prepare(f"{i}", picture, "") for i, (picture, _) in enumerate(pairs)])
            for pairs in (lessons, kept)
        )
        adapters = build_adapters(host, method, target, config.seed)
        train(host, adapters, data, empty, config, prior=prior, prior_empty=prior_empty)
        losses = {"data": evaluate(host, adapters, data, config, draws=24), "prior": evaluate(host, adapters, prior, config, draws=24)}
    tensors, _ = export_tensors(adapters, FAMILY, host.layers())
    return AdapterState(tensors, {}), losses


def adapted(state: AdapterState) -> World:
    """The world with an adapter in its weights."""
    world = World.load()
    WorldHost(world).merge(state)
    return world


def run(weights: Sequence[float], config: TrainingConfig, style: str = STYLES[0], trigger: str = "first", lessons: int = LESSONS,
        kept: int = 120, prompts: int = 48, sampler_steps: int = 20) -> Iterator[dict[str, float]]:
    """One row for the base model, then one for each weight; all draws from config.seed.

    trigger: a key of CAPTIONS; lessons, kept: pictures of the style and of the regularisation set; prompts: scenes that are
    judged, which neither has.
    """
    taught_with = CAPTIONS[trigger]
    world, seed = World.load(), config.seed + 300
    pairs = [(picture, taught_with(scene)) for picture, scene in draw_set(lessons, config.seed + 100, style)]
    own = drawn_by_the_model(world, kept, config.seed + 200, sampler_steps)
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(prompts)]
    plain, taught = [caption(scene) for scene in scenes], [taught_with(scene) for scene in scenes]
    as_before = world.sample(plain, seed=seed, steps=sampler_steps)
    in_the_style = to_tensor([draw(scene, style) for scene in scenes])

    def judged(other: World) -> dict[str, float]:
        return {"forgotten": demo.distance(other.sample(plain, seed=seed, steps=sampler_steps), as_before),
                "to the style": demo.distance(other.sample(taught, seed=seed, steps=sampler_steps), in_the_style)}

    yield judged(world)
    for weight in weights:
        started = time.perf_counter()
        state, losses = learn(world, pairs, own, dataclasses.replace(config, prior_weight=weight))
        yield {"weight": weight, "seconds": time.perf_counter() - started, **losses, **judged(adapted(state))}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 0.3, 1.0, 3.0], help="of the regularisation set; 0 is a run without it")
    parser.add_argument("--trigger", choices=CAPTIONS, default="first", help="where it stands in a caption")
    parser.add_argument("--lessons", type=int, default=LESSONS, help="pictures of the style")
    parser.add_argument("--kept", type=int, default=120, help="pictures of the regularisation set")
    parser.add_argument("--style", choices=STYLES, default=STYLES[0])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the demo: the layers are too small to share
    config = dataclasses.replace(demo.SETTINGS, steps=options.steps, seed=options.seed)
    print("| w | forgotten | to the style | data loss | prior loss | training |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in run(options.weights, config, options.style, options.trigger, options.lessons, options.kept):
        name = "base model" if "weight" not in row else f"{row['weight']:g}" if row["weight"] else "no set"
        rest = f"{row['data']:.4f} | {row['prior']:.4f} | {row['seconds']:.0f} s" if "weight" in row else "| |"
        print(f"| {name} | {row['forgotten']:.4f} | {row['to the style']:.4f} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
