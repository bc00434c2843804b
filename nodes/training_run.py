"""What Train Adapter does: from a dataset and a method to an adapter, with its progress on the node."""

from __future__ import annotations

import json
import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import comfy.utils

from ..training.config import TrainingConfig
from ..training.export import export_tensors
from ..training.findings import diverged, judge
from ..training.loop import Progress, TrainingStopped, fixed_noise_losses, train
from ..training.plan import build_adapters, check_plan, learning_rates, parameter_count
from ..trilora_ops.adapter import Adapter
from ..trilora_ops.block_plan import METADATA, BlockPlan, ReadPlan, to_metadata
from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.metadata import describe
from ..trilora_ops.registry import Method
from . import compat
from .block_plan import blocks_of
from .block_presets import user_presets
from .comfy_host import ComfyHost
from .comfy_patches import patches_from_state
from .kept_file import KeptFile
from .notices import notice
from .training_inputs import check_first_losses, fitting, samples_of
from .training_report import describe_training, duration, loss_text
from .types import EncodedDataset

log = logging.getLogger("trilora")
Losses = list[list[float]]  # on fixed noise, of the data and, where there is one, of the regularisation set


@dataclass
class Run:
    """What one run is asked for, and what its parts share.

    plan: None = all layers of the target, with the method as it is. regularisation: None = no such part of the loss.
    left_out: what the plan asks for and the target has no layer for. encoders: text encoders that the plan names.
    """

    host: ComfyHost
    dataset: EncodedDataset
    method: Method
    settings: TrainingConfig
    target: str
    regularisation: EncodedDataset | None = None
    plan: ReadPlan | None = None
    left_out: list[str] = field(default_factory=list)
    encoders: list[str] = field(default_factory=list)
    adapters: dict[str, Adapter] = field(default_factory=dict)

    def read(self, plan: BlockPlan) -> None:
        """Take a block plan; what of it counts for nothing is a notice. Raises TriLoRAError where it cannot be read or trains nothing."""
        with user_presets() as presets:
            self.plan = plan.read(blocks_of(self.host.model), self.method, presets)
        self.left_out = check_plan(self.host, self.target, self.plan)
        if self.left_out:
            notice(f"block plan: target={self.target!r} has no layer in {', '.join(self.left_out)}; a wider target has")
        self.encoders = self.plan.text_encoders()
        if self.encoders:
            notice(f"block plan: text encoders are not trained; ignored: {', '.join(self.encoders)}")

    def build(self) -> None:
        """Make the adapters. What could not be named, saved or applied at the end fails here, not after hours."""
        self.adapters = build_adapters(self.host, self.method, self.target, self.settings.seed, self.plan)
        patches_from_state(self.export(Progress(self.settings.steps)), self.host.patcher, None, "the adapter")
        if self.settings.checkpointing and not self.host.blocks():
            notice("checkpointing: this model has no blocks known to be recomputable; it is trained without")
        log.info("training %s on %d layers, %d parameters", self.names(), len(self.adapters), parameter_count(self.adapters))

    def methods(self) -> dict[str, Method]:
        """Name -> method of those that the layers are trained with, in the model's order."""
        if self.plan is None:
            return {self.method.name: self.method}
        return {m.name: m for m in (self.plan.at(key).method for key in self.adapters)}

    def names(self) -> str:
        """The same as text."""
        return ", ".join(self.methods())

    def export(self, progress: Progress) -> AdapterState:
        """The adapters as they are now, as the file's tensors and metadata."""
        host, used = self.host, self.methods()
        tensors, ranks = export_tensors(self.adapters, host.family(), host.layers())
        form = next((m.form for m in used.values() if m.form != "svd"), "svd")  # one transform, and the file needs this extension
        first = self.method if self.method.name in used else next(iter(used.values()))
        metadata = describe(method=", ".join(used), form=form, options=first.options, plan=ranks,
                            family=host.family(), prediction=host.prediction, base=host.fingerprint(),
                            training=self.settings.as_dict(), trigger=self.dataset.trigger, tag_frequency=self.dataset.tag_frequency,
                            folders=self.dataset.folders(), steps_done=progress.done,
                            regularisation=self.regularisation.folders() if self.regularisation else {})
        return AdapterState(tensors, metadata if self.plan is None else {**metadata, METADATA: to_metadata(self.plan.canonical())})

    def learned(self, progress: Progress) -> AdapterState:
        """`export` of adapters that have been trained. Raises TriLoRAError where they hold values that nothing can take."""
        self.check_values()
        return self.export(progress)

    def check_values(self) -> None:
        """Raise TriLoRAError where the training has diverged."""
        if text := diverged(self.adapters, self.settings):
            raise TriLoRAError(text)

    def losses(self, sets: list[list]) -> Losses:
        """On fixed noise, of every set that has samples."""
        return [fixed_noise_losses(self.host, self.adapters, each, self.settings) for each in sets if each]


