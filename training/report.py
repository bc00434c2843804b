"""What a run leaves to read: the loss as a picture, the run as a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from ..trilora_ops.inspection import aligned


def smooth(losses: Sequence[float], span: int) -> list[float]:
    """Exponential moving average with a memory of `span` steps, corrected at the start."""
    decay, average, result = 1.0 - 1.0 / max(1, span), 0.0, []
    for step, loss in enumerate(losses, start=1):
        average = decay * average + (1 - decay) * loss if span > 1 else loss
        result.append(average / (1 - decay**step) if span > 1 else loss)
    return result


def plot_loss(losses: Sequence[float], title: str = "", fixed: tuple[float, float] | None = None,
              prior: Sequence[float] = ()) -> Image.Image:
    """Raw losses faint, their moving average bold; fixed: loss on fixed noise before and after, drawn as end points.

    losses: of the data, one per step, at least one. prior: the same of a regularisation set, without its weight; its moving
    average is drawn too. Returns an RGB picture of 960 x 540 pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, span = range(1, len(losses) + 1), max(1, len(losses) // 20)
    axes.plot(steps, losses, color="#9db4d0", linewidth=0.8, label="loss of each step")
    axes.plot(steps, smooth(losses, span), color="#1f4e8c", linewidth=2.2, label="moving average")
    if prior:
        axes.plot(steps, smooth(prior, span), color="#3a8f5c", linewidth=1.6, label="regularisation set")
    if fixed is not None:
        axes.plot([1, len(losses)], fixed, "o--", color="#d0661f", linewidth=1.4, label="fixed noise: before, after")
    axes.set(xlabel="step", ylabel="weighted loss", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def describe_run(facts: Mapping[str, object]) -> str:
    """One line a fact, names aligned."""
    return aligned(facts)
