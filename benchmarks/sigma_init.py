"""How fast the first steps move, and how far a short run comes: LoRA against the starts of TriLoRA's core.

    python benchmarks/sigma_init.py [--steps 100] [--rates 1e-3 2e-3 4e-3 8e-3]

On the small world with its pretrained weights, rank 8 on the attention layers, everything else equal. Two figures: the
relative size of the update after ten steps at a constant rate, the median over layers of |dW|_F / |W0|_F (a TriLoRA and
a LoRA that move the model alike have equal ones), and the loss on fixed noise after the run at each learning rate.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from comfyui_trilora.benchmarks.world.demo import PICTURES, TRIGGER
from comfyui_trilora.benchmarks.world.host import WorldHost
from comfyui_trilora.benchmarks.world.scenes import caption, draw_set
from comfyui_trilora.benchmarks.world.world import World
from comfyui_trilora.training.config import TrainingConfig
from comfyui_trilora.training.loop import evaluate, train
from comfyui_trilora.training.plan import build_adapters
from comfyui_trilora.trilora_ops.registry import Method
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig
from comfyui_trilora.trilora_ops.residuals.trilora import TriLoraConfig

RANK = 8
METHODS = {"lora": Method(LoraConfig(RANK))} | {
    f"trilora {start}": Method(TriLoraConfig(RANK, sigma_init=start)) for start in ("svd", "svd_relative", "ones")}


def run(method: Method, config: TrainingConfig, style: str = "neon") -> tuple[float, float, float]:
    """(median |dW| / |W0|, loss on fixed noise before, after) of one run; seeded, so that only the method differs."""
    host = WorldHost(World.load())
    lessons = draw_set(PICTURES, 100, style)
    with host.session():
        samples = [host.prepare(str(i), picture, caption(scene, TRIGGER)) for i, (picture, scene) in enumerate(lessons)]
        empty = [host.prepare(str(i), picture, "") for i, (picture, _) in enumerate(lessons)]
        adapters = build_adapters(host, method, "attention", seed=0)
        before = evaluate(host, adapters, samples, config, draws=48)
        train(host, adapters, samples, empty, config)
        after = evaluate(host, adapters, samples, config, draws=48)
    with torch.no_grad():
        sizes = [float(a.residual.delta().norm() / host.weight(key).norm()) for key, a in adapters.items()]
    return statistics.median(sizes), before, after


def main() -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the demo: the layers are too small to share
    print(f"| method | size after 10 steps at 1e-3 | {' | '.join(f'loss at {rate:g}' for rate in options.rates)} |")
    print("|---|---|" + "---|" * len(options.rates))
    for name, method in METHODS.items():
        short = TrainingConfig(steps=10, learning_rate=1e-3, batch_size=8, schedule="constant", warmup=0.0)
        size = run(method, short)[0]
        losses = [run(method, TrainingConfig(steps=options.steps, learning_rate=rate, batch_size=8)) for rate in options.rates]
        print(f"| {name} | {size:.2e} | {' | '.join(f'{after:.4f}' for _, _, after in losses)} |", flush=True)
    print(f"\nLoss on fixed noise before training: {losses[0][1]:.4f}")


if __name__ == "__main__":
    main()
