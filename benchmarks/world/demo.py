"""`trilora demo`: teach the small world a new style from a handful of pictures, without ComfyUI."""

from __future__ import annotations

import dataclasses
import json
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...training.captions import tag_frequency
from ...training.config import TrainingConfig
from ...training.export import export_tensors
from ...training.loop import TrainingStopped, evaluate, train
from ...training.plan import build_adapters, parameter_count
from ...training.report import plot_loss
from ...trilora_ops.checkpoint import AdapterState, read_adapter, write_adapter
from ...trilora_ops.metadata import describe
from ...trilora_ops.registry import Method
from ...trilora_ops.residuals.trilora import TriLoraConfig
from .host import FAMILY, WorldHost
from .scenes import STYLES, Scene, caption, draw, draw_set
from .world import World, to_tensor

TRIGGER = "zxv"
PICTURES = 12
# in the model's own precision, so that every machine learns the same; layers as small as these gain nothing by bf16
SETTINGS = TrainingConfig(steps=200, batch_size=8, learning_rate=6e-3, caption_dropout=0.1, seed=0, precision="model")
METHOD = Method(TriLoraConfig(rank=8))
TARGET = "transformer"
# scenes that are in no training picture, in the order of the columns
HELD_OUT = (Scene("star", "yellow", "solid", "blue", "centre"), Scene("ring", "red", "solid", "white", "top left"),
            Scene("cross", "pink", "striped", "green", "bottom right"), Scene("triangle", "cyan", "solid", "grey", "centre"),
            Scene("square", "orange", "checked", "sky", "top right"), Scene("circle", "green", "dotted", "sunset", "bottom left"))


def run(output: Path, style: str = STYLES[0], seed: int = 0, on_step=lambda progress: None) -> dict:
    """Train, save, apply the saved file, draw; returns the report that is written as report.json.

    output: folder for adapter.safetensors, before_after.png, loss.png and report.json (created; files replaced).
    style: one of scenes.STYLES, none of which the world has seen. on_step: called with the engine's Progress.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)  # the world's layers are too small to share: two threads mostly wait for each other
    output.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.replace(SETTINGS, seed=seed)
    world = World.load()
    host = WorldHost(world)
    lessons = [(picture, caption(scene, TRIGGER)) for picture, scene in draw_set(PICTURES, seed + 100, style)]
    with host.session():
        samples = [host.prepare(f"{i:02}", picture, prompt) for i, (picture, prompt) in enumerate(lessons)]
        empty = [host.prepare(sample.name, picture, "") for sample, (picture, _) in zip(samples, lessons, strict=True)]
        adapters = build_adapters(host, METHOD, TARGET, seed)
        before = evaluate(host, adapters, samples, settings, draws=24)
        try:
            progress = train(host, adapters, samples, empty, settings, on_step)
        except TrainingStopped as stop:
            raise stop.__cause__ from None
        after = evaluate(host, adapters, samples, settings, draws=24)
    tensors, ranks = export_tensors(adapters, FAMILY, host.layers())
    metadata = describe(method=METHOD.name, form=METHOD.form, options=METHOD.options, plan=ranks, family="the small world", prediction=host.prediction,
                        base=host.fingerprint(), training=settings.as_dict(), trigger=TRIGGER,
                        tag_frequency=tag_frequency(prompt for _, prompt in lessons), folders={style: {"n_repeats": 1, "img_count": len(lessons)}}, steps_done=progress.done)
    file = output / "adapter.safetensors"
    file.unlink(missing_ok=True)
    write_adapter(file, AdapterState(tensors, metadata), torch.float16)

    adapted = World.load()
    WorldHost(adapted).merge(read_adapter(file))
    prompts = [caption(scene, TRIGGER) for scene in HELD_OUT]
    without, with_adapter = (model.sample(prompts, seed=seed + 7) for model in (world, adapted))
    wanted = to_tensor([draw(scene, style) for scene in HELD_OUT])
    draw_before_after(output / "before_after.png", to_tensor([picture for picture, _ in lessons[:len(HELD_OUT)]]),
                      {"before": without, "after": with_adapter}, prompts, style)
    plot_loss(progress.losses, f"{METHOD.name}, rank {METHOD.residual.rank}: the style '{style}' from {PICTURES} pictures", (before, after)).save(output / "loss.png")
    report = {
        "method": METHOD.name, "rank": METHOD.residual.rank, "layers": len(adapters), "parameters": parameter_count(adapters),
        "style": style, "pictures": PICTURES, "trigger": TRIGGER, "steps": progress.done, "steps_per_second": round(progress.rate, 2),
        "loss_on_fixed_noise": {"before": round(before, 5), "after": round(after, 5)},
        "distance_to_the_style": {"before": distance(without, wanted), "after": distance(with_adapter, wanted)},
        "adapter_bytes": file.stat().st_size, "seconds": round(time.perf_counter() - started, 1),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def distance(images: Tensor, wanted: Tensor) -> float:
    """Root mean squared difference of pictures in [0, 1] to the same scenes drawn in the style, (B, 3, H, W) both."""
    return round(float((images - wanted).square().mean().sqrt()), 4)


def draw_before_after(path: Path, lessons: Tensor, rows: dict[str, Tensor], prompts: list[str], style: str) -> None:
    """Training pictures on top, then a row for each entry of `rows`: (B, 3, H, W) in [0, 1], one column a prompt."""
    from matplotlib.figure import Figure

    columns = len(prompts)
    every = {f"learned from\n(first {columns})": lessons, **rows}
    figure = Figure(figsize=(1.75 * columns + 1.2, 1.75 * len(every) + 1.3), dpi=100, layout="constrained")
    grid = figure.subplots(len(every), columns, squeeze=False)
    for axes, (label, images) in zip(grid, every.items(), strict=True):
        for ax, image in zip(axes, images, strict=True):
            ax.imshow(np.asarray(image.permute(1, 2, 0)), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label, fontsize=10)
    for ax, prompt in zip(grid[-1], prompts, strict=True):
        ax.set_xlabel(_wrapped(prompt), fontsize=8)
    figure.suptitle(f"The style '{style}', taught with the word '{TRIGGER}'; same seeds before and after", fontsize=12)
    figure.savefig(path)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 24))
