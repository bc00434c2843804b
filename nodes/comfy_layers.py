"""A layer of any kind of a file as a patch of the host's, computed by the table of kinds, as the program that wrote
it means it."""

from __future__ import annotations

import functools

import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.files.kinds import read_layer
from ..trilora_ops.files.layer import Layer
from .compat import is_identity


class LayerPatch(WeightAdapterBase):
    """W' = W + strength * (W_1 - W), W_1 being the weight with the layer alone on it.

    Holds (loaded_keys, ((ending, tensor, number or tuple of numbers), ...)): the host rebuilds an adapter from just
    these. Products run in fp32 whatever the weight's dtype, and the result is rounded once.
    """

    name = "trilora_layer"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, layer: Layer) -> "LayerPatch":
        """The patch of a layer that has been checked."""
        written = {
            ending: tensor if tensor.is_floating_point() else _numbers(tensor)
            for ending, tensor in layer.tensors.items()
        }
        if layer.alpha is not None:
            written[".alpha"] = layer.alpha
        return cls({layer.name + ending for ending in written}, tuple(written.items()))

    @functools.cached_property
    def layer(self) -> Layer:
        """The layer that the tensors make."""
        return read_layer(
            "layer",
            {ending: value if isinstance(value, Tensor) else torch.tensor(value) for ending, value in self.weights},
        ).weight

    def calculate_shape(self, key):
        """The shape that a widening layer gives the weight, else None (0.33.0)."""
        return self.layer.new_shape()

    def delta(self, weight: Tensor, function=None) -> Tensor:
        """W_1 - W in fp32, in the shape that the weight is given.

        function: how the rows that a file gives are laid out here (the halves of a fused weight exchanged): what
        depends on the weight is computed on the rows as the file knows them, by doing it twice.
        """
        layer = self.layer
        if is_identity(function):
            return layer.delta(weight)
        return (
            function(layer.delta(function(weight)))
            if layer.needs_the_weight
            else function(layer.added(layer.widened(weight)))
        )

    @torch.no_grad()
    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weight=None,
    ):
        """W', in place unless the weight gets a new shape. What replaces the weight goes there on a straight line,
        which ends in W_1 itself."""
        exact = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
        wide = self.layer.widened(exact)
        if self.layer.replaces and is_identity(function):
            result = torch.lerp(wide, self.layer.changed(exact), strength)
        else:
            result = torch.add(wide, self.delta(exact, function), alpha=strength)
        return weight.copy_(result) if result.shape == weight.shape else result.to(weight.dtype)

    def bypass_forward(self, org_forward, x: Tensor, *args, **kwargs) -> Tensor:
        """Raises TriLoRAError: these kinds are merged into the weight, which a bypass does not have (0.33.0)."""
        raise TriLoRAError(f"{self.layer.kind}: needs the layer's weight; load it with a loader that changes weights")


def _numbers(tensor: Tensor):
    found = tensor.tolist()
    return tuple(found) if isinstance(found, list) else found
