"""What a run leaves to read: its report, the last line on the node, and the loss curve."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import ui

from ..training.loop import Progress
from ..training.plan import describe_plan, parameter_count
from ..training.report import describe_run, plot_loss
from ..trilora_ops.message_words import counted
from .notices import given, notice


def describe_training(
    task, progress: Progress, before: list[list[float]], after: list[list[float]], seconds: float
) -> str:
    """The report of a `training_run.Run`; before, after: losses on fixed noise, draw by draw. Notices given so far come last."""
    fixed = [f"{sum(a) / len(a):.4f} before, {sum(b) / len(b):.4f} after" for a, b in zip(before, after, strict=True)]
    settings, kept = task.settings, task.regularisation
    facts = {"method": f"{task.names()}, {len(task.adapters)} layers, {parameter_count(task.adapters):,} parameters"}
    if task.plan:
        facts |= describe_plan(task.host, task.adapters, task.target, task.plan)
    if task.left_out:
        facts["left out by the target"] = ", ".join(task.left_out)
    if task.encoders:
        facts["not trained"] = f"{', '.join(task.encoders)} (text encoders)"
    facts["dataset"] = task.dataset.summary.splitlines()[0]
    if kept:
        facts["regularisation"] = f"{kept.summary.splitlines()[0]}, weight {settings.prior_weight:g}"
    facts |= {
        "steps": f"{progress.done} at {progress.rate:.2f} steps/s, {duration(seconds)} in all",
        "computed in": str(task.host.compute_dtype).removeprefix("torch."),
        "training loss": f"{loss_text(progress)} (mean of the last {counted(progress.recent, 'step')})",
        "loss on fixed noise": fixed[0],
    }
    if kept:
        facts["regularisation on fixed noise"] = fixed[1]
    facts["skipped steps"] = progress.skipped
    return "\n".join([describe_run(facts), *(f"notice: {text}" for text in given())])


def last_line(progress: Progress, seconds: float, fixed: tuple[float, float]) -> str:
    """What stands on the node when all is done."""
    return f"{progress.done} steps in {duration(seconds)} · loss on fixed noise {fixed[0]:.4f} before, {fixed[1]:.4f} after"


def loss_text(progress: Progress) -> str:
    """The mean of the last losses, with its two parts where there is a regularisation set."""
    parts = progress.smooth_parts
    return f"{progress.smooth_loss:.4f}" + (f" (data {parts[0]:.4f}, prior {parts[1]:.4f})" if parts else "")


def picture(node, progress: Progress, title: str, fixed: tuple[float, float]) -> ui.PreviewImage | None:
    """The loss curve for the node's body; None, with a notice, where it cannot be drawn."""
    try:
        pixels = (
            np.asarray(plot_loss(progress.data_losses, title, fixed, progress.prior_losses), dtype=np.float32) / 255.0
        )
        return ui.PreviewImage(torch.from_numpy(pixels)[None], cls=node)
    except Exception as error:  # a broken plotting library or a full disk must not cost the adapter
        notice(f"the loss curve could not be drawn ({error}); the adapter is complete")
        return None


def duration(seconds: float) -> str:
    """ "41 s", "3 min 07 s", "2 h 15 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
