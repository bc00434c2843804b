"""What is in an adapter, read from its tensors alone: spectra, effective ranks, energy and bytes by layer and by block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter import LayerShape
from .block_names import InFile, blocks_in_file
from .blocks import BASE
from .errors import TriLoRAError, bounded
from .factors import LowRank, canonicalise, is_canonical, spectrum
from .files.kinds import by_layer, kind_of, read_layer
from .files.low_rank import LowRankLayer
from .files.numbers import product_bound
from .files.transform import TransformLayer
from .registry import RESIDUALS, TRANSFORMS, read_part

LOW_RANK = "low-rank"
_ROWS = 512  # of T at a time
_LONGEST_NAME = 90  # in a picture


@dataclass(frozen=True)
class LayerFacts:
    """One layer of an adapter.

    kind: "low-rank", a pair such as "tensor_ring+lora", or a kind of `files.kinds` by name; bytes: of its tensors.
    sigma: (r,) singular values of R, falling, None for kinds that are not measured.
    change: |T - I|_F / sqrt(J), the root mean square by which T moves a random unit vector; None without a transform.
    place: the block of the model in which it lies, as the name tells it.
    """

    name: str
    kind: str
    bytes: int
    sigma: Tensor | None = None
    change: float | None = None
    place: InFile = InFile(BASE, "")

    @property
    def block(self) -> str:
        """The block's id: "IN04", "D07", "TE1.05", ..."""
        return self.place.block

    @property
    def short_name(self) -> str:
        """For a picture: the block, and what is left of the name within it, "IN01 · attn1_to_q"."""
        rest = re.sub(r"^\d+_(?=\D)", "", self.place.rest.replace(".", "_"))  # the slot within an LDM block
        name = f"{self.block} · " + re.sub(r"transformer_blocks_(\d+)_", lambda m: "" if m[1] == "0" else f"t{m[1]} ", rest)
        return bounded(name, _LONGEST_NAME)

    @property
    def rank(self) -> int:
        """Directions of R, 0 where unknown."""
        return 0 if self.sigma is None else len(self.sigma)

    @property
    def energy(self) -> float:
        """|R|_F^2 = sum sigma^2, 0 where unknown."""
        return 0.0 if self.sigma is None else float(self.sigma.double().square().sum())

    @property
    def effective_rank(self) -> float:
        """See `effective_rank`, 0 where unknown."""
        return 0.0 if self.sigma is None else effective_rank(self.sigma)


def analyse(tensors: Mapping[str, Tensor]) -> list[LayerFacts]:
    """Facts of every layer, in the order of the model's blocks as far as names tell it.

    A layer that is not whole is "broken LoHa" or the like, a transform's layer whose tensors no registered kind reads
    "unknown transform", and a tensor that belongs to no kind is a layer of its own, "unknown".
    """
    grouped, others = by_layer(tensors)
    facts = [_facts(name, found) for name, found in grouped.items()]
    facts += [LayerFacts(key, "unknown", _bytes([tensor])) for key, tensor in others.items()]
    places = blocks_in_file({layer.name for layer in facts})
    order = {name: number for number, name in enumerate(places)}
    return sorted((replace(layer, place=places[layer.name]) for layer in facts), key=lambda layer: order[layer.name])


def effective_rank(sigma: Tensor) -> float:
    """exp(-sum p ln p) with p = sigma^2 / sum sigma^2: how many equally strong directions would be spread as wide.

    sigma: (r,) -> between 1 and r; 0 for R = 0. Roy and Vetterli (EUSIPCO 2007) take p = sigma / sum sigma; squares
    make it the entropy of the energy, which weak directions hardly raise.
    """
    energy = sigma.double().square()
    p = energy[energy > 0] / energy.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def by_block(layers: Iterable[LayerFacts], value) -> dict[str, float]:
    """Block -> sum of value(layer), blocks in the order of the layers."""
    sums: dict[str, float] = {}
    for layer in layers:
        sums[layer.block] = sums.get(layer.block, 0) + value(layer)
    return sums