def run(host: ComfyHost, dataset: EncodedDataset, method: Method, settings: TrainingConfig, target: str, node_id: str | None,
        plan: BlockPlan | None = None, regularisation: EncodedDataset | None = None, kept: KeptFile | None = None):
    """(adapter, progress, report, (loss before, after) on fixed noise) of a complete run.

    plan: which of the target's layers are trained, and how; None = all of them, with the method as it is. regularisation:
    what the adapter shall not change, for loss = data + prior_weight * prior; None = no such part. kept: holds what was
    learned while more follows; None = until this function returns. A run that ends with an exception after its first step
    leaves a file, and the exception says where.
    """
    started = time.perf_counter()
    task = Run(host, dataset, method, settings, target, regularisation if settings.prior_weight else None)
    for text in host.left_out:
        notice(text)
    if plan:
        task.read(plan)
    with KeptFile(node_id) if kept is None else nullcontext(kept) as file:
        state, progress, before, after = _trained(task, node_id, file)
        state.metadata["trilora.result"] = json.dumps(_result(before, after))
        report = describe_training(task, progress, before, after, time.perf_counter() - started)
        log.info("training done\n%s", report)
    return state, progress, report, (mean(before[0]), mean(after[0]))


def _trained(task: Run, node_id: str | None, file: KeptFile) -> tuple[AdapterState, Progress, Losses, Losses]:
    """(adapter, progress, losses before, losses after); what was learned is in the file before anything else can fail."""
    host, settings = task.host, task.settings
    compat.show_text("preparing images and layers", node_id)
    with host.session():
        samples, empty = samples_of(host, task.dataset, settings, "dataset")
        prior, prior_empty = samples_of(host, task.regularisation, settings, "regularisation")
        task.build()
        compat.show_text("measuring the loss before training", node_id)
        with fitting("dataset", "its images and captions"):
            before = task.losses([samples, prior])
        check_first_losses(before, host)
        try:
            progress = train(host, task.adapters, samples, empty, settings, _reporter(settings.steps, node_id), prior=prior,
                             prior_empty=prior_empty, rates=learning_rates(task.adapters, task.plan))
        except TrainingStopped as stop:
            done = stop.progress
            if done.losses:  # at least one step has changed something
                file.rescue(f"trilora_stopped_at_{done.done}", f"stopped after {done.done} of {done.steps} steps", lambda: task.learned(done))
            raise stop.__cause__ from None
        task.check_values()
        state = file.keep(f"trilora_finished_at_{progress.done}", f"all {progress.done} steps are done", lambda: task.export(progress))
        compat.show_text("measuring the loss after training", node_id)
        after = task.losses([samples, prior])
        blocks = blocks_of(host.model)
        for text in judge(task.adapters, lambda key: blocks.place(key).block, before, after, progress, settings):
            notice(text)
    return state, progress, before, after


def mean(losses: list[float]) -> float:
    """Of the draws on fixed noise."""
    return sum(losses) / len(losses)


def _result(before: Losses, after: Losses) -> dict[str, float]:
    found = {"loss_before": mean(before[0]), "loss_after": mean(after[0])}
    return found if len(before) < 2 else found | {"prior_before": mean(before[1]), "prior_after": mean(after[1])}


def _reporter(steps: int, node_id: str | None):
    bar, shown = comfy.utils.ProgressBar(steps), [0.0]

    def report(progress: Progress) -> None:
        bar.update_absolute(progress.done, steps)
        now = time.monotonic()
        shows, logs = now - shown[0] >= 0.5 or progress.done == steps, progress.done % max(1, steps // 20) == 0 or progress.done == steps
        if shows or logs:
            left = (steps - progress.done) / max(progress.rate, 1e-9)
            text = f"step {progress.done}/{steps} · {progress.rate:.2f} it/s · loss {loss_text(progress)} · {duration(left)} left"
        if shows:
            shown[0] = now
            compat.show_text(text, node_id)
        if logs:
            log.info("%s · learning rate %.2e · gradient %.3g", text, progress.learning_rate, progress.grad_norm)

    return report
