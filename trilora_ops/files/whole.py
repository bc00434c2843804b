"""Layers without factors: differences of weights, norms and biases, and weights that replace the model's."""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import TriLoRAError
from .layer import OTHER_MODEL, Layer
from .numbers import LIMIT, factor, largest


class WholeLayer(Layer):
    """A tensor of the weight's own shape."""

    READS_ALPHA = False

    @classmethod
    def read(cls, name, tensors, alpha) -> "WholeLayer":
        """See `Layer.read`."""
        layer, endings = cls(name, tensors, None), [ending for ending in cls.ENDINGS if ending in tensors]
        if len(endings) > 1:
            raise TriLoRAError(
                f"{name}{endings[0]} and {name}{endings[1]} are two layers for one place of the model; the file is "
                "broken"
            )
        (layer.ending,) = endings
        factor(name, tensors, layer.ending)
        return layer

    @property
    def tensor(self) -> Tensor:
        """The tensor itself."""
        return self.tensors[self.ending]

    @property
    def size(self) -> tuple[int, int]:
        """See `Layer.size`; of a vector one column."""
        return (self.tensor.shape[0] if self.tensor.ndim else 1), math.prod(self.tensor.shape[1:])

    def check(self, shape) -> None:
        """See `Layer.check`."""
        if tuple(self.tensor.shape) != tuple(shape):
            raise TriLoRAError(f"is {tuple(self.tensor.shape)}, expected {tuple(shape)}; {OTHER_MODEL}")

    def bound(self) -> float:
        """See `Layer.bound`."""
        return largest(self.tensor)

    def reach(self) -> float:
        """See `Layer.reach`."""
        return self.bound() if self.bound() <= LIMIT else math.inf

    def added(self, weight: Tensor) -> Tensor:
        """See `Layer.added`."""
        return self.on(self.ending, weight)


class DifferenceLayer(WholeLayer):
    """W_1 = W + D, of any weight; LyCORIS' norms have an ending of their own."""

    LABEL = "full difference"
    summable = True
    FACTORS = (".diff", ".w_norm")
    ENDINGS = (".diff", ".w_norm")


class BiasLayer(WholeLayer):
    """The same for the bias beside a weight; `.b_norm` stands beside `.w_norm` only."""

    LABEL = "bias"
    summable = True
    FACTORS = (".diff_b", ".b_norm")
    ENDINGS = (".diff_b", ".b_norm")


class ReplacedLayer(WholeLayer):
    """W_1 = the tensor."""

    LABEL = "replaced weight"
    needs_the_weight = True
    replaces = True
    fixed = "a weight is replaced or it is not"
    ENDINGS = (".set_weight",)

    def changed(self, weight: Tensor) -> Tensor:
        """See `Layer.changed`."""
        return self.on(self.ending, weight).clone()
