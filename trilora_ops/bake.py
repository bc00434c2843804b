"""Baking: strengths written into the tensors, so that one file does at strength 1 what its sources did at theirs.

For most kinds a layer's change is proportional to one number or one factor of its tensors, and the ratio goes there and
nowhere else: its size into the alpha where the kind has one (so that half precision loses nothing), its sign into one
factor. Transforms of the form (1 - s) I + s T are written where such a T is of the same kind. What is left (DoRA, OFT, BOFT,
whole weights, orthogonal transforms) can be kept or left out, and is refused at every other ratio.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .checkpoint import ALPHA, DOWN, PAIRS, AdapterState, FileLayer, check_finite, split_layers
from .errors import TriLoRAError
from .factors import LowRank, canonicalise, is_canonical, keep_energy, keep_rank, weighted_sum
from .metadata import common, reworked
from .naming import split_target
from .peft_config import name_dora_scales
from .tensorisation import numbered_cores

LOW_RANK, TUCKER, WIDE, FULL, BIAS = "low rank", "Tucker LoCon", "widening LoRA", "full difference", "bias"
LOHA, LOKR, GLORA, DORA, OFT, BOFT, SET, TRANSFORM = "LoHa", "LoKr", "GLoRA", "DoRA", "OFT", "BOFT", "replaced weight", "transform"
# the ending that tells a kind; the first that a layer has
_MARKS = ((".dora_scale", DORA), (".set_weight", SET), (".oft_blocks", OFT), (".hada_w1_a", LOHA), (".lokr_w1", LOKR), (".lokr_w1_a", LOKR),
          (".a1.weight", GLORA), (".reshape_weight", WIDE), (".lora_mid.weight", TUCKER), (".diff", FULL), (".w_norm", FULL))  # fmt: skip
# the factors to which a kind's change is proportional, all of those that a layer has
_UPS = tuple(up for up, _ in PAIRS)
_FACTORS = {TUCKER: _UPS, WIDE: _UPS, LOHA: (".hada_w1_a",), LOKR: (".lokr_w1", ".lokr_w1_a"),
            GLORA: (".a1.weight", ".b1.weight"), FULL: (".diff", ".w_norm"), BIAS: (".diff_b", ".b_norm")}  # fmt: skip
_WHY_FIXED = {
    DORA: "its magnitudes renormalise the whole weight, so no factor is proportional to the change",
    OFT: "a share of what a rotation changes is not a rotation", BOFT: "a share of what a rotation changes is not a rotation",
    SET: "a weight is replaced or it is not", TRANSFORM: "a share of what an orthogonal transform changes is not an orthogonal transform",
}  # fmt: skip
_SUMMABLE = {LOW_RANK, FULL, BIAS}
# what these change depends on the weight that they meet, so that nothing else may be beside them in the file
_NEEDS_THE_WEIGHT = {GLORA, DORA, OFT, BOFT, SET, TRANSFORM}
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
    """What one adapter has for one weight or bias: tensors by their endings, or the pair of a plain low-rank layer."""

    name: str
    kind: str | None  # None: no loader reads these
    ratio: float
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    plain: FileLayer | None = None

    @property
    def fixed(self) -> bool:
        """Whether the kind can only be kept as it is or left out."""
        return self.kind in _WHY_FIXED and not (self.kind == TRANSFORM and _is_linear(self.tensors))


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
        return line + (f"\n{len(self.unread)} tensors that no loader reads were left out ({', '.join(self.unread[:5])})" if self.unread else "")


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
        for part in _parts_of(source):
            if part.kind is None:
                unread += [part.name + ending for ending in part.tensors]
            elif part.ratio:
                parts.setdefault((part.name, part.kind == BIAS), []).append(part)
            else:
                dropped.add(part.name)
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
    ranks = {name: tensors[name + DOWN].shape[0] for (name, _), found in parts.items() if found[0].kind == LOW_RANK}
    about = [dict(source.about) for source in sources]
    texts = dict.fromkeys(str(a["block_weights"]) for a in about if "block_weights" in a)
    action = {"action": "bake", "block_weights": " | ".join(texts), "of": about}
    metadata = reworked(common([getattr(source.state, "metadata", {}) for source in sources]), ranks, action)
    return AdapterState(tensors, metadata), report


def _parts_of(source: Source) -> Iterator[Part]:
    """The layers of one adapter, weight and bias apart."""
    layers, rest = split_layers(name_dora_scales(source.state))
    for name, layer in layers.items():
        pair, ratio = layer.pair, _ratio(source, name)
        if 0 < source.keep < pair.rank and ratio:
            pair = keep_rank(pair if is_canonical(pair) else canonicalise(pair), source.keep)
        yield Part(name, LOW_RANK, ratio, plain=replace(layer, pair=pair))
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in rest.items():
        name = _name_of(key, source.ratios)
        grouped.setdefault(name, {})[key[len(name):]] = tensor
    for name, tensors in grouped.items():
        biases = {ending: tensor for ending, tensor in tensors.items() if ending == ".diff_b" or (ending == ".b_norm" and ".w_norm" in tensors)}
        weights = {ending: tensor for ending, tensor in tensors.items() if ending not in biases}
        if biases:
            yield Part(name, BIAS, _ratio(source, name), biases)
        if weights:
            yield Part(name, _kind_of(weights), _ratio(source, name), weights)


def _ratio(source: Source, name: str) -> float:
    ratio = source.ratios[name]
    if not math.isfinite(ratio):
        raise TriLoRAError(f"{name}: ratio={ratio}: a finite number")
    return ratio


def _name_of(key: str, names: Mapping[str, float]) -> str:
    place = len(key)
    while (place := key.rfind(".", 0, place)) > 0:
        for name in (key[:place], key[:place].removesuffix("_lora")):
            if name in names:
                return name
    raise TriLoRAError(f"{key}: belongs to no layer that has a ratio; give every layer one")


def _kind_of(tensors: Mapping[str, Tensor]) -> str | None:
    if any(ending.startswith(".transform.") for ending in tensors):
        return TRANSFORM
    kind = next((kind for mark, kind in _MARKS if mark in tensors), None)
    return BOFT if kind == OFT and tensors[".oft_blocks"].ndim == 4 else kind


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
        elif len(found) > 1 and kinds[0] not in _SUMMABLE:
            add(f"of kind {kinds[0]} in several of the adapters", "the sum of two is not of that kind", name)
        for part in found:
            if part.fixed and part.ratio != 1:
                add(f"of kind {part.kind} with ratio {part.ratio:.6g}", _WHY_FIXED[part.kind], name)
        if kinds[0] in _NEEDS_THE_WEIGHT:
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
    if first.kind == LOW_RANK:
        if len(found) == 1:
            return FileLayer(_scaled_pair(first.plain.pair, first.ratio), first.plain.kernel).tensors("")
        total = keep_energy(weighted_sum([(part.plain.pair, part.ratio) for part in found]), 1.0)
        return FileLayer(total, max((part.plain.kernel for part in found), key=len)).tensors("")
    scaled = [_scaled(part) for part in found]
    if len(found) == 1:
        return scaled[0]
    endings = _FACTORS[first.kind]
    return {endings[0]: torch.stack([next(iter(_pick(tensors, endings).values())).float() for tensors in scaled]).sum(0)}


def _scaled_pair(pair: LowRank, ratio: float) -> LowRank:
    """ratio * R: its size into the scale, its sign into up, so that no factor is rounded again."""
    return replace(pair, up=pair.up if ratio > 0 else -pair.up.float(), scale=pair.scale * abs(ratio))


def _scaled(part: Part) -> dict[str, Tensor]:
    tensors, ratio = dict(part.tensors), part.ratio
    if ratio == 1:
        return tensors
    if part.kind == TRANSFORM:
        return _scaled_transform(tensors, ratio)
    # LoKr of two whole factors has an alpha too, which nobody reads
    in_alpha = ALPHA in tensors and not (part.kind == LOKR and ".lokr_w1_b" not in tensors and ".lokr_w2_b" not in tensors)
    if in_alpha:
        tensors[ALPHA] = torch.tensor(float(tensors[ALPHA]) * abs(ratio))
    if not in_alpha or ratio < 0:
        factors = _pick(tensors, _FACTORS[part.kind])
        if not factors:
            raise TriLoRAError(f"{part.name}: {part.kind} without {' or '.join(_FACTORS[part.kind][:2])}; the layer is incomplete; copy or download the file again")
        tensors |= {ending: factor.float() * (math.copysign(1.0, ratio) if in_alpha else ratio) for ending, factor in factors.items()}
    return tensors


def _pick(tensors: Mapping[str, Tensor], endings: Sequence[str]) -> dict[str, Tensor]:
    return {ending: tensors[ending] for ending in endings if ending in tensors}


def _halves(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(transform's, residual's) tensors by their own names."""
    return tuple({ending.removeprefix(part): tensor for ending, tensor in tensors.items() if ending.startswith(part)} for part in (".transform.", ".residual."))


