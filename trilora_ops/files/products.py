"""LoHa, LoKr and GLoRA, as LyCORIS (arXiv:2309.14859) and PEFT write them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import TriLoRAError
from .layer import BROKEN, LARGEST_WEIGHT, ScaledLayer, check_kernel
from .low_rank import tucker, tucker_bound
from .numbers import columns, factor, largest, matrix, product_bound, whole_bound, worst


class LoHaLayer(ScaledLayer):
    """A = alpha / r * (w1_a w1_b) ⊙ (w2_a w2_b); each half with a core: core x w_a x w_b, w_a (r, out), w_b (r, in)."""

    LABEL = "LoHa"
    FACTORS = (".hada_w1_a",)
    ENDINGS = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2")

    @classmethod
    def read(cls, name, tensors, alpha) -> "LoHaLayer":
        """See `Layer.read`."""
        cores = [ending for ending in (".hada_t1", ".hada_t2") if ending in tensors]
        sizes = [
            _half_size(name, tensors, f".hada_w{i}_a", f".hada_w{i}_b", f".hada_t{i}" if cores else None)
            for i in (1, 2)
        ]
        if sizes[0] != sizes[1]:
            raise TriLoRAError(f"{name}: its halves are {sizes[0]} and {sizes[1]}, which must be of one size; {BROKEN}")
        return cls(name, tensors, alpha)

    @property
    def scale_rank(self) -> int:
        """See `ScaledLayer.scale_rank`."""
        return self.tensors[".hada_w1_b"].shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """See `Layer.size`."""
        return _half_size(
            self.name, self.tensors, ".hada_w1_a", ".hada_w1_b", ".hada_t1" if ".hada_t1" in self.tensors else None
        )

    def check(self, shape) -> None:
        """See `Layer.check`."""
        super().check(shape)
        for ending in (".hada_t1", ".hada_t2"):
            if ending in self.tensors:
                check_kernel(self.tensors[ending].shape[2:], shape)

    def product_bound(self) -> float:
        """See `ScaledLayer.product_bound`."""
        return whole_bound(
            *(_half_bound(self.tensors, f".hada_w{i}_a", f".hada_w{i}_b", f".hada_t{i}") for i in (1, 2))
        )

    def product(self, weight: Tensor) -> Tensor:
        """See `ScaledLayer.product`."""
        first, second = (_half(self, weight, f".hada_w{i}_a", f".hada_w{i}_b", f".hada_t{i}") for i in (1, 2))
        return first * second


class LoKrLayer(ScaledLayer):
    """A = alpha / r * w1 ⊗ w2, each of them whole or a product of factors, w2 also with a core.

    On a convolution w2 has the kernel's axes. The alpha counts where a factor is not whole, r being the rank of w2's
    factors, else of w1's.
    """

    LABEL = "LoKr"
    FACTORS = (".lokr_w1", ".lokr_w1_a")
    ENDINGS = (".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2")

    @classmethod
    def read(cls, name, tensors, alpha) -> "LoKrLayer":
        """See `Layer.read`."""
        for whole, parts in (
            (".lokr_w1", (".lokr_w1_a", ".lokr_w1_b")),
            (".lokr_w2", (".lokr_w2_a", ".lokr_w2_b", ".lokr_t2")),
        ):
            beside = next((part for part in parts if part in tensors), None)
            if whole in tensors and beside:
                raise TriLoRAError(
                    f"{name}{whole} and {name}{beside} are two spellings of one factor, so that it is in the file "
                    f"twice; {BROKEN}"
                )
            if whole not in tensors and beside is None:
                raise TriLoRAError(
                    f"{name}{whole} is missing, a factor of its Kronecker product; the file is incomplete; copy or "
                    "download it again"
                )
        if ".lokr_w1" in tensors:
            matrix(name, tensors, ".lokr_w1")
        else:
            _half_size(name, tensors, ".lokr_w1_a", ".lokr_w1_b", None)
        if ".lokr_w2" in tensors:
            columns(name, tensors, ".lokr_w2")
        else:
            _half_size(name, tensors, ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2" if ".lokr_t2" in tensors else None)
        return cls(name, tensors, alpha)

    @property
    def READS_ALPHA(self) -> bool:  # noqa: N802 - of two whole factors nobody reads it
        """Whether its alpha counts."""
        return not {".lokr_w1", ".lokr_w2"} <= self.tensors.keys()

    @property
    def scale_rank(self) -> int:
        """See `ScaledLayer.scale_rank`."""
        return self.tensors[".lokr_w2_b" if ".lokr_w2_b" in self.tensors else ".lokr_w1_b"].shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """See `Layer.size`."""
        sizes = []
        for i, core in ((1, None), (2, ".lokr_t2" if ".lokr_t2" in self.tensors else None)):
            whole = self.tensors.get(f".lokr_w{i}")
            sizes.append(
                whole.flatten(1).shape
                if whole is not None
                else _half_size(self.name, self.tensors, f".lokr_w{i}_a", f".lokr_w{i}_b", core)
            )
        return sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1]

    def check(self, shape) -> None:
        """See `Layer.check`; kernel axes that w2 has must be the weight's. ComfyUI's trainer writes two flat factors for a
        convolution, of which w1 need not divide the channels."""
        super().check(shape)
        for ending in (".lokr_w2", ".lokr_t2"):
            if ending in self.tensors:
                check_kernel(self.tensors[ending].shape[2:], shape)

    def product_bound(self) -> float:
        """See `ScaledLayer.product_bound`."""
        bounds = []
        for i in (1, 2):
            whole = self.tensors.get(f".lokr_w{i}")
            bounds.append(
                largest(whole)
                if whole is not None
                else _half_bound(self.tensors, f".lokr_w{i}_a", f".lokr_w{i}_b", f".lokr_t{i}")
            )
        return whole_bound(*bounds)

    def reach(self) -> float:
        """See `Layer.reach`; the largest entry of a Kronecker product is the product of its factors' largest."""
        product = math.prod(self._half_reach(i) for i in (1, 2))
        if not product <= torch.finfo(torch.float32).max:
            return math.inf
        return worst(product * abs(self.scale), 0.0 if self.magnitudes is None else largest(self.magnitudes))

    def _half_reach(self, i: int) -> float:
        whole, parts = f".lokr_w{i}", (f".lokr_w{i}_a", f".lokr_w{i}_b", f".lokr_t{i}")
        if whole in self.tensors:
            return largest(self.tensors[whole])
        size = _half_size(self.name, self.tensors, *parts[:2], parts[2] if parts[2] in self.tensors else None)
        return largest(_half(self, torch.zeros(1), *parts)) if math.prod(size) <= LARGEST_WEIGHT else math.inf

    def product(self, weight: Tensor) -> Tensor:
        """See `ScaledLayer.product`. Columns are channels with their kernels, and w2 has all of the kernel: flat, it
        is one product."""
        halves = []
        for i in (1, 2):
            whole = f".lokr_w{i}"
            parts = (f"{whole}_a", f"{whole}_b", f".lokr_t{i}")
            halves.append(self.on(whole, weight).flatten(1) if whole in self.tensors else _half(self, weight, *parts))
        return torch.kron(*(half.contiguous() for half in halves))


