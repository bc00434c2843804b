"""What Train Adapter does: from a dataset and a method to an adapter, with its progress on the node."""

from __future__ import annotations

import json
import logging
import math
import time

import comfy.utils
import numpy as np
import torch
from comfy_api.latest import ui

from ..training.config import TrainingConfig
from ..training.export import export_tensors
from ..training.loop import Progress, TrainingStopped, evaluate, train
from ..training.plan import build_adapters, check_plan, describe_plan, learning_rates, parameter_count
from ..training.report import describe_run, plot_loss
from ..trilora_ops.block_plan import METADATA, BlockPlan, ReadPlan, to_metadata
from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.metadata import describe
from . import compat
from .block_plan import blocks_of
from .block_presets import user_presets
from .comfy_host import ComfyHost
from .comfy_patches import patches_from_state
from .files import save_state
from .types import EncodedDataset

log = logging.getLogger("trilora")


def run(host: ComfyHost, dataset: EncodedDataset, method, settings: TrainingConfig, target: str, node_id: str | None,
        plan: BlockPlan | None = None, regularisation: EncodedDataset | None = None):
    """(adapter, progress, report, (loss before, after) on fixed noise) of a complete run.

    plan: which of the target's layers are trained, and how; None = all of them, with the method as it is. regularisation:
    what the adapter shall not change, for loss = data + prior_weight * prior; None = no such part. A run that is stopped is
    saved before the reason for stopping is raised again.
    """
    started = time.perf_counter()
    read = None
    if plan:
        with user_presets() as presets:
            read = plan.read(blocks_of(host.model), method, presets)
    left_out = check_plan(host, target, read) if read else []
    if left_out:
        log.warning("block plan: target=%r has no layer in %s; a wider target has", target, ", ".join(left_out))
    encoders = read.text_encoders() if read else []
    if encoders:
        log.warning("block plan: text encoders are not trained: %s counts for nothing", ", ".join(encoders))
    kept = regularisation if settings.prior_weight else None
    compat.show_text("preparing images and layers", node_id)
    with host.session():
        samples, empty = _samples(host, dataset, settings)
        prior, prior_empty = _samples(host, kept, settings) if kept else ([], [])
        adapters = build_adapters(host, method, target, settings.seed, read)
        # what could not be named, saved or applied at the end must fail now, not after hours
        patches_from_state(_export(host, adapters, dataset, kept, method, read, settings, Progress(settings.steps)), host.patcher, None, "the adapter")
        if settings.checkpointing and not host.blocks():
            log.warning("checkpointing: this model has no blocks known to be recomputable; it is trained without")
        log.info("training %s on %d layers, %d parameters", _names(adapters, method, read), len(adapters), parameter_count(adapters))
        compat.show_text("measuring the loss before training", node_id)
        before = [evaluate(host, adapters, each, settings) for each in (samples, prior) if each]
        try:
            progress = train(host, adapters, samples, empty, settings, _reporter(settings.steps, node_id), prior=prior, prior_empty=prior_empty,
                             rates=learning_rates(adapters, read))
            compat.show_text("measuring the loss after training", node_id)
            try:
                after = [evaluate(host, adapters, each, settings) for each in (samples, prior) if each]
            except BaseException as reason:  # the host's interrupt is not an Exception
                raise TrainingStopped(progress) from reason
        except TrainingStopped as stop:
            if stop.progress.losses:  # at least one step has changed something
                state = _export(host, adapters, dataset, kept, method, read, settings, stop.progress)
                path = save_state(state, f"trilora_stopped_at_{stop.progress.done}", torch.float32)
                log.warning("%s; what was learned is in %s", stop, path)
                compat.show_text(f"stopped after {stop.progress.done} of {settings.steps} steps; saved as\n{path}", node_id)
            raise stop.__cause__ from None
        state = _export(host, adapters, dataset, kept, method, read, settings, progress)
        result = {"loss_before": before[0], "loss_after": after[0]}
        if kept:
            result |= {"prior_before": before[1], "prior_after": after[1]}
        state.metadata["trilora.result"] = json.dumps(result)
    if not all(map(math.isfinite, after)):
        log.warning("the loss is not a number after the last step: the adapter is of no use; train again with a lower learning rate")
    seconds = time.perf_counter() - started
    report = describe_run({
        "method": f"{_names(adapters, method, read)}, {len(adapters)} layers, {parameter_count(adapters):,} parameters",
        **(describe_plan(host, adapters, target, read) if read else {}),
        **({"left out by the target": ", ".join(left_out)} if left_out else {}),
        **({"not trained": f"{', '.join(encoders)} (text encoders)"} if encoders else {}),
        "dataset": dataset.summary.splitlines()[0],
        **({"regularisation": f"{kept.summary.splitlines()[0]}, weight {settings.prior_weight:g}"} if kept else {}),
        "steps": f"{progress.done} at {progress.rate:.2f} steps/s, {_duration(seconds)} in all",
        "computed in": str(host.compute_dtype).removeprefix("torch."),
        "training loss": f"{_loss(progress)} (mean of the last 20 steps)",
        "loss on fixed noise": f"{before[0]:.4f} before, {after[0]:.4f} after",
        **({"regularisation on fixed noise": f"{before[1]:.4f} before, {after[1]:.4f} after"} if kept else {}),
        "skipped steps": progress.skipped,
    })
    log.info("training done\n%s", report)
    compat.show_text(f"{progress.done} steps in {_duration(seconds)} · loss on fixed noise {before[0]:.4f} before, {after[0]:.4f} after", node_id)
    return state, progress, report, (before[0], after[0])


