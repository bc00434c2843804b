"""Checks of a file's tensors: what is a factor, what is one number, and how large a product can get."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import TriLoRAError

# the largest number of half precision: a change of more than this would make infinite weights of most models
LIMIT = 65504.0
# of an alpha and every other single number: the square root of what fp32 holds, so that its multiples are finite too
LARGEST_NUMBER = 1e19
# up to here the coarse bound of a product is good enough
_SMALL = 1e3
# endings of what stands beside the factors of a layer
ALPHA, MAGNITUDES, RESHAPE, RESCALE = ".alpha", ".dora_scale", ".reshape_weight", ".rescale"
COMPANIONS = (ALPHA, MAGNITUDES, RESHAPE, RESCALE)


def factor(name: str, tensors: Mapping[str, Tensor], ending: str) -> Tensor:
    """The tensor under an ending. Raises TriLoRAError where it is missing, empty or holds no floating-point numbers."""
    key = name + ending
    if ending not in tensors:
        half = next((other for other in tensors if other not in COMPANIONS), "")
        raise TriLoRAError(
            f"{key} is missing, the other half of {name}{half}; the file is incomplete; copy or download it again"
        )
    tensor = tensors[ending]
    if not tensor.is_floating_point():
        raise TriLoRAError(f"{key} is {tensor.dtype}, expected floating-point factors; the file is broken")
    if tensor.numel() == 0:
        raise TriLoRAError(
            f"{key} is {tuple(tensor.shape)}: a layer of rank 0 or without size, whose factors cannot be multiplied; "
            "the file is broken"
        )
    return tensor


def matrix(name: str, tensors: Mapping[str, Tensor], ending: str) -> Tensor:
    """A factor as a matrix; it may have axes of length 1 behind its two. Raises TriLoRAError for another shape."""
    tensor = factor(name, tensors, ending)
    if tensor.ndim < 2 or any(n != 1 for n in tensor.shape[2:]):
        raise TriLoRAError(
            f"{name}{ending} is {tuple(tensor.shape)}: no matrix, expected (rows, columns); the file is broken"
        )
    return tensor.flatten(1)


def columns(name: str, tensors: Mapping[str, Tensor], ending: str) -> Tensor:
    """A factor as a matrix; its further axes are those of a convolution's kernel, and become columns."""
    tensor = factor(name, tensors, ending)
    if tensor.ndim < 2:
        raise TriLoRAError(
            f"{name}{ending} is {tuple(tensor.shape)}: no matrix, expected (rows, columns); the file is broken"
        )
    return tensor.flatten(1)


def number(key: str, value: Tensor | float) -> float:
    """A tensor of one real number. Raises TriLoRAError for several, complex ones, NaN and ones beyond
    LARGEST_NUMBER."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise TriLoRAError(
                f"{key} has shape {tuple(value.shape)} of {value.dtype}, expected one number; the file is broken"
            )
        value = value.item()
    if not math.isfinite(value) or abs(value) > LARGEST_NUMBER:
        raise TriLoRAError(f"{key} is {value:g}, expected a number of at most {LARGEST_NUMBER:g}; the file is broken")
    return float(value)


def largest(tensor: Tensor) -> float:
    """max |entry|; NaN or infinite where an entry is."""
    if tensor.element_size() == 1:
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)
    return worst(abs(float(low)), abs(float(high)))


def worst(*values: float) -> float:
    """The largest; NaN where one is NaN."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def product_bound(left: Tensor, right: Tensor) -> float:
    """At least max |entry| of left @ right: by the largest entries, else (Cauchy, Schwarz) by the longest row and
    column."""
    bound = largest(left) * largest(right) * right.shape[0]
    if bound <= _SMALL or math.isnan(bound):
        return bound
    rows, cols = (torch.linalg.vector_norm(factor.float(), dim=axis) for factor, axis in ((left, 1), (right, 0)))
    return min(bound, largest(rows) * largest(cols))


def whole_bound(*parts: float) -> float:
    """Of a product of parts, each bounded: at least what a product of any of them can reach, so that none overflows."""
    return math.inf if any(map(math.isnan, parts)) else math.prod(max(1.0, part) for part in parts)
