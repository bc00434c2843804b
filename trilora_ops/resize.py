"""Tools on whole adapters: another rank or spectrum for every layer, and the weighted sum of several adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .block_syntax import number
from .bounds import ITEM, check_length, quoted
from .checkpoint import SVD_MARK, AdapterState, FileLayer, check_finite, part_of, split_layers
from .errors import TriLoRAError
from .factors import LowRank, canonicalise, keep_energy, keep_rank, reweight, spectrum, weighted_sum
from .files.kinds import by_layer, read_layer
from .message_words import counted, short, some
from .metadata import common, reworked, title
from .naming import spelling


@dataclass(frozen=True)
class LayerChange:
    """What became of one layer: its rank before and after, and ||R - R'||_F / ||R||_F (0 for R = 0)."""

    name: str
    before: int
    after: int
    error: float


@dataclass(frozen=True)
class ResizeReport:
    """Every low-rank layer's change, the names of tensors of other kinds, which were left alone, and of those left out, which
    belong to no layer."""

    layers: tuple[LayerChange, ...]
    kept: tuple[str, ...]
    energy_lost: float  # ||R - R'||^2 / ||R||^2 over all layers together
    left_out: tuple[str, ...] = ()

    def text(self) -> str:
        """A few lines for people: the whole, then the five layers that changed most."""
        before, after = sum(layer.before for layer in self.layers), sum(layer.after for layer in self.layers)
        lines = [f"{len(self.layers)} layers, {before} directions -> {after}; error {math.sqrt(self.energy_lost):.2%} of the whole adapter"]
        worst = sorted(self.layers, key=lambda layer: -layer.error)[:5]
        lines += [f"  {layer.name}: rank {layer.before} -> {layer.after}, error {layer.error:.2%}" for layer in worst if layer.error >= 5e-5]
        if self.kept:
            lines.append(f"{len(self.kept)} tensors of other kinds were left alone ({some(self.kept)})")
        if self.left_out:
            lines.append(f"{counted(len(self.left_out), 'tensor')} of no layer left out: {some(self.left_out)}")
        return "\n".join(lines)


def read_gains(text: str) -> list[float]:
    """Factors of directions from numbers with commas or spaces between them. Raises TriLoRAError for what is none."""
    check_length(text, "gains: the text", ITEM)
    try:
        return [number(word, word) for word in text.replace(",", " ").split()]
    except TriLoRAError as error:
        raise TriLoRAError(f"gains={quoted(text)}: {str(error).removeprefix('block weights: ')}; numbers with commas between them, such as 0, 1, 1.5") from None


def resize(state: AdapterState, rank: int = 0, energy: float = 0.0, power: float = 1.0, cap: float = 0.0,
           gains: Sequence[float] = ()) -> tuple[AdapterState, ResizeReport]:
    """The adapter with every low-rank layer reweighted (`factors.reweight`) and then cut, and what that changed.

    rank: directions kept at most, 0 = all; energy: share of each layer's sum of sigma^2 that must stay, in (0, 1], 0 = no
    such rule; with both, the smaller; gains: factors of every layer's first directions. Tensors of other kinds are carried
    over. Raises TriLoRAError for a file with transforms, a value out of range or an adapter without low-rank layers.
    """
    _refuse_transforms(state, "resized")
    check_finite(state)
    layers, rest = split_layers(state)
    if not layers:
        raise TriLoRAError(f"adapter: holds no plain low-rank layer to resize (for example {next(iter(rest), 'none')}); {_BAKE}")
    tensors, changes, lost, whole = dict(rest), [], 0.0, 0.0
    for name, layer in layers.items():
        pair = canonicalise(layer.pair)
        found = _cut(reweight(pair, power, cap, gains or None), rank, energy)
        missing, size = _missing(pair, found), float(spectrum(pair).double().square().sum())
        lost, whole = lost + missing, whole + size
        changes.append(LayerChange(name, layer.pair.rank, found.rank, math.sqrt(missing / size) if size else 0.0))
        tensors |= FileLayer(found, layer.kernel).tensors(name)
    action = {"action": "resize", "rank": rank, "energy": energy, "power": power, "cap": cap, "gains": list(gains)}
    report = ResizeReport(tuple(changes), tuple(sorted(rest)), lost / whole if whole else 0.0)
    metadata = reworked(getattr(state, "metadata", {}), {change.name: change.after for change in changes}, action)
    return AdapterState(tensors, metadata if rest else {**metadata, **SVD_MARK}), report


