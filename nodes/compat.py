"""Everything we know about differences between host versions, tested by feature, never by version number."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.ops
import comfy.weight_adapter
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from .kernel_gradients import add_rope_gradients
from .shown_text import as_text

log = logging.getLogger("trilora")
_SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}
_OFFLOADABLE = "offloadable" in inspect.signature(comfy.ops.cast_bias_weight).parameters
_IDENTITY = (lambda a: a).__code__.co_code
_QUANTIZED = getattr(comfy.ops, "QuantizedTensor", ())


def Schema(**fields) -> io.Schema:
    """io.Schema without the fields that this host does not know (the Manager's scanner looks for calls of this name)."""
    return io.Schema(**{name: value for name, value in fields.items() if name in _SCHEMA_FIELDS})


def advanced(inp: io.Input) -> io.Input:
    """Mark an input as advanced: newer front ends fold it away, older ones show it."""
    inp.extra_dict["advanced"] = True
    return inp


def is_identity(function) -> bool:
    """Whether a patch has no function: the host then puts `lambda a: a`, every one of which has this byte code."""
    code = getattr(function, "__code__", None)
    return function is None or (code is not None and code.co_code == _IDENTITY)


def register_adapter(adapter: type) -> None:
    """Append a class to the host's list of weight adapters, once however often the pack is loaded.

    Of two copies of the pack the first one's classes stay, which the host's own loaders then use; each copy's nodes use
    their own. A warning names both folders.
    """
    for known in comfy.weight_adapter.adapters:
        if known.name == adapter.name:
            folders = [os.path.dirname(os.path.dirname(os.path.abspath(inspect.getfile(one)))) for one in (known, adapter)]
            if folders[0] != folders[1]:
                log.warning("two copies of ComfyUI-TriLoRA are installed, in %s and in %s; remove one of them", *folders)
            return
    comfy.weight_adapter.adapters.append(adapter)


def training_clone(patcher):
    """A clone whose weights stay put during training (0.33.0 may evict the weights of a dynamic one)."""
    dynamic = getattr(patcher, "is_dynamic", lambda: False)()
    # a dynamic model is read from its file anew, where its loader has said how
    return patcher.clone(disable_dynamic=True) if dynamic and patcher.cached_patcher_init is not None else patcher.clone()


@contextmanager
def training_kernels() -> Iterator[None]:
    """0.33.0: use kernels that have a backward formula (RoPE, RMS norm); 0.8 to 0.13: give RoPE's kernel one; 0.3.64 has no others."""
    management = comfy.model_management
    if not hasattr(management, "in_training"):
        add_rope_gradients()
        yield
        return
    before, management.in_training = management.in_training, True
    try:
        yield
    finally:
        management.in_training = before


@contextmanager
def frozen_weight(module: nn.Module, like: Tensor) -> Iterator[Tensor]:
    """The module's weight as its forward pass would use it on an input like `like`: cast, moved, patched, dequantised.

    On 0.33.0 an offloaded weight lives in a buffer that is reused afterwards: use it inside the block only.
    """
    if hasattr(module, "cast_bias_weight"):  # a layer of another pack that unpacks its weight itself (GGUF)
        yield module.cast_bias_weight(like)[0]
    elif not hasattr(module, "weight_function"):  # not one of the host's own layers
        yield module.weight.to(like.device, like.dtype)
    elif _OFFLOADABLE:
        weight, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True)
        try:
            yield _plain(module, weight, like)
        finally:
            comfy.ops.uncast_bias_weight(module, weight, bias, stream)
    else:
        yield _plain(module, comfy.ops.cast_bias_weight(module, like)[0], like)


def _plain(module: nn.Module, weight: Tensor, like: Tensor) -> Tensor:
    if _QUANTIZED and isinstance(weight, _QUANTIZED):
        weight = weight.dequantize().to(like.dtype)
    scale = getattr(module, "scale_weight", None)  # 0.3.64: scaled fp8 layers multiply it in their own forward pass
    return weight * scale.to(weight.device, weight.dtype) if isinstance(scale, Tensor) else weight


def is_readable(module: nn.Module) -> bool:
    """Whether `frozen_weight` can give the layer's weight: it is no pack of integers that only its own forward pass understands."""
    weight = module.weight
    return weight.is_floating_point() or bool(_QUANTIZED and isinstance(weight, _QUANTIZED)) or hasattr(module, "cast_bias_weight")


def unpacked(module: nn.Module, weight: Tensor, device: torch.device) -> Tensor | None:
    """fp32 values of a parameter that its layer keeps packed (GGUF), without patches; None for any other parameter.

    Such layers have `cast_bias_weight`, and `get_weight(tensor, dtype)`, which also applies the patches that a loaded clone of
    the model has left on the tensor.
    """
    if not (hasattr(module, "cast_bias_weight") and hasattr(module, "get_weight")):
        return None
    patches = getattr(weight, "patches", None)
    if patches:
        weight.patches = []
    try:
        return module.get_weight(weight.to(device), torch.float32)
    finally:
        if patches:
            weight.patches = patches


def normal_copy(tensor: Tensor) -> Tensor | None:
    """A copy that autograd may keep, of a tensor made in inference mode; None where it is packed, and unpacked into new tensors."""
    copy = tensor.detach().clone()
    if not copy.is_inference():
        return copy
    # a class of another pack whose copies are the tensor itself (GGUF)
    return tensor.as_subclass(Tensor).detach().clone() if tensor.is_floating_point() else None


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bf16. Of processors the host says no whatever they have."""
    if device.type == "cpu":
        return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return comfy.model_management.should_use_bf16(device)


def show_text(text: str, node_id: str | None) -> None:
    """Text on the running node, where a front end is connected: these characters in these lines, whatever they are."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(as_text(text), node_id)


def announce(event: str, data: dict) -> None:
    """Tell every page that is open; its scripts listen for `event`. Whatever fails here, the caller's work is done."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    try:
        server.send_sync(event, data)
    except Exception as error:  # no page hears it, for one where the server is being stopped
        log.info("no page was told of %s: %s", event, error)