def _samples(host: ComfyHost, dataset: EncodedDataset, settings: TrainingConfig) -> tuple[list, list]:
    """The images for the loop, with their captions and with the empty prompt."""
    samples = [host.prepare(image, image.conditioning) for image in dataset.images]
    return samples, [host.prepare(image, dataset.empty) for image in dataset.images] if settings.caption_dropout else samples


def _loss(progress: Progress) -> str:
    parts = progress.smooth_parts
    return f"{progress.smooth_loss:.4f}" + (f" (data {parts[0]:.4f}, prior {parts[1]:.4f})" if parts else "")


def picture(node, progress: Progress, title: str, fixed: tuple[float, float]) -> ui.PreviewImage | None:
    """The loss curve for the node's body; None, with a warning, where it cannot be drawn."""
    try:
        pixels = np.asarray(plot_loss(progress.data_losses, title, fixed, progress.prior_losses), dtype=np.float32) / 255.0
        return ui.PreviewImage(torch.from_numpy(pixels)[None], cls=node)
    except Exception as error:  # a broken plotting library or a full disk must not cost the adapter
        log.warning("the loss curve could not be drawn (%s); the adapter is complete", error)
        return None


def _export(host: ComfyHost, adapters, dataset: EncodedDataset, kept: EncodedDataset | None, method, plan: ReadPlan | None, settings: TrainingConfig,
            progress: Progress) -> AdapterState:
    tensors, ranks = export_tensors(adapters, host.family(), host.layers())
    used = _methods(adapters, method, plan)
    form = next((m.form for m in used.values() if m.form != "svd"), "svd")  # one transform, and the file needs this extension
    first = method if method.name in used else next(iter(used.values()))
    metadata = describe(method=", ".join(used), form=form, options=first.options, plan=ranks,
                        family=host.family(), prediction=host.prediction, base=host.fingerprint(),
                        training=settings.as_dict(), trigger=dataset.trigger, tag_frequency=dataset.tag_frequency,
                        folders=dataset.folders(), steps_done=progress.done, regularisation=kept.folders() if kept else {})
    return AdapterState(tensors, metadata if plan is None else {**metadata, METADATA: to_metadata(plan.canonical())})


def _methods(adapters, method, plan: ReadPlan | None) -> dict:
    """Name -> method of those that the layers are trained with, in the model's order."""
    return {method.name: method} if plan is None else {m.name: m for m in (plan.at(key).method for key in adapters)}


def _names(adapters, method, plan: ReadPlan | None) -> str:
    return ", ".join(_methods(adapters, method, plan))


def _reporter(steps: int, node_id: str | None):
    bar, shown = comfy.utils.ProgressBar(steps), [0.0]

    def report(progress: Progress) -> None:
        bar.update_absolute(progress.done, steps)
        now = time.monotonic()
        shows, logs = now - shown[0] >= 0.5 or progress.done == steps, progress.done % max(1, steps // 20) == 0 or progress.done == steps
        if shows or logs:
            left = (steps - progress.done) / max(progress.rate, 1e-9)
            text = f"step {progress.done}/{steps} · {progress.rate:.2f} it/s · loss {_loss(progress)} · {_duration(left)} left"
        if shows:
            shown[0] = now
            compat.show_text(text, node_id)
        if logs:
            log.info("%s · learning rate %.2e · gradient %.3g", text, progress.learning_rate, progress.grad_norm)

    return report


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
