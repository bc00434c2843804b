"""Splitting a layer's size into factors, for methods whose cores act on one factor each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from torch import Tensor

from .errors import TriLoRAError

# published with TLoRA (arXiv:2501.08727), three factors everywhere
TABLE = {320: (4, 8, 10), 640: (8, 8, 10), 768: (8, 8, 12), 1280: (8, 10, 16), 2048: (8, 16, 16)}


@lru_cache(maxsize=None)
def factorise(size: int, count: int = 3) -> tuple[int, ...]:
    """`count` ascending factors of `size`: the published ones, else those with the smallest sum of squares.

    Sizes without balanced factors are padded with ones (a prime p becomes (1, 1, p)).

        320 -> 4, 8, 10     1024 -> 8, 8, 16     1536 -> 8, 12, 16     3072 -> 12, 16, 16     77 -> 1, 7, 11
    """
    if size < 1:
        raise TriLoRAError(f"size={size}: a layer's size is 1 or more")
    if count == 3 and size in TABLE:
        return TABLE[size]
    return min(_splits(size, count, 1), key=lambda factors: sum(f * f for f in factors))


def check_factors(factors: tuple[int, ...], size: int, axis: str) -> tuple[int, ...]:
    """Return `factors`, or raise TriLoRAError where they do not multiply to the layer's `axis` size."""
    if math.prod(factors) != size or min(factors) < 1:
        raise TriLoRAError(f"factors={'x'.join(map(str, factors))} multiply to {math.prod(factors)}, but the layer's {axis} "
                           f"size is {size}; use {'x'.join(map(str, factorise(size, len(factors))))}")
    return factors


def numbered_cores(tensors: Mapping[str, Tensor]) -> list[Tensor] | None:
    """core0, core1, ... in order, or None where the names are not exactly these."""
    names = [f"core{d}" for d in range(len(tensors))]
    return [tensors[name] for name in names] if tensors and set(names) == set(tensors) else None


def _splits(size: int, count: int, smallest: int):
    if count == 1:
        yield (size,)
        return
    factor = smallest
    while factor**count <= size:
        if size % factor == 0:
            for rest in _splits(size // factor, count - 1, factor):
                yield (factor, *rest)
        factor += 1
