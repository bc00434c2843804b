"""Baking: strengths written into the tensors, so that one file does at strength 1 what its sources did at theirs.

For most kinds a layer's change is proportional to one number or one factor of its tensors, and the ratio goes there and
nowhere else: its size into the alpha where the kind has one (so that half precision loses nothing), its sign into one
factor. Transforms of the form (1 - s) I + s T are written where such a T is of the same kind. What is left (DoRA, OFT, BOFT,
whole weights, orthogonal transforms) can be kept or left out, and is refused at every other ratio.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checkpoint import AdapterState, check_finite
from .errors import TriLoRAError, bounded
from .factors import keep_energy, weighted_sum
from .files.kinds import is_ending, read_layer
from .files.layer import Layer
from .files.low_rank import DOWN, FileLayer, LowRankLayer
from .files.transform import scaled_pair
from .files.whole import BiasLayer
from .metadata import common, reworked
from .naming import split_target

_REMEDY = ("give these blocks 1 or 0, leave one of the adapters out, or put them on a model with TriLoRA Loader or Adapter Stack and turn that into "
           "one low-rank file with Extract Adapter, which states its error")


@dataclass(frozen=True)
class Source:
    """One adapter of a bake.

    state: its layers under the names of the result; ratios: layer name -> what its change is multiplied by, 0 leaves the
    layer out; keep: directions kept of plain low-rank layers, 0 = all; about: for the provenance, JSON-able.
    """

    state: AdapterState
    ratios: Mapping[str, float]
    keep: int = 0
    about: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """What one adapter has for one weight or bias; plain: the factors of a plain low-rank layer, cut to the source's rank."""

    layer: Layer
    ratio: float
    plain: FileLayer | None = None

    @property
    def kind(self) -> str:
        """What people call the layer's kind."""
        return self.layer.kind

    @property
    def is_bias(self) -> bool:
        """Whether it is for the bias beside the weight."""
        return isinstance(self.layer, BiasLayer)


@dataclass(frozen=True)
class BakeReport:
    """Layers of the result by kind, how many of them are sums of several adapters, how many were left out at ratio 0, and
    tensors that belong to no layer a loader would read."""

    kinds: Mapping[str, int]
    summed: int
    left_out: int
    unread: tuple[str, ...]

    def text(self) -> str:
        """A line for people, and one for what was not read."""
        counts = [f"{count} {kind}" for kind, count in self.kinds.items()]
        line = f"{sum(self.kinds.values())} layers ({', '.join(counts)}), {self.summed} of them sums, {self.left_out} left out at ratio 0"
        return line + (f"\n{len(self.unread)} tensors that no loader reads were left out ({bounded(', '.join(self.unread[:5]))})" if self.unread else "")


def bake(sources: Sequence[Source], places: Mapping[str, object],
         tick: Callable[[int, int], None] = lambda done, count: None) -> tuple[AdapterState, BakeReport]:
    """One adapter whose change at strength 1 is sum_i ratio_i(layer) * (the change by source i), exact to fp32 rounding.

    places: layer name -> the weight it is for, a key or a tuple of a key and a slice (axis, start, length) of it. Plain
    low-rank layers of one weight become one (`factors.weighted_sum`), full differences and biases are added; a layer that
    one source alone has keeps its kind. tick: called after every layer with the layers done and in all, may raise to stop. Raises TriLoRAError, naming every group of layers that cannot be written, for a kind
    that no factor scales at a ratio other than 0 and 1, and for kinds that cannot be one layer or act on one another.
    """
    parts: dict[tuple[str, bool], list[Part]] = {}
    dropped, unread = set(), []
    for source in sources:
        check_finite(source.state)
        found, strange = _parts_of(source)
        unread += strange
        for part in found:
            if part.ratio:
                parts.setdefault((part.layer.name, part.is_bias), []).append(part)
            else:
                dropped.add(part.layer.name)
    _refuse(parts, places)
    if not parts:
        raise TriLoRAError("every layer has ratio 0, so that nothing is left to write; raise a strength or a block's weight")
    tensors = {}
    for done, ((name, _), found) in enumerate(parts.items(), start=1):
        tensors |= {name + ending: tensor for ending, tensor in _joined(found).items()}
        tick(done, len(parts))
    for name, is_bias in parts:
        if is_bias and name + ".w_norm" not in tensors and (bias := tensors.pop(name + ".b_norm", None)) is not None:
            tensors[name + ".diff_b"] = bias  # .b_norm is read beside .w_norm only
    kinds = Counter(found[0].kind for found in parts.values())
    report = BakeReport(dict(kinds), sum(len(found) > 1 for found in parts.values()), len(dropped - {name for name, _ in parts}), tuple(unread))
    ranks = {name: tensors[name + DOWN].shape[0] for (name, _), found in parts.items() if found[0].plain}
    about = [dict(source.about) for source in sources]
    texts = dict.fromkeys(str(a["block_weights"]) for a in about if "block_weights" in a)
    action = {"action": "bake", "block_weights": " | ".join(texts), "of": about}
    metadata = reworked(common([getattr(source.state, "metadata", {}) for source in sources]), ranks, action)
    return AdapterState(tensors, metadata), report


