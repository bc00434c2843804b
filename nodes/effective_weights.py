"""What a MODEL's layers really multiply by, patches included, without loading or patching it."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.metadata import fingerprint
from ..trilora_ops.naming import PREFIX
from .comfy_host import layers_of
from .compat import is_readable, unpacked


class EffectiveWeights:
    """Layers of a MODEL's denoiser and their weights as the next run would have them, computed one at a time."""

    def __init__(self, patcher):
        self.patcher = patcher
        with patcher.use_ejected():
            self._layers = layers_of(patcher.model)
            # not the host's get_key_patches, which reads a state dict: a quantised layer's has keys that are no weights
            names = [name for name, _ in patcher.model.named_parameters(remove_duplicate=False) if name.startswith(PREFIX)]
            self._parts = {name: _parts(patcher, name) for name in names}

    def layers(self) -> Mapping[str, nn.Module]:
        """Target key -> linear layer or convolution."""
        return self._layers

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Of the layer's weight before patches, None where the model has no such layer."""
        return tuple(self._parts[key][0].shape) if key in self._layers else None

    def weight(self, key: str) -> Tensor:
        """The weight with its patches, a new fp32 tensor (out, in, *kernel) on the model's device. Raises TriLoRAError for one that is packed and cannot be read."""
        stored, convert, patches = self._parts[key]
        module, device = comfy.utils.get_attr(self.patcher.model, key.rpartition(".")[0]), self.patcher.load_device
        with torch.inference_mode():  # as the host does it: files' tensors are inference tensors, which not every patch takes elsewhere
            weight = unpacked(module, stored, device)
            if weight is None:
                if key in self._layers and not is_readable(module):
                    raise TriLoRAError(f"{key}: its weight is kept as {stored.dtype} by a {type(module).__name__} of another extension, which "
                                       "cannot be read here; load the model in fp16, bf16, fp8 or GGUF")
                weight = comfy.model_management.cast_to_device(stored, device, torch.float32, copy=True)
            if convert is not None:
                weight = convert(weight, inplace=True).float()
            weight = comfy.lora.calculate_weight(patches, weight, key)
        return weight.clone()  # a normal tensor where the caller wants one

    def same(self, key: str, other: "EffectiveWeights") -> bool:
        """Whether both have one weight with one list of patches: then nothing need be computed to know that they agree."""
        mine, _, patches = self._parts[key]
        its, _, others = other._parts[key]
        return mine is its and len(patches) == len(others) and all(a is b for a, b in zip(patches, others, strict=True))

    def keys(self) -> set[str]:
        """Every key of the denoiser, biases and norms included."""
        return set(self._parts)

    def fingerprint(self) -> str:
        """Identity of the unpatched model; see `ComfyHost.fingerprint`."""
        return fingerprint({key: self._parts[key][0] for key in self._layers if type(self._parts[key][0]) in (nn.Parameter, Tensor)})


def _parts(patcher, key: str):
    """(weight as stored, its dequantisation or None, patches); what a loaded clone has patched is read from its backup."""
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    if key in patcher.backup:
        weight = patcher.backup[key].weight
    if key in patcher.hook_backup:
        weight = patcher.hook_backup[key][0]
    return weight, convert, patcher.patches.get(key, [])
