"""Any number of adapters of any kind on one weight, as a single patch in which their order does not matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import comfy.lora
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor

from ..trilora_ops.merge import add_low_rank_
from ..trilora_ops.naming import split_target
from .comfy_layers import LayerPatch
from .comfy_low_rank import LowRankPatch
from .comfy_transforms import TransformPatch
from .compat import is_identity

# patches of ours, and the host's own difference: W + s (W_1 - W) by themselves
_LINEAR = {LowRankPatch.name, LayerPatch.name, TransformPatch.name, "diff"}


class StackPatch(WeightAdapterBase):
    """W' = W + sum_i s_i (W_i - W), W_i being the weight with adapter i alone on it, at strength 1.

    Every adapter acts on the weight that comes in, so their order never matters, and the result is linear in every
    strength, whatever the kind (core squares it for OFT and bends it for BOFT).

    Holds (loaded_keys, parts): each part is a patch tuple of the host's, (s_i, patch, 1.0, offset, function), on the whole
    weight or on a slice (axis, start, length) of it. The host rebuilds it, and the adapters in its parts, from just these.
    """

    name = "trilora_stack"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_shape(self, key):
        """The shape that some part pads the weight to, or None (0.33.0)."""
        shapes = [new_shape(patch, key) for _, patch, _, offset, _ in self.weights if offset is None]
        shapes = [shape for shape in shapes if shape is not None]
        return _around(*shapes) if shapes else None

    @torch.no_grad()
    def calculate_weight(self, weight, key, strength, strength_model, offset, function,
                         intermediate_dtype=torch.float32, original_weight=None):
        """Adds all parts at once, in place unless one of them pads the weight; returns the weight.

        Low-rank parts need one addmm_ for each slice and no buffer. Where there are others, everything is summed in fp32
        and rounded once: their deltas in one buffer while W is still whole, then the low-rank parts. One such part alone goes
        from W to W_1 on a straight line that ends in W_1 itself, without the rounding of W_1 - W.
        """
        low_rank: dict[tuple | None, list] = {}
        others = []
        for part in self.weights:
            pair = part[1].pair() if isinstance(part[1], LowRankPatch) and is_identity(part[4]) else None
            if pair is None:
                others.append(part)
            else:
                low_rank.setdefault(part[3], []).append((pair, part[0] * strength))

        # W itself where it can be written to part by part
        result = weight if weight.element_size() >= (4 if others else 2) else weight.float()
        if len(self.weights) == 1 and others and not isinstance(others[0][1], TransformPatch):
            factor, offset = others[0][0] * strength, others[0][3]
            changed = _changed(result, key, others[0], original_weight)
            result = _pad(result, changed.shape) if offset is None else result
            _part(result, result.shape, offset).lerp_(changed, factor)
        elif others:
            delta = torch.zeros_like(result)
            for part in others:
                if isinstance(part[1], TransformPatch):
                    place = (_part(t, weight.shape, part[3]) for t in (delta, result))
                    part[1].add_to_(*place, key, part[0] * strength, part[4])
                    continue
                change = _change(result, key, part, original_weight)
                delta = _pad(delta, _around(delta.shape, change.shape))
                _part(delta, change.shape if part[3] is None else weight.shape, part[3]).add_(change, alpha=part[0] * strength)
            result = _pad(result, delta.shape)
            result += delta
        for offset, pairs in low_rank.items():
            add_low_rank_(_part(result, weight.shape, offset), pairs)
        if result is weight:
            return weight
        return weight.copy_(result) if result.shape == weight.shape else result.to(weight.dtype)


def stack_patches(files: Iterable[tuple[Mapping, float]]) -> dict[str, StackPatch]:
    """(a file's patches by the host's target key, its strength), ... -> one StackPatch for each weight, for add_patches.

    Patches that are stacks already give their parts.
    """
    parts: dict[str, list] = {}
    for patches, strength in files:
        for target, patch in patches.items() if strength else ():
            key, offset, function = split_target(target)
            inner = patch.weights if isinstance(patch, StackPatch) else [(1.0, patch, 1.0, None, None)]
            parts.setdefault(key, []).extend((strength * s, one, 1.0, offset or own_offset, function or own_function)
                                             for s, one, _, own_offset, own_function in inner)
    return {key: StackPatch(set(), tuple(found)) for key, found in parts.items()}


def linear(target, patch):
    """A patch whose change is its strength times W_1 - W: itself where the host computes it so, else alone in a StackPatch.

    target: where it goes, see `stack_patches`. Kinds of other extensions may do anything with their strength.
    """
    if (patch.name if isinstance(patch, WeightAdapterBase) else patch[0]) in _LINEAR:
        return patch
    return StackPatch(set(), ((1.0, patch, 1.0, None, split_target(target)[2]),))


def new_shape(patch, key: str) -> tuple[int, ...] | None:
    """The shape to which a patch pads its weight, None where it pads nothing."""
    if isinstance(patch, LoRAAdapter):  # older hosts do not ask it
        return None if patch.weights[5] is None else tuple(patch.weights[5])
    if isinstance(patch, WeightAdapterBase):
        return patch.calculate_shape(key) if hasattr(patch, "calculate_shape") else None
    kind, values = patch
    return tuple(values[0].shape) if kind == "diff" and len(values) > 1 and values[1]["pad_weight"] else None


def _change(weight: Tensor, key: str, part: tuple, original_weight) -> Tensor:
    """W_i - W of one part, of its slice's shape or, where the part pads W, of the larger one."""
    if isinstance(part[1], LayerPatch):
        return part[1].delta(_part(weight, weight.shape, part[3]), part[4])
    changed, weight = _changed(weight, key, part, original_weight), _part(weight, weight.shape, part[3])
    _part(changed, weight.shape, None).sub_(weight)
    return changed


def _changed(weight: Tensor, key: str, part: tuple, original_weight) -> Tensor:
    """W_i: the weight, or the part's slice of it, with this part alone at strength 1, as the host computes it."""
    _, patch, _, offset, function = part
    weight = _part(weight, weight.shape, offset).clone()
    return comfy.lora.calculate_weight([(1.0, patch, 1.0, None, function)], weight, key, torch.float32, original_weight)


def _part(tensor: Tensor, shape, offset) -> Tensor:
    """View of the first `shape` entries of a tensor that may have been padded, and in it of a slice (axis, start, length)."""
    corner = tensor if tensor.shape == shape else tensor[tuple(slice(n) for n in shape)]
    return corner if offset is None else corner.narrow(*offset)


def _around(*shapes) -> tuple[int, ...]:
    """The smallest shape into which all of the shapes fit."""
    return tuple(map(max, zip(*shapes, strict=True)))


def _pad(tensor: Tensor, shape) -> Tensor:
    return tensor if tuple(tensor.shape) == tuple(shape) else comfy.lora.pad_tensor_to_shape(tensor, shape)
