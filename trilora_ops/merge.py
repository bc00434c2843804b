"""Adding any number of low-rank residuals onto one weight in a single pass, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .factors import LowRank


def add_low_rank_(weight: Tensor, parts: Sequence[tuple[LowRank, float]]) -> Tensor:
    """W += sum_i strength_i * scale_i * up_i * down_i, as one addmm_; the full-size delta is not formed.

    weight: (out, in, *kernel), floating point of 16 bits or more, contiguous or channels-last or (for a slice of a
    fused weight) a strided matrix; parts: (factors, strength). Returns `weight`, written in place; the products run in
    its dtype.
    """
    ups = [pair.up.to(weight.device, weight.dtype) for pair, _ in parts]
    downs = [pair.down.to(weight.device, weight.dtype) for pair, _ in parts]
    scales = [pair.scale * strength for pair, strength in parts]
    if len(parts) == 1:
        up, down, factor = ups[0], downs[0], scales[0]
    else:
        up, down, factor = torch.cat([u * s for u, s in zip(ups, scales, strict=True)], dim=1), torch.cat(downs), 1.0

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
