"""What Inspect Adapter draws: spectra, energy, effective rank and size, one picture of 1600 x 1200 each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from ..trilora_ops.analysis import LayerFacts, by_block

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8a8a8a"  # told apart with any colour vision (Okabe and Ito)
_NAMED_LAYERS = 40  # up to here every layer has room for its name
_UPRIGHT = 12  # up to here block names stand horizontally
_LINE = 0.0145  # height of a line of text as a share of the axis
_DECADES = 4.0  # of singular values told apart


def draw(layers: Sequence[LayerFacts], title: str) -> list[Image.Image]:
    """One RGB picture of 1600 x 1200 a subject: those that these layers have something for, the size always.

    layers: at least one, in the order in which they are drawn.
    """
    spectra = [layer for layer in layers if layer.rank]
    changed = [layer for layer in layers if layer.change is not None]
    pictures = []
    if spectra:
        pictures += [_picture(f"{title}\nsingular values of every layer", _heat_map, spectra),
                     _picture(f"{title}\nshare of the energy ‖R‖² by block", _energy, spectra),
                     _picture(f"{title}\neffective rank of every layer: exp of the entropy of σ²", _effective_rank, spectra)]
    if changed:
        pictures.append(_picture(f"{title}\nchange by the transform of every layer", _change, changed))
    return [*pictures, _picture(f"{title}\nsize by block", _size, layers)]


def _picture(title: str, fill: Callable, layers: Sequence[LayerFacts]) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 12), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.2, h_pad=0.2)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(labelsize=15)
    axes.set_title(title, fontsize=22, pad=16, parse_math=False)  # a file's own name is no formula
    fill(axes, layers)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(18)
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def _heat_map(axes, layers: Sequence[LayerFacts]) -> None:
    values = np.full((max(layer.rank for layer in layers), len(layers)), np.nan)
    for column, layer in enumerate(layers):
        values[:layer.rank, column] = layer.sigma.double().numpy()
    top = np.nanmax(values)
    top = np.log10(top) if top > 0 else 0.0
    with np.errstate(divide="ignore"):
        values = np.log10(values).clip(top - _DECADES, None)
    axes.set_facecolor("#e4e4e4")  # where a layer has fewer directions
    mesh = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=top - _DECADES, vmax=top,
                       extent=(-0.5, len(layers) - 0.5, len(values) + 0.5, 0.5))
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01)
    bar.set_label("log₁₀ σ", fontsize=18)
    bar.ax.tick_params(labelsize=15)
    axes.set_ylabel("direction, strongest first")
    axes.yaxis.get_major_locator().set_params(integer=True)
    _name_layers(axes, layers, "white")


def _energy(axes, layers: Sequence[LayerFacts]) -> None:
    shares = by_block(layers, lambda layer: layer.energy)
    whole = sum(shares.values()) or 1.0
    _bars(axes, {block: 100 * value / whole for block, value in shares.items()}, "{:.1f}")
    axes.set_ylabel("% of the sum of σ² over all layers")


def _effective_rank(axes, layers: Sequence[LayerFacts]) -> None:
    places = range(len(layers))
    axes.step(places, [layer.rank for layer in layers], where="mid", color=_GREY, linewidth=2, label="rank in the file")
    axes.plot(places, [layer.effective_rank for layer in layers], "o", color=_BLUE, markersize=9 if len(layers) <= 150 else 4, label="effective rank")
    axes.set_ylim(0, 1.12 * max(layer.rank for layer in layers))
    axes.set_ylabel("directions")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=16, loc="upper right", ncols=2, frameon=False)
    _name_layers(axes, layers, _GREY)


def _change(axes, layers: Sequence[LayerFacts]) -> None:
    axes.plot(range(len(layers)), [layer.change for layer in layers], "o", color=_ORANGE, markersize=9 if len(layers) <= 150 else 4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("‖T − I‖ / √J  (0 = unchanged)")
    axes.grid(axis="y", alpha=0.3)
    _name_layers(axes, layers, _GREY)


def _size(axes, layers: Sequence[LayerFacts]) -> None:
    sizes = by_block(layers, lambda layer: layer.bytes)
    unit, name = (2**20, "MiB") if max(sizes.values()) >= 2**20 else (2**10, "KiB")
    _bars(axes, {block: value / unit for block, value in sizes.items()}, "{:.1f}")
    axes.set_ylabel(name)


def _bars(axes, values: dict[str, float], form: str) -> None:
    bars = axes.bar(range(len(values)), list(values.values()), color=_BLUE, width=0.8)
    upright = len(values) <= 2 * _UPRIGHT
    axes.bar_label(bars, [form.format(value) for value in values.values()], fontsize=14 if upright else 11, padding=3, rotation=0 if upright else 90)
    axes.set_xticks(range(len(values)), list(values), rotation=0 if len(values) <= _UPRIGHT else 90, fontsize=15 if upright else 12)
    axes.set_xlim(-0.7, len(values) - 0.3)
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _name_layers(axes, layers: Sequence[LayerFacts], line: str) -> None:
    """Names below the axis: of every layer where there is room, else of the blocks, with lines between blocks."""
    axes.set_xlim(-0.5, len(layers) - 0.5)
    groups = [(block, len(list(found))) for block, found in itertools.groupby(layer.block for layer in layers)]
    ends = list(itertools.accumulate(length for _, length in groups))
    room, last = _LINE * len(layers), -math.inf
    for end in ends[:-1]:
        if end - last >= room / 2:  # lines close together would hide the layers between them
            axes.axvline(end - 0.5, color=line, linewidth=1.5, alpha=0.8)
            last = end
    if len(layers) <= _NAMED_LAYERS:
        axes.set_xticks(range(len(layers)), [_cut(layer.short_name) for layer in layers], rotation=90, fontsize=13, parse_math=False)
        return
    centres = [end - (length + 1) / 2 for end, (_, length) in zip(ends, groups, strict=True)]
    shown: list[int] = []
    for i in sorted(range(len(groups)), key=lambda i: -groups[i][1]):  # a block of few layers among hundreds may find no room for its name
        if all(abs(centres[i] - centres[j]) >= room for j in shown):
            shown.append(i)
    upright = len(groups) <= _UPRIGHT and min(length for _, length in groups) >= len(layers) / (2 * _UPRIGHT)
    axes.set_xticks([centres[i] for i in shown], [groups[i][0] for i in shown], rotation=0 if upright else 90, fontsize=15 if len(shown) <= 2 * _UPRIGHT else 12)
    axes.set_xlabel(f"{len(layers)} layers by block, in the model's order")


def _cut(name: str, length: int = 36) -> str:
    return name if len(name) <= length else f"{name[:length // 2 - 1]}…{name[-(length // 2):]}"
