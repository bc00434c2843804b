"""Adding any number of low-rank residuals onto one weight in a single pass, in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .factors import LowRank


def add_low_rank_(weight: Tensor, parts: Sequence[tuple[LowRank, float]]) -> Tensor:
    """W += sum_i strength_i * scale_i * up_i * down_i, as one addmm_; the full-size delta is not formed.

    weight: (out, in, *kernel), floating point of 16 bits or more, contiguous or channels-last or (for a slice of a
    fused weight) a strided matrix; parts: one or more (factors, strength). Returns `weight`, written in place; the
    products run in its dtype.
    """
    up, down, factor = _join(parts, weight)
    channels_last = weight.ndim > 2 and not weight.is_contiguous()
    if channels_last:
        weight_view = weight.movedim(1, -1)
        down = down.view(down.shape[0], weight.shape[1], -1).transpose(1, 2).reshape(down.shape)
    else:
        weight_view = weight
    if weight.ndim > 2 and not weight_view.is_contiguous():  # a slice of a convolution: no view has two axes
        weight += (up @ down).mul_(factor).view(weight_view.shape).movedim(-1, 1)
        return weight
    matrix = weight_view if weight.ndim == 2 else weight_view.view(weight.shape[0], -1)
    matrix.addmm_(up, down, alpha=factor)
    return weight


def _join(parts: Sequence[tuple[LowRank, float]], weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """(up, down, factor) with factor * up * down the sum of all parts; up: (out, sum r), down: (sum r, columns).

    Factors are joined in the dtype they have in the file and cast once. Scales that differ go into the smaller of the
    two, in fp32 and relative to the largest, so that half precision can hold the result.
    """
    if weight.dtype == torch.float16:
        parts = [(_balanced(pair), strength) for pair, strength in parts]
    scales = [pair.scale * strength for pair, strength in parts]
    up, down = _cat([pair.up for pair, _ in parts], 1, weight), _cat([pair.down for pair, _ in parts], 0, weight)
    factor = scales[0]
    if any(scale != factor for scale in scales):
        factor = max(scales, key=abs)
        ratios = [scale / factor for (pair, _), scale in zip(parts, scales, strict=True) for _ in range(pair.rank)]
        ratios = torch.tensor(ratios, dtype=torch.float32, device=weight.device)
        if up.numel() <= down.numel():
            up = up.to(weight.device, torch.float32) * ratios
        else:
            down = down.to(weight.device, torch.float32) * ratios[:, None]
    return up.to(weight.device, weight.dtype), down.to(weight.device, weight.dtype), factor


def _cat(factors: list[Tensor], axis: int, weight: Tensor) -> Tensor:
    if len(factors) == 1:
        return factors[0]
    if len({factor.dtype for factor in factors}) > 1:  # not every two dtypes can be joined
        factors = [factor.to(weight.dtype) for factor in factors]
    return torch.cat(factors, dim=axis)


def _balanced(pair: LowRank) -> LowRank:
    """The same product from factors whose largest entries are near 1, as fp16 needs them; their sizes go into the scale."""
    sizes = [2.0 ** math.floor(math.log2(size)) if (size := float(factor.abs().max())) else 0.0 for factor in (pair.up, pair.down)]
    if not all(sizes):
        return replace(pair, scale=0.0)
    return LowRank(pair.up.float() / sizes[0], pair.down.float() / sizes[1], pair.scale * sizes[0] * sizes[1])
