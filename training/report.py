"""What a run leaves to read: the loss as a picture, the run as a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from PIL import Image

from ..trilora_ops.inspection import aligned

_LEAST_SPAN = 10  # steps; the mean of fewer is nearly as rough as the losses themselves


def moving_average(losses: Sequence[float], span: int) -> list[float]:
    """Mean of every `span` losses in a row, the first at step `span`; empty where there are fewer losses than that."""
    sums = [0.0, *accumulate(losses)]  # one pass: a long run has a wide window
    return [(upper - lower) / span for lower, upper in zip(sums, sums[span:], strict=False)]


def plot_loss(losses: Sequence[float], title: str = "", fixed: tuple[float, float] | None = None,
              prior: Sequence[float] = ()) -> Image.Image:
    """Raw losses faint, their moving average bold; fixed: loss on fixed noise before and after, drawn as two points.

    losses: of the data, one per step, at least one. prior: the same of a regularisation set, without its weight. The moving
    averages are over a twentieth of the steps, at least 10; a run of fewer than twice that many steps has none, and its
    legend says so. Returns an RGB picture of 960 x 540 pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, span = range(1, len(losses) + 1), max(_LEAST_SPAN, len(losses) // 20)
    averaged = len(losses) >= 2 * span
    raw = "loss of each step" if averaged else "loss of each step (too few for an average)"
    axes.plot(steps, losses, color="#9db4d0", linewidth=0.8, marker="." if len(losses) == 1 else "", label=raw)
    if averaged:
        axes.plot(steps[span - 1:], moving_average(losses, span), color="#1f4e8c", linewidth=2.2, label=f"mean of {span} steps")
    if prior:
        label = f"regularisation set, mean of {span} steps" if averaged else "regularisation set, each step"
        shown = moving_average(prior, span) if averaged else prior
        axes.plot(steps[len(steps) - len(shown):], shown, color="#3a8f5c", linewidth=1.6, label=label)
    if fixed is not None:  # two measurements are no curve: no line between them
        axes.plot([1, len(losses)], fixed, "o", color="#d0661f", label="fixed noise: before, after")
    axes.set(xlabel="step", ylabel="weighted loss", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def describe_run(facts: Mapping[str, object]) -> str:
    """One line a fact, names aligned."""
    return aligned(facts)