def _is_linear(tensors: Mapping[str, Tensor]) -> bool:
    """Whether (1 - s) I + s T and s R are of the kinds of T and R."""
    transform, residual = _halves(tensors)
    return (set(transform) == {"m"} or numbered_cores(transform) is not None) and (
        not residual or set(residual) == {"up", "down", "scale"} or numbered_cores(residual) is not None)


def _scaled_transform(tensors: Mapping[str, Tensor], s: float) -> dict[str, Tensor]:
    """W0 + s (W0 (T - I) + R) = W0 ((1 - s) I + s T) + s R. A diagonal stays one; a ring of rank R gets rank R + 1."""
    transform, residual = _halves(tensors)
    cores = numbered_cores(transform)
    if cores is None:
        transform = {"m": (1 - s) + s * transform["m"].float()}
    else:
        transform = {f"core{d}": core for d, core in enumerate(_with_identity(cores, s))}
    if "scale" in residual:
        pair = _scaled_pair(LowRank(residual["up"], residual["down"], float(residual["scale"])), s)
        residual = {"up": pair.up, "down": pair.down, "scale": torch.tensor(pair.scale)}
    elif residual:
        residual = {**residual, "core0": residual["core0"].float() * s}
    return {f".transform.{name}": tensor for name, tensor in transform.items()} | {f".residual.{name}": tensor for name, tensor in residual.items()}


def _with_identity(cores: Sequence[Tensor], s: float) -> list[Tensor]:
    """Cores of (1 - s) I + s T, (J, J, R + 1, R + 1): rings add where their cores stand in diagonal blocks, and I is a ring of rank 1."""
    wide = []
    for d, core in enumerate(cores):
        size, _, R, _ = core.shape
        both = torch.zeros(size, size, R + 1, R + 1)
        both[:, :, :R, :R] = core.float() * (s if d == 0 else 1.0)
        both[:, :, R, R] = torch.eye(size) * (1 - s if d == 0 else 1.0)
        wide.append(both)
    return wide