def _facts(name: str, tensors: Mapping[str, Tensor]) -> LayerFacts:
    kind, size = kind_of(tensors), _bytes(tensors.values())
    try:
        found = read_layer(name, tensors)
        for layer in filter(None, (found.weight, found.bias)):
            layer.check_finite()
    except TriLoRAError:
        return LayerFacts(name, f"broken {kind.LABEL if kind else 'layer'}", size)
    layer = found.weight or found.bias
    if layer is None:
        return LayerFacts(name, next(iter(found.unsupported.values()), "unknown"), size)
    if isinstance(layer, TransformLayer):
        return _transform_layer(name, layer.parts(), size)
    if isinstance(layer, LowRankLayer) and layer.is_plain:
        return LayerFacts(name, LOW_RANK, size, _sigma(layer.pair()))
    return LayerFacts(name, layer.kind, size)


@torch.no_grad()
def _transform_layer(name: str, parts: Sequence[Mapping[str, Tensor]], size: int) -> LayerFacts:
    unknown = LayerFacts(name, "unknown transform", size)
    if not all(tensor.is_floating_point() for part in parts for tensor in part.values()):
        return unknown
    transform, residual = ({key: t.float().cpu() for key, t in part.items()} for part in parts)
    for inp in _input_sizes(transform):
        try:
            T, R = read_part("transform", LayerShape(1, inp), transform), _read_residual(residual, inp)
        except TriLoRAError:
            continue
        kind = "+".join(k for k in (_kind_of(TRANSFORMS, T, transform), _kind_of(RESIDUALS, R, residual)) if k != "none")
        pair, change = R.low_rank(), _change(transform, inp)
        if not math.isfinite(change) or (pair is not None and not math.isfinite(product_bound(pair.up, pair.down))):
            return replace(unknown, kind="broken transform")
        return LayerFacts(name, kind, size, None if pair is None else _sigma(pair), change)
    return unknown


def _input_sizes(transform: Mapping[str, Tensor]) -> list[int]:
    """Input sizes that a transform's tensors can mean: the product of their lengths, or blocks of b rows with b (b - 1) / 2 numbers each."""
    sizes = [math.prod(len(tensor) for tensor in transform.values() if tensor.ndim)]
    sizes += [len(t) * (1 + math.isqrt(1 + 8 * t.shape[1])) // 2 for t in transform.values() if t.ndim == 2]
    return sizes


def _read_residual(tensors: Mapping[str, Tensor], inp: int):
    """The residual of a layer with `inp` input channels; its output size and kernel are found by trying.

    A pair of factors tells both. A ring's cores only tell the product of all sizes: the layer is taken for a linear one
    where its cores can be cut so, else for a convolution with a square kernel.
    """
    if {"up", "down"} <= set(tensors):
        if tensors["up"].ndim != 2 or tensors["down"].ndim != 2:
            raise TriLoRAError("residual: its factors are no matrices")
        shapes = [(len(tensors["up"]), tensors["down"].shape[1] // inp)]
    else:
        whole = math.prod(len(tensor) for tensor in tensors.values() if tensor.ndim)
        shapes = [(max(1, whole // (inp * k)), k) for k in (1, 3, 9, 25, 27, 49) if whole % (inp * k) == 0 or not tensors]
    reason = TriLoRAError(f"residual: fits no layer with {inp} input channels")
    for out, kernel in shapes:
        try:
            return read_part("residual", LayerShape(out, inp, (kernel,) if kernel > 1 else ()), tensors)
        except TriLoRAError as error:
            reason = error
    raise reason


def _change(transform: Mapping[str, Tensor], J: int) -> float:
    """|T - I|_F / sqrt(J), some rows of T at a time."""
    total = 0.0
    for start in range(0, J, _ROWS):
        rows = torch.zeros(min(_ROWS, J - start), J)
        rows.diagonal(start).fill_(1.0)  # on rows of the identity W0 (T - I) is T - I
        total += float(read_part("transform", LayerShape(len(rows), J), transform).delta(rows).double().square().sum())
    return math.sqrt(total / J)


def _kind_of(kinds: Mapping[str, type], module, tensors: Mapping[str, Tensor]) -> str:
    """A part's kind; a pair of factors is "lora", whatever trained it."""
    if not tensors:
        return "none"
    return next(kind for kind, config in kinds.items() if type(config.read(module.shape, tensors)) is type(module))


def _sigma(pair: LowRank) -> Tensor:
    return spectrum(pair if is_canonical(pair) else canonicalise(pair)).cpu()


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