class GLoRALayer(ScaledLayer):
    """A = alpha / r * (W a1 a2 + b1 b2), a1 a2 mixing the inputs: a convolution's channels, or its columns
    (arXiv:2306.07967).

    LyCORIS once wrote both pairs the other way round, W a2 a1 + b2 b1.
    """

    LABEL = "GLoRA"
    TAKES_MAGNITUDES = False
    needs_the_weight = True
    fixed = ""
    replaces = False
    FACTORS = (".a1.weight", ".b1.weight")
    ENDINGS = (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight")

    @classmethod
    def read(cls, name, tensors, alpha) -> "GLoRALayer":
        """See `Layer.read`."""
        a1, a2, b1, b2 = (columns(name, tensors, ending) for ending in cls.ENDINGS)
        ways = [way for way, pairs in (("", ((a1, a2), (b1, b2))), ("old", ((a2, a1), (b2, b1))))
                if all(first.shape[1] == second.shape[0] for first, second in pairs)]  # fmt: skip
        if len(ways) == 2:  # the thin side is the rank: a1 and b1 are tall in today's layout
            ways = [
                "old" if a1.shape[0] < a1.shape[1] or b1.shape[0] < b1.shape[1] and a1.shape[0] == a1.shape[1] else ""
            ]
        if not ways:
            shapes = " and ".join(f"{tuple(one.shape)} x {tuple(two.shape)}" for one, two in ((a1, a2), (b1, b2)))
            raise TriLoRAError(f"{name}: its pairs are {shapes}, which cannot be multiplied; {BROKEN}")
        layer = cls(name, tensors, alpha)
        layer.order = (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight")
        if ways == ["old"]:
            layer.order = (".a2.weight", ".a1.weight", ".b2.weight", ".b1.weight")
        first, second = layer.tensors[layer.order[0]], layer.tensors[layer.order[1]]
        if first.shape[0] != second.flatten(1).shape[1]:
            raise TriLoRAError(
                f"{name}: its first pair is {tuple(first.shape)} x {tuple(second.shape)}, which is not square; {BROKEN}"
            )
        return layer

    @property
    def scale_rank(self) -> int:
        """See `ScaledLayer.scale_rank`."""
        return self.tensors[self.order[1]].shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """See `Layer.size`."""
        return self.tensors[self.order[2]].shape[0], self.tensors[self.order[3]].flatten(1).shape[1]

    def check(self, shape) -> None:
        """See `Layer.check`."""
        super().check(shape)
        mixed = self.tensors[self.order[0]].shape[0]
        channels = shape[1] if len(shape) > 1 else 1
        if mixed not in (channels, math.prod(shape[1:])):
            raise TriLoRAError(
                f"has a first pair of {(mixed, mixed)} that mixes {channels} inputs, expected {(channels, channels)}; "
                f"{BROKEN}"
            )

    def product_bound(self) -> float:
        """See `ScaledLayer.product_bound`; rows of W of norm 1 have a sum of at most the root of their length."""
        a1, a2, b1, b2 = (self.tensors[ending].flatten(1) for ending in self.order)
        return max(whole_bound(product_bound(a1, a2), math.sqrt(len(a1))), whole_bound(product_bound(b1, b2)))

    def reach(self) -> float:
        """See `Layer.reach`."""
        a1, a2, b1, b2 = (self.tensors[ending].flatten(1).float() for ending in self.order)
        if max(len(a1) ** 2, math.prod(self.size)) > LARGEST_WEIGHT:
            return math.inf
        columns = torch.linalg.vector_norm(a1 @ a2 * self.scale, dim=0)
        return worst(largest(columns), largest(b1 @ b2 * self.scale))

    def product(self, weight: Tensor) -> Tensor:
        """See `ScaledLayer.product`."""
        a1, a2, b1, b2 = (self.on(ending, weight).flatten(1) for ending in self.order)
        flat = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
        if len(a1) == flat.shape[1]:
            mixed = flat @ a1 @ a2
        else:
            mixed = torch.einsum("oik,ij,jl->olk", weight.flatten(2), a1, a2).flatten(1)
        return torch.addmm(mixed, b1, b2)


def _half_size(name: str, tensors, a: str, b: str, core: str | None) -> tuple[int, int]:
    """(rows, columns) of a b, or of core x a x b. Raises TriLoRAError where they do not fit each other."""
    if core is None:
        left, right = matrix(name, tensors, a), columns(name, tensors, b)
        if left.shape[1] != right.shape[0]:
            raise TriLoRAError(
                f"{name}{a} is {tuple(left.shape)} and {name}{b} is {tuple(right.shape)}, which cannot be multiplied; "
                f"{BROKEN}"
            )
        return left.shape[0], right.shape[1]
    middle, left, right = factor(name, tensors, core), matrix(name, tensors, a), matrix(name, tensors, b)
    if middle.ndim < 3 or tuple(middle.shape[:2]) != (left.shape[0], right.shape[0]):
        raise TriLoRAError(
            f"{name}{core} is {tuple(middle.shape)} between factors of {tuple(left.shape)} and {tuple(right.shape)}; "
            f"{BROKEN}"
        )
    return left.shape[1], right.shape[1] * math.prod(middle.shape[2:])


def _half(layer: ScaledLayer, weight: Tensor, a: str, b: str, core: str) -> Tensor:
    left, right = layer.on(a, weight).flatten(1), layer.on(b, weight).flatten(1)
    return tucker(layer.on(core, weight), left.t(), right) if core in layer.tensors else left @ right


def _half_bound(tensors, a: str, b: str, core: str) -> float:
    left, right = tensors[a].flatten(1), tensors[b].flatten(1)
    return tucker_bound(tensors[core], left, right) if core in tensors else product_bound(left, right)
