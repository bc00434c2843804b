"""A file's layers and their places in a model: converted by the host, matched by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import comfy.lora_convert
import torch
from torch import Tensor

from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.key_doctor import Diagnosis, examine
from ..trilora_ops.key_forms import known_forms
from ..trilora_ops.key_names import Spellings
from ..trilora_ops.message_words import short


@dataclass(frozen=True)
class Matched:
    """An adapter's layers and where they go.

    tensors: all of them by key, as the host converts them; layers: of those, the layers that have a place -> their
    tensors by ending; names: every name that the model knows, and those of the file that can mean one weight only -> the
    host's target.
    """

    tensors: dict[str, Tensor]
    layers: dict[str, Mapping[str, Tensor]]
    names: Mapping[str, object]
    diagnosis: Diagnosis


def converted(state: Mapping[str, Tensor]) -> AdapterState:
    """The same adapter under the names that the host's converter gives (BFL's control LoRA, USO, Wan Fun).

    A second conversion changes nothing. Raises TriLoRAError where two tensors would get one name.
    """
    tensors = known_forms(state)
    found = comfy.lora_convert.convert_lora(dict(tensors))  # it may rename in place
    kept = {id(tensor) for tensor in found.values()}
    lost = next((key for key, tensor in tensors.items() if id(tensor) not in kept), None)
    if lost is not None:
        same = f"{short(lost)}: another tensor of the file has the same name for ComfyUI"
        raise TriLoRAError(f"{same}, and only one could be used; the file is broken")
    return AdapterState(found, getattr(state, "metadata", None))


def match(state: Mapping[str, Tensor], spellings: Spellings, name: str, model: str, has_clip: bool) -> Matched:
    """Every layer of an adapter against the names of a MODEL and a CLIP; nothing is refused by this.

    name: the file's, for messages; model: what the model is called.
    """
    tensors = dict(converted(state))
    diagnosis = examine(name, tensors, spellings, model, has_clip)
    layers = {layer: found for layer, found in diagnosis.tensors.items() if layer in diagnosis.placed}
    return Matched(tensors, layers, {**spellings.names, **diagnosis.renamed}, diagnosis)


def target_shapes(model, clip) -> dict[str, torch.Size]:
    """Shape of every weight of a MODEL and an optional CLIP, by the host's target key."""
    # parameters, not the state dict: a quantised layer's state dict holds its packed storage
    shapes = {key: tensor.shape for key, tensor in model.model.named_parameters(remove_duplicate=False)}
    if clip is not None:
        shapes |= {key: tensor.shape for key, tensor in clip.cond_stage_model.named_parameters(remove_duplicate=False)}
    return shapes


def title_of(model) -> str:
    """What the host calls a MODEL's network: "SD15", "SDXL", "Flux"."""
    return type(getattr(model.model, "model_config", model.model)).__name__
