"""A low-rank layer as a patch of the host's, merged without forming its delta."""

from __future__ import annotations

import torch
from comfy.weight_adapter import LoRAAdapter

from ..trilora_ops.factors import LowRank
from ..trilora_ops.merge import add_low_rank_
from .compat import is_identity


class LowRankPatch(LoRAAdapter):
    """The host's LoRA adapter, merged with one addmm_ instead of forming the delta.

    Holds what its parent holds, (loaded_keys, (up, down, alpha, mid, dora_scale, reshape)), so that the host can
    rebuild it and its bypass mode works; everything but a plain low-rank merge is left to the parent.
    """

    def pair(self) -> LowRank | None:
        """The factors as matrices; None where a Tucker core, DoRA's magnitudes or a new shape make it more than up * down."""
        up, down, alpha, *more = self.weights
        if any(part is not None for part in more):
            return None
        return LowRank(up.flatten(1), down.flatten(1), 1.0 if alpha is None else alpha / down.shape[0])

    @torch.no_grad()
    def calculate_weight(self, weight, key, strength, strength_model, offset, function,
                         intermediate_dtype=torch.float32, original_weight=None):
        """W += strength * alpha / r * up * down, in place; a `function` patch gets the delta it asks for."""
        pair = self.pair()
        if pair is None or not is_identity(function) or weight.element_size() == 1:
            return super().calculate_weight(weight, key, strength, strength_model, offset, function, intermediate_dtype, original_weight)
        return add_low_rank_(weight, [(pair, strength)])
