"""What Train Adapter does: from a dataset and a method to an adapter, with its progress on the node."""

from __future__ import annotations

import json
import logging
import time

import comfy.utils
import numpy as np
import torch
from comfy_api.latest import ui

from ..training.config import TrainingConfig
from ..training.export import export_tensors
from ..training.loop import Progress, TrainingStopped, evaluate, train
from ..training.plan import build_adapters, parameter_count
from ..training.report import describe_run, plot_loss
from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.metadata import describe
from . import compat
from .comfy_host import ComfyHost
from .comfy_patches import patches_from_state
from .save import save_state
from .types import EncodedDataset

log = logging.getLogger("trilora")


def run(host: ComfyHost, dataset: EncodedDataset, method, settings: TrainingConfig, target: str, node_id: str | None):
    """(adapter, progress, report, (loss before, after) on fixed noise) of a complete run.

    A run that is stopped is saved before the reason for stopping is raised again.
    """
    started = time.perf_counter()
    compat.show_text("preparing images and layers", node_id)
    with host.session():
        samples = [host.prepare(image, image.conditioning) for image in dataset.images]
        empty = [host.prepare(image, dataset.empty) for image in dataset.images] if settings.caption_dropout else samples
        adapters = build_adapters(host, method, target, settings.seed)
        # what could not be named, saved or applied at the end must fail now, not after hours
        patches_from_state(_export(host, adapters, dataset, method, settings, Progress(settings.steps)), host.patcher, None, "the adapter")
        if settings.checkpointing and not host.blocks():
            log.warning("checkpointing: this model has no blocks known to be recomputable; it is trained without")
        log.info("training %s on %d layers, %d parameters", method.name, len(adapters), parameter_count(adapters))
        compat.show_text("measuring the loss before training", node_id)
        before = evaluate(host, adapters, samples, settings)
        try:
            progress = train(host, adapters, samples, empty, settings, _reporter(settings.steps, node_id))
            compat.show_text("measuring the loss after training", node_id)
            try:
                after = evaluate(host, adapters, samples, settings)
            except BaseException as reason:  # the host's interrupt is not an Exception
                raise TrainingStopped(progress) from reason
        except TrainingStopped as stop:
            if stop.progress.losses:  # at least one step has changed something
                state = _export(host, adapters, dataset, method, settings, stop.progress)
                path = save_state(state, f"trilora_stopped_at_{stop.progress.done}", torch.float32)
                log.warning("%s; what was learned is in %s", stop, path)
                compat.show_text(f"stopped after {stop.progress.done} of {settings.steps} steps; saved as\n{path}", node_id)
            raise stop.__cause__ from None
        state = _export(host, adapters, dataset, method, settings, progress)
        state.metadata["trilora.result"] = json.dumps({"loss_before": before, "loss_after": after})
    seconds = time.perf_counter() - started
    report = describe_run({
        "method": f"{method.name}, {len(adapters)} layers, {parameter_count(adapters):,} parameters",
        "dataset": dataset.summary.splitlines()[0],
        "steps": f"{progress.done} at {progress.rate:.2f} steps/s, {_duration(seconds)} in all",
        "training loss": f"{progress.smooth_loss:.4f} (mean of the last 20 steps)",
        "loss on fixed noise": f"{before:.4f} before, {after:.4f} after",
        "skipped steps": progress.skipped,
    })
    log.info("training done\n%s", report)
    compat.show_text(f"{progress.done} steps in {_duration(seconds)} · loss on fixed noise {before:.4f} before, {after:.4f} after", node_id)
    return state, progress, report, (before, after)


def picture(node, losses: list[float], title: str, fixed: tuple[float, float]) -> ui.PreviewImage | None:
    """The loss curve for the node's body; None, with a warning, where it cannot be drawn."""
    try:
        pixels = np.asarray(plot_loss(losses, title, fixed), dtype=np.float32) / 255.0
        return ui.PreviewImage(torch.from_numpy(pixels)[None], cls=node)
    except Exception as error:  # a broken plotting library or a full disk must not cost the adapter
        log.warning("the loss curve could not be drawn (%s); the adapter is complete", error)
        return None


def _export(host: ComfyHost, adapters, dataset: EncodedDataset, method, settings: TrainingConfig, progress: Progress) -> AdapterState:
    tensors, ranks = export_tensors(adapters, host.family(), host.layers())
    metadata = describe(method=method.name, form=method.form, options=method.options, plan=ranks,
                        family=host.family(), prediction=host.prediction, base=host.fingerprint(),
                        training=settings.as_dict(), trigger=dataset.trigger, tag_frequency=dataset.tag_frequency,
                        images=len(dataset.images), steps_done=progress.done)
    return AdapterState(tensors, metadata)


def _reporter(steps: int, node_id: str | None):
    bar, shown = comfy.utils.ProgressBar(steps), [0.0]

    def report(progress: Progress) -> None:
        bar.update_absolute(progress.done, steps)
        now = time.monotonic()
        if now - shown[0] >= 0.5 or progress.done == steps:
            shown[0] = now
            left = (steps - progress.done) / max(progress.rate, 1e-9)
            text = f"step {progress.done}/{steps} · {progress.rate:.2f} it/s · loss {progress.smooth_loss:.4f} · {_duration(left)} left"
            compat.show_text(text, node_id)
            if progress.done % max(1, steps // 20) == 0 or progress.done == steps:
                log.info("%s · learning rate %.2e · gradient %.3g", text, progress.learning_rate, progress.grad_norm)

    return report


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