def merge_adapters(parts: Sequence[tuple[AdapterState, float]], rank: int = 0, energy: float = 0.0,
                   one_name: bool = False) -> tuple[AdapterState, ResizeReport]:
    """One adapter that is sum_i w_i R_i on every layer that any part has, cut as in `resize`, and what the cut changed.

    Directions at fp32's rounding of the strongest are dropped in any case. Layers are matched by name: parts that spell
    names differently must first be brought to one spelling; one_name: that has been done, no weight has two names. Tensors
    that belong to no layer are left out. Raises TriLoRAError for parts that spell names differently, for layers that are
    not plain low rank, and for one layer of two sizes.
    """
    if not parts:
        raise TriLoRAError("merge_adapters: no adapter to merge; connect at least one")
    named: dict[str, list[tuple[FileLayer, float]]] = {}
    left_out: list[str] = []
    for state, weight in parts:
        _refuse_transforms(state, "merged")
        if not math.isfinite(weight):
            raise TriLoRAError(f"weight={weight}: a finite number")
        check_finite(state)
        layers, rest = split_layers(state)
        others, extra = by_layer(rest)
        _refuse_others(others)
        left_out += extra
        for name, layer in layers.items():
            named.setdefault(name, []).append((layer, weight))
    if not named:
        raise TriLoRAError(f"the adapters hold no low-rank layer to merge (for example {some(left_out, 1) or 'none'}); choose LoRA files")
    if not one_name:
        _check_spelling([state for state, _ in parts])
    tensors, changes, lost, whole = {}, [], 0.0, 0.0
    for name, found in named.items():
        _check_sizes(name, [layer for layer, _ in found])
        total = weighted_sum([(layer.pair, weight) for layer, weight in found])
        kept = _cut(total, rank, energy or 1.0)
        sigma = spectrum(total).double().square()
        missing, size = float(sigma[kept.rank :].sum()), float(sigma.sum())
        lost, whole = lost + missing, whole + size
        changes.append(LayerChange(name, total.rank, kept.rank, math.sqrt(missing / size) if size else 0.0))
        tensors |= FileLayer(kept, found[0][0].kernel).tensors(name)
    every = [getattr(state, "metadata", {}) for state, _ in parts]
    of = [{"name": title(metadata), "weight": weight} for metadata, (_, weight) in zip(every, parts, strict=True)]
    metadata = reworked(common(every), {c.name: c.after for c in changes}, {"action": "merge", "of": of, "rank": rank, "energy": energy})
    return AdapterState(tensors, {**metadata, **SVD_MARK}), ResizeReport(tuple(changes), (), lost / whole if whole else 0.0, tuple(left_out))


_ADD = "put the adapters on an Adapter Stack and connect it, with their model, to Bake Adapter"
_BAKE = "put it on a model with TriLoRA Loader or Adapter Stack, and make a low-rank file of that with Extract Adapter"


def _refuse_others(layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise TriLoRAError, with what adds them instead, for layers that are no plain low-rank ones; tensors by ending."""
    if layers:
        found = [read_layer(name, tensors) for name, tensors in layers.items()]
        exact = all(layer.summable for one in found for layer in (one.weight, one.bias) if layer)
        remedy = f"{_ADD}, which adds them exactly" if exact else f"{_ADD}, if no other adapter has these layers; else {_BAKE}"
        key = min(name + ending for name, tensors in layers.items() for ending in tensors)
        raise TriLoRAError(f"{short(key)}: is not part of a plain low-rank layer, and only those can be merged; {remedy}")


def _missing(pair: LowRank, found: LowRank) -> float:
    """||R - R'||_F^2 of two canonical pairs: both have orthonormal rows, so sum over directions of |u_i - sum_j (v_i v_j') u_j'|^2
    and of what R' has outside R's rows."""
    up, other = pair.up.double() * pair.scale, found.up.double() * found.scale
    across = found.down.double() @ pair.down.double().t()  # v_j' v_i
    outside = found.down.double() - across @ pair.down.double()
    return float((up - other @ across).square().sum() + (other @ outside).square().sum())


def _cut(pair: LowRank, rank: int, energy: float) -> LowRank:
    if rank < 0:
        raise TriLoRAError(f"rank={rank}: at least 1 direction, or 0 to keep all")
    pair = keep_energy(pair, energy) if energy else pair
    return keep_rank(pair, rank) if rank else pair


def _refuse_transforms(state: AdapterState, verb: str) -> None:
    for key in state:
        if part_of(key):
            raise TriLoRAError(f"{key}: a layer with a transform depends on the model's own weight and cannot be {verb} without it; {_BAKE}")


def _check_spelling(states: Sequence[AdapterState]) -> None:
    spellings: dict[str, dict[str, str]] = {}
    each = [{spelling(name): name for name in split_layers(state)[0]} for state in states]
    for found in each:
        for (part, how), name in found.items():
            spellings.setdefault(part, {}).setdefault(how, name)
    for part, how in spellings.items():
        if len(how) > 1 and any(found.keys() != each[0].keys() for found in each):
            raise TriLoRAError(f"the adapters spell the names of the {part}'s layers differently ({', '.join(list(how.values())[:2])}), and one layer "
                               "might be taken for two; connect the model (and CLIP) they were made for")


def _check_sizes(name: str, layers: Sequence[FileLayer]) -> None:
    sizes = {(layer.pair.up.shape[0], layer.pair.down.shape[1], layer.kernel if sum(layer.kernel) > len(layer.kernel) else ()) for layer in layers}
    if len(sizes) > 1:
        shown = " and ".join(str(size) for size in sorted(sizes, key=str))
        raise TriLoRAError(f"{name}: the adapters have it as (out, columns, kernel) = {shown}, expected one size; they were made for different models")

