"""Pretrain the small world: ``python -m comfyui_trilora.benchmarks.world.pretrain --help``.

Minimises E[w(sigma) |x0_hat - x0|^2] with t uniform, w = min(1 + 1/sigma^2, cap), on
scenes drawn from a seed, with AdamW, a cosine learning rate after a warm-up, and an
exponential moving average of the weights, which is what is saved.  Same arguments,
same versions and same thread count give the same weights.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import autoencoder
from .diffusion import SIGMAS, TIMESTEPS, add_noise, loss_weight
from .scenes import caption, draw_set
from .world import WEIGHTS, World, picture_grid, to_tensor

#: Share of captions replaced by "", for classifier-free guidance (arXiv:2207.12598).
CAPTION_DROPOUT = 0.1
#: Share of captions without the position, so that it need not be said.
NO_POSITION = 0.1
#: Share of captions with an unknown "in ... style": it must change nothing until taught.
RARE_WORD = 0.15
EMA_DECAY = 0.999
PREVIEW = (
    "a red circle on a blue background, centre",
    "a yellow star on a black background, top left",
    "a striped green square on a white background, bottom right",
    "a pink ring on a sky background, centre",
    "a checked orange triangle on a grey background, top right",
    "a dotted blue cross on a yellow background, bottom left",
    "a cyan star on a sunset background, centre",
    "a purple square on a green background, top right",
)


def initialise(world):
    """Zero the last layer of every residual branch, as SD does before training."""
    for name, parameter in world.unet.named_parameters():
        if name.startswith("out.2.") or ".out_layers.3." in name or ".proj_out." in name:
            torch.nn.init.zeros_(parameter)


def batch_captions(scenes, generator):
    """Captions of a batch with the three kinds of corruption above, drawn from ``generator``."""
    rolls = torch.rand(len(scenes), 3, generator=generator).tolist()
    words = torch.randint(10**6, (len(scenes),), generator=generator).tolist()
    return [
        ""
        if drop < CAPTION_DROPOUT
        else caption(scene, style=f"w{word}" if rare < RARE_WORD else None, position=place >= NO_POSITION)
        for scene, (drop, place, rare), word in zip(scenes, rolls, words, strict=True)
    ]


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up to ``peak``, then a cosine down to 2 % of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


def training_loss(world, images, captions, generator):
    """The weighted x0 error of one batch.  images: (B, 3, H, W) in [0, 1]."""
    x0 = autoencoder.encode(images)
    noise = torch.randn(x0.shape, generator=generator)
    sigma = SIGMAS[torch.randint(TIMESTEPS, (len(x0),), generator=generator)]
    estimate = world.denoise(add_noise(x0, noise, sigma), sigma, world.encode_text(captions))
    return (loss_weight(sigma) * (estimate - x0).square().mean(dim=(1, 2, 3))).mean()


def save_preview(world, path):
    """Eight fixed prompts, two seeds each, as a PNG."""
    images = world.sample(list(PREVIEW) * 2, seed=1)
    Image.fromarray(picture_grid(images, columns=len(PREVIEW))).save(path)


def pretrain(steps, stop, batch, peak, pool, seed, output, preview, report=100, keep=500):
    """Train from scratch for ``stop`` steps of a schedule made for ``steps``, printing the loss.

    Writes the averaged weights to ``output`` and pictures to ``preview`` every ``keep`` steps.
    """
    torch.manual_seed(seed)  # the modules' initial weights draw from the global generator
    world = World()
    initialise(world)
    world.to(memory_format=torch.channels_last)  # the same function; a third faster on a CPU
    ema = copy.deepcopy(world).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed + 1)

    drawn = draw_set(pool, seed + 2)
    pictures = np.stack([picture for picture, _ in drawn])
    scenes = [scene for _, scene in drawn]

    matrices = [p for p in world.parameters() if p.ndim > 1]
    vectors = [p for p in world.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.99)
    )
    parameters = matrices + vectors
    averages = list(ema.parameters())
    total, started = 0.0, time.monotonic()
    for step in range(stop):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup=min(200, steps // 10 + 1))
        rows = torch.randint(pool, (batch,), generator=generator).numpy()
        loss = training_loss(
            world, to_tensor(pictures[rows]), batch_captions([scenes[r] for r in rows], generator), generator
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, parameter in zip(averages, world.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
        total += loss.item()
        if (step + 1) % report == 0:
            print(f"step {step + 1} loss {total / report:.5f} seconds {time.monotonic() - started:.0f}", flush=True)
            total = 0.0
        if (step + 1) % keep == 0 or step + 1 == stop:
            ema.save(output)
            save_preview(ema, preview)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6600, help="length of the learning rate's schedule")
    parser.add_argument(
        "--stop", type=int, default=4500, help="steps actually made; the bundled weights are those of 4500"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--pool", type=int, default=30000, help="number of scenes drawn beforehand")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--preview", type=Path, required=True, help="PNG of sampled pictures")
    args = parser.parse_args()
    if not 1 <= args.stop <= args.steps:
        parser.error(f"--stop {args.stop}: must be 1 to --steps {args.steps}, where the schedule ends")
    torch.set_num_threads(args.threads)
    pretrain(args.steps, args.stop, args.batch, args.lr, args.pool, args.seed, args.output, args.preview)


if __name__ == "__main__":
    main()
