"""A stand-in for layers that keep their weight packed, by the contract of ComfyUI-GGUF's: the tensor's own shape is that of
the packed bytes, `shape`, `tensor_type` and `tensor_shape` say what it stands for, copies are the tensor itself, patches are
left on it when a model is loaded, and the layer unpacks in `get_weight` and `cast_bias_weight`.

Eight bits an entry with one scale for each block of 32, as GGUF's Q8_0.
"""

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import nn

BLOCK = 32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """(out, in) -> bytes (out, in / 32 * 34): two bytes of scale and 32 of values a block."""
    blocks = weight.float().reshape(-1, BLOCK)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    values = (blocks / scale.float().clamp_min(1e-12)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), values.view(torch.uint8)], dim=1).reshape(len(weight), -1)


def unpack(data: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The other way."""
    blocks = data.reshape(-1, BLOCK + 2)
    scale, values = blocks[:, :2].contiguous().view(torch.float16), blocks[:, 2:].contiguous().view(torch.int8)
    return (scale.float() * values.float()).reshape(shape).to(dtype)


class PackedTensor(torch.Tensor):
    """Packed bytes where `tensor_type` is given, else a plain tensor of this class."""

    def __new__(cls, data, **facts):
        return super().__new__(cls, data)

    def __init__(self, data, tensor_type=None, tensor_shape=None, patches=()):
        super().__init__()
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, tensor_shape or self.size(), list(patches)

    def to(self, *args, **kwargs):
        new = super().to(*args, **kwargs)
        new.tensor_type, new.tensor_shape = getattr(self, "tensor_type", None), getattr(self, "tensor_shape", new.size())
        new.patches = list(getattr(self, "patches", []))
        return new

    def clone(self, *args, **kwargs):
        return self

    def detach(self, *args, **kwargs):
        return self

    @property
    def shape(self):
        return getattr(self, "tensor_shape", self.size())


class PackedLayer(nn.Module):
    """What the layers share."""

    comfy_cast_weights = True

    def get_weight(self, tensor, dtype):
        """The values of a tensor of this layer, its patches applied."""
        if tensor is None:
            return None
        packed = getattr(tensor, "tensor_type", None) is not None
        weight = unpack(tensor.data.as_subclass(torch.Tensor), tensor.tensor_shape, dtype) if packed else tensor.to(dtype)
        weight = weight.as_subclass(torch.Tensor)
        for patches, key in getattr(tensor, "patches", []):
            weight = comfy.lora.calculate_weight(patches, weight, key)
        return weight

    def cast_bias_weight(self, input=None, dtype=None, device=None, bias_dtype=None):
        """(weight, bias) as for an input like this."""
        dtype, device = dtype or input.dtype, device or input.device
        bias = None if self.bias is None else self.get_weight(self.bias.to(device), dtype)
        return self.get_weight(self.weight.to(device), dtype), bias

    def forward_comfy_cast_weights(self, input, *args, **kwargs):
        """As ComfyUI's own layers, with the weight unpacked."""
        if getattr(self.weight, "tensor_type", None) is None:
            return super().forward_comfy_cast_weights(input, *args, **kwargs).as_subclass(torch.Tensor)
        weight, bias = self.cast_bias_weight(input)
        return nn.functional.linear(input, weight, bias)


class PackedOps(comfy.ops.manual_cast):
    """ComfyUI's layers; linear layers may be packed, norms hold tensors of the same class."""

    class Linear(PackedLayer, comfy.ops.manual_cast.Linear):
        """A linear layer."""

    class LayerNorm(PackedLayer, comfy.ops.manual_cast.LayerNorm):
        """A norm."""


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """Leaves patches on packed tensors instead of changing them."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, **options):
        """One weight's."""
        if key not in self.patches:
            return
        weight = comfy.utils.get_attr(self.model, key)
        if getattr(weight, "tensor_type", None) is None:
            super().patch_weight_to_device(key, device_to=device_to, inplace_update=inplace_update, **options)
        else:
            weight.patches = [(self.patches[key], key)]

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        """Every weight's."""
        if unpatch_weights:
            for parameter in self.model.parameters():
                if getattr(parameter, "tensor_type", None) is not None:
                    parameter.patches = []
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

    def load(self, *args, force_patch_weights=False, **kwargs):
        """Patches also where the memory is short."""
        super().load(*args, force_patch_weights=True, **kwargs)


def packed(model: nn.Module) -> nn.Module:
    """Gives every linear layer of the denoiser a packed weight where its width allows it, and every other tensor the class.

    Returns the model.
    """
    for module in model.diffusion_model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not isinstance(module, PackedLayer):
                continue
            if parameter.ndim == 2 and parameter.shape[1] % BLOCK == 0:
                tensor = PackedTensor(pack(parameter), tensor_type="Q8_0", tensor_shape=parameter.size())
            else:
                tensor = PackedTensor(parameter.detach().clone(), tensor_shape=parameter.size())
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return model