def _parts_of(source: Source) -> tuple[list[Part], list[str]]:
    """(the layers of one adapter, weight and bias apart; keys that belong to none)."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in source.state.items():
        name = _name_of(key, source.ratios)
        grouped.setdefault(name, {})[key[len(name):]] = tensor
    parts, unread = [], []
    for name, tensors in grouped.items():
        found, ratio = read_layer(name, tensors), _ratio(source, name)
        unread += [name + ending for ending in found.unread]
        for layer in filter(None, (found.weight, found.bias)):
            layer.check_finite()
            parts.append(Part(layer, ratio, _plain(layer, source.keep) if ratio else None))
    return parts, unread


def _plain(layer: Layer, keep: int) -> FileLayer | None:
    if not isinstance(layer, LowRankLayer) or not layer.is_plain:
        return None
    return (layer.cut(keep) if keep else layer).file_layer()


def _ratio(source: Source, name: str) -> float:
    ratio = source.ratios[name]
    if not math.isfinite(ratio):
        raise TriLoRAError(f"{name}: ratio={ratio}: a finite number")
    return ratio


def _name_of(key: str, names: Mapping[str, float]) -> str:
    place, longest = len(key), None
    while (place := key.rfind(".", 0, place)) > 0:
        for name in (key[:place], key[:place].removesuffix("_lora")):
            if name in names:
                if is_ending(key[len(name):]):
                    return name
                longest = longest or name
    if longest:
        return longest
    raise TriLoRAError(f"{key}: belongs to no layer that has a ratio; give every layer one")


def _refuse(parts: Mapping[tuple[str, bool], list[Part]], places: Mapping[str, object]) -> None:
    """Raise TriLoRAError with every group of layers that no file can hold, their number, and what to do."""
    problems: dict[tuple[str, str], list[str]] = {}  # (which layers, why they cannot) -> their names

    def add(what: str, why: str, name: str) -> None:
        problems.setdefault((what, why), []).append(name)

    on_weight: dict[str, list[str]] = {}  # weight key -> names of its layers
    for name, is_bias in parts:
        if not is_bias:
            on_weight.setdefault(split_target(places[name])[0], []).append(name)
    for (name, _), found in parts.items():
        kinds = list(dict.fromkeys(part.kind for part in found))
        if len(kinds) > 1:
            add(f"of several kinds in the adapters, {' and '.join(kinds)}", "one layer of a file holds one kind", name)
        elif len(found) > 1 and not found[0].layer.summable:
            add(f"of kind {kinds[0]} in several of the adapters", "the sum of two is not of that kind", name)
        for part in found:
            if part.layer.fixed and part.ratio != 1:
                add(f"of kind {part.kind} with ratio {part.ratio:.6g}", part.layer.fixed, name)
        if found[0].layer.needs_the_weight:
            key, part_of_it, _ = split_target(places[name])
            if any(other != name and _overlap(part_of_it, split_target(places[other])[1]) for other in on_weight[key]):
                add(f"of kind {kinds[0]} beside others for a part of the same weight, or all of it", "what it does depends on the weight it meets", name)
    if problems:
        groups = [f"{len(names)} layer{'s' * (len(names) > 1)} {what} (for example {names[0]}): {why}" for (what, why), names in problems.items()]
        raise TriLoRAError(f"this cannot be written as one file exactly: {'; '.join(groups)}; {_REMEDY}")


def _overlap(a: tuple | None, b: tuple | None) -> bool:
    """Whether two slices (axis, start, length) of one weight have entries in common; None is the whole of it."""
    return a is None or b is None or a[0] != b[0] or (a[1] < b[1] + b[2] and b[1] < a[1] + a[2])


def _joined(found: Sequence[Part]) -> dict[str, Tensor]:
    """The tensors, by ending, of one layer that changes as all parts at their ratios do together."""
    first = found[0]
    if first.plain:
        if len(found) == 1:
            return FileLayer(scaled_pair(first.plain.pair, first.ratio), first.plain.kernel).tensors("")
        total = keep_energy(weighted_sum([(part.plain.pair, part.ratio) for part in found]), 1.0)
        return FileLayer(total, max((part.plain.kernel for part in found), key=len)).tensors("")
    scaled = [part.layer.scaled(part.ratio) for part in found]
    if len(found) == 1:
        return scaled[0]
    return {first.layer.FACTORS[0]: torch.stack([next(iter(tensors.values())).float() for tensors in scaled]).sum(0)}
