"""Training Settings and Train Adapter."""

from __future__ import annotations

import json
import logging
import time

import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui

from ..training.config import TIMESTEPS, TrainingConfig
from ..training.export import export_tensors
from ..training.loop import Progress, TrainingStopped, evaluate, train
from ..training.plan import build_adapters, parameter_count
from ..training.report import describe_run, plot_loss
from ..training.schedule import SCHEDULES
from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.metadata import describe
from ..trilora_ops.targets import TARGETS
from . import compat
from .comfy_host import ComfyHost
from .comfy_patches import patches_from_state
from .load import apply_state
from .save import save_state
from .types import Dataset, EncodedDataset, LoraModel, LossMap, Method, Settings

log = logging.getLogger("trilora")


class TrainingSettingsNode(io.ComfyNode):
    """How long, how fast, how much at once."""

    @classmethod
    def define_schema(cls):
        default = TrainingConfig()
        return compat.Schema(
            node_id="TriLoRATrainingSettings",
            display_name="Training Settings",
            category="TriLoRA/train",
            description="Steps, learning rate and batch; the defaults suit a style or a subject from ten to fifty images.",
            inputs=[
                io.Int.Input("steps", default=default.steps, min=1, max=1_000_000, tooltip="Optimizer steps. 30 to 100 for each image is common."),
                io.Float.Input("learning_rate", default=default.learning_rate, min=1e-8, max=1.0, step=1e-6, round=1e-8,
                               tooltip="AdamW's learning rate at the top of the schedule."),
                io.Int.Input("batch_size", default=default.batch_size, min=1, max=256, tooltip="Images in one pass. Each keeps its own caption, noise and noise level."),
                # not "seed": the front end would add its "randomize after each run", and train anew at every queue
                io.Int.Input("training_seed", display_name="seed", default=default.seed, min=0, max=2**32 - 1, tooltip="Of every random draw: start values, order, noise, noise levels."),
                io.Combo.Input("schedule", options=list(SCHEDULES), default=default.schedule, tooltip="Course of the learning rate after the warm-up; cosine and linear end at 0."),
                compat.advanced(io.Float.Input("warmup", default=default.warmup, min=0.0, max=0.9, step=0.01, tooltip="Share of the steps over which the learning rate rises from 0.")),
                compat.advanced(io.Int.Input("accumulation", default=default.accumulation, min=1, max=1024, tooltip="Passes that make one step: a larger batch in the same memory.")),
                compat.advanced(io.Float.Input("weight_decay", default=default.weight_decay, min=0.0, max=1.0, step=0.001, round=0.0001, tooltip="AdamW's pull of the factors towards zero. Σ is exempt.")),
                compat.advanced(io.Float.Input("grad_clip", default=default.grad_clip, min=0.0, max=100.0, step=0.1, tooltip="Largest gradient norm; 0 = no limit.")),
                compat.advanced(io.Combo.Input("timesteps", options=list(TIMESTEPS), default=default.timesteps, tooltip="Which noise levels are practised: auto is uniform for eps and v models and logit-normal (mostly the middle) for flow models.")),
                compat.advanced(io.Float.Input("min_snr_gamma", default=default.min_snr_gamma, min=0.0, max=100.0, step=0.5, tooltip="Cap of the weight of nearly clean images, for eps and v models (min-SNR); 0 = off.")),
                compat.advanced(io.Float.Input("caption_dropout", default=default.caption_dropout, min=0.0, max=0.9, step=0.01, tooltip="Share of images trained with an empty prompt, which keeps guidance working.")),
                compat.advanced(io.Boolean.Input("checkpointing", default=default.checkpointing, tooltip="Compute blocks twice instead of keeping their activations: much less memory, about a third more time.")),
            ],
            outputs=[Settings.Output(display_name="settings", tooltip="For Train Adapter.")],
        )

    @classmethod
    def execute(cls, training_seed, **values) -> io.NodeOutput:
        return io.NodeOutput(TrainingConfig(seed=training_seed, **values))


class TrainAdapter(io.ComfyNode):
    """Trains and returns the adapter, the model with it, the losses and a report."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRATrainAdapter",
            display_name="Train Adapter",
            category="TriLoRA/train",
            description="Trains an adapter on a dataset. Cancelling saves what was learned so far to output/loras.",
            search_aliases=["train lora", "lora trainer", "finetune"],
            inputs=[
                io.Model.Input("model", tooltip="The model to train for. Its own weights do not change."),
                Dataset.Input("dataset", tooltip="From Training Dataset."),
                Method.Input("method", tooltip="From one of the method nodes: TriLoRA, LoRA / LoCon or Transform."),
                Settings.Input("settings", tooltip="From Training Settings."),
                io.Combo.Input("target", options=list(TARGETS), default="attention",
                               tooltip="Which layers learn. " + " ".join(f"{name}: {what}." for name, what in TARGETS.items())),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the new adapter at strength 1, for trying it out at once."),
                LoraModel.Output(display_name="adapter", tooltip="The adapter, for Save Adapter or any node that takes a LORA_MODEL."),
                LossMap.Output(display_name="loss", tooltip="The loss of every step."),
                io.String.Output(display_name="report", tooltip="What was trained, how long it took, and the loss before and after."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, dataset: EncodedDataset, method, settings: TrainingConfig, target) -> io.NodeOutput:
        # the host runs nodes in inference mode, whose tensors cannot be trained
        with torch.inference_mode(False):
            state, progress, report, fixed = run(ComfyHost(model), dataset, method, settings, target, cls.hidden.unique_id)
            adapted, _ = apply_state(state, model, None, "the trained adapter", 1.0, 0.0)
        picture = _picture(cls, progress.losses, f"{method.name}: {progress.done} steps", fixed) if progress.losses else None
        return io.NodeOutput(adapted, state, {"loss": progress.losses}, report, ui=picture)


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


def _picture(node, losses: list[float], title: str, fixed: tuple[float, float]) -> ui.PreviewImage | None:
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
