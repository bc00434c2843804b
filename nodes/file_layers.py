"""A file's layers against a model: where each goes, read by the table of kinds and checked, before anything is
applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.files.layer import Layer
from ..trilora_ops.naming import split_target
from .compat import is_identity
from .matching import Matched


@dataclass(frozen=True)
class FileLayers:
    """What a file holds for a model.

    layers: the host's target (a key, or a tuple of key, slice and function) -> the layer for it; left: keys that no
    layer took, although they have a place; unsupported: of those the ones of methods that are known and not computed;
    absent: targets that the model has not.
    """

    layers: dict
    left: tuple[str, ...]
    unsupported: dict[str, str]
    absent: tuple[str, ...]


def read_layers(name: str, matched: Matched, shapes: Mapping[str, torch.Size]) -> FileLayers:
    """The layers of a file, each whole, finite and of its weight's size.

    name: the file's; shapes: of the model's weights by key. Raises TriLoRAError, naming the file and the key, for every
    other layer, and where two are for one place.
    """
    layers, by_target, left, unsupported = {}, {}, [], {}
    names = matched.names
    for head in matched.layers:
        try:
            found = matched.diagnosis.layer(head)
            for layer in filter(None, (found.weight, found.bias)):
                layer.check_finite()
        except TriLoRAError as error:
            raise TriLoRAError(f"{name}: {error}; nothing was applied") from None
        left += [head + ending for ending in found.unread]
        unsupported |= {head + ending: method for ending, method in found.unsupported.items()}
        for layer, target in ((found.weight, names[head]), (found.bias, _bias_of(names[head]))):
            if layer is None:
                continue
            before = by_target.setdefault(target, layer)
            if before is not layer:
                raise TriLoRAError(
                    f"{name}: {_key(before)} and {_key(layer)} are two layers for one place of the model, of which "
                    "only one could be applied; "
                    "keep one of them, or merge them; nothing was applied"
                )
            layers[target] = layer
    absent = tuple(target for target in layers if target is None or split_target(target)[0] not in shapes)
    for target in absent:
        left.append(f"{_key(layers.pop(target))} (the model has no such weight)")
    for target, layer in layers.items():
        _check(name, target, layer, shapes)
    return FileLayers(layers, tuple(left), unsupported, absent)


def _check(name: str, target, layer: Layer, shapes: Mapping[str, torch.Size]) -> None:
    key, offset, function = split_target(target)
    expected = list(shapes[key])
    if offset is not None:
        expected[offset[0]] = offset[2]
    try:
        layer.check(expected)
        if offset is not None and layer.new_shape() is not None:
            raise TriLoRAError(
                "gives a new shape to a part of a fused weight, which cannot be done; leave this file out"
            )
        if layer.needs_the_weight and not is_identity(function) and not _undoes_itself(function, expected[0]):
            raise TriLoRAError(
                f"is of kind {layer.kind}, which depends on the weight, and this model lays that weight out "
                "otherwise; leave this file out"
            )
    except TriLoRAError as error:
        raise TriLoRAError(f"{name}: its layer for {key} {error}; nothing was applied") from None


def _undoes_itself(function, rows: int) -> bool:
    probe = torch.arange(float(rows))[:, None]
    return torch.equal(function(function(probe)), probe)


def _bias_of(target):
    """The bias beside a weight: its key, or for a slice of the outputs a tuple of it and the same slice; None where
    there is none."""
    key, offset, function = split_target(target)
    if not key.endswith(".weight") or (offset is not None and offset[0] != 0):
        return None
    key = key.removesuffix(".weight") + ".bias"
    if isinstance(target, str):
        return key
    return (key, offset, function) if function is not None else (key, offset)


def _key(layer: Layer) -> str:
    return layer.name + next(iter(layer.tensors))
