"""Transform adapters as a class of the host's own list, so that every loader there is loads them."""

from __future__ import annotations

import dataclasses
import logging

import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..trilora_ops.adapter import Adapter, LayerShape
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.registry import collect_tensors, read_adapter_tensors, read_part
from ..trilora_ops.residuals.none import NoResidual
from .compat import is_identity

log = logging.getLogger("trilora")


class TransformPatch(WeightAdapterBase):
    """W' = W0 T + R from a file's `<layer>.transform.*` and `<layer>.residual.*`.

    Holds (loaded_keys, (transform, residual)), each part a tuple of (name, tensor) pairs: the host rebuilds an adapter
    from just these. Strength is linear: W + strength * (W' - W). Products run in fp32 whatever the weight's dtype.
    """

    name = "trilora_transform"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def load(cls, x, lora, alpha, dora_scale, loaded_keys=None):
        """The layer named `x` of a file, or None where it has no transform."""
        transform, residual = collect_tensors(lora, x)
        if not transform:
            return None
        loaded_keys = set() if loaded_keys is None else loaded_keys
        loaded_keys.update(f"{x}.transform.{name}" for name in transform)
        loaded_keys.update(f"{x}.residual.{name}" for name in residual)
        return cls(loaded_keys, (tuple(transform.items()), tuple(residual.items())))

    def adapter(self, shape: LayerShape, device: torch.device) -> Adapter:
        """The adapter on a layer of `shape`, fp32. Raises TriLoRAError where the tensors are another layer's."""
        return read_adapter_tensors(shape, *(_ready(part, device) for part in self.weights)).requires_grad_(False)

    def add_to_(self, target: Tensor, weight: Tensor, key: str, strength: float, function=None) -> None:
        """target += strength * (W0 (T - I) + function(R)), W0 = weight; a broken layer is reported and left alone, as the host does.

        function: how the rows that a file gives are laid out here (the halves of a fused weight exchanged). W0 is laid out
        so already, and T only mixes columns.
        """
        try:
            adapter = self.adapter(shape_of(weight), weight.device)
        except TriLoRAError as error:
            log.error("ERROR %s %s %s", self.name, key, error)
            return
        pair = None if is_identity(function) else adapter.residual.low_rank()
        if pair is not None:
            adapter.residual = NoResidual(adapter.shape)
        adapter.add_delta_(target, weight, strength)  # first, since target may be W0 itself
        if pair is not None:
            target += function((strength * pair.dense()).view(weight.shape).to(target.dtype))

    @torch.no_grad()
    def calculate_weight(self, weight, key, strength, strength_model, offset, function,
                         intermediate_dtype=torch.float32, original_weight=None):
        """W += strength * (W0 (T - I) + function(R)), in place."""
        self.add_to_(weight, weight, key, strength, function)
        return weight

    def bypass_forward(self, org_forward, x: Tensor, *args, **kwargs) -> Tensor:
        """f(x + strength (T x - x)) + strength R x: what the merged layer gives, its weight left alone (0.33.0)."""
        conv = self.is_conv
        geometry = (self.kw_dict["stride"], self.kw_dict["padding"], self.kw_dict["dilation"]) if conv else ()
        shape = LayerShape(0, x.shape[1] if conv else x.shape[-1], self.kernel_size if conv else (), *geometry)
        # the host moves flat tuples only, and this runs in every forward pass
        self.weights = tuple(tuple((name, tensor.to(x.device)) for name, tensor in part) for part in self.weights)
        transform, residual = [_ready(part, x.device) for part in self.weights]
        T = read_part("transform", shape, transform).requires_grad_(False)
        y = org_forward(x + self.multiplier * (T.act(x) - x), *args, **kwargs)
        shape = dataclasses.replace(shape, out=y.shape[1] if conv else y.shape[-1])
        R = read_part("residual", shape, residual).requires_grad_(False)
        return y + self.multiplier * R.add_output(torch.zeros_like(y), x)


def _ready(part, device: torch.device) -> dict[str, Tensor]:
    """A part's tensors in fp32 on `device`, as normal ones wherever a parameter must be made of them: loader nodes read
    files in inference mode, and training loads the model outside of it."""
    tensors = {name: tensor.to(device, torch.float32) for name, tensor in part}
    return {name: t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t for name, t in tensors.items()}


def shape_of(weight: Tensor) -> LayerShape:
    """The layer's shape as its weight tells it: (out, in, *kernel)."""
    return LayerShape(weight.shape[0], weight.shape[1], tuple(weight.shape[2:]))
