"""Adapters as the host's patches: reading a file into them, checked before anything is applied."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import comfy.weight_adapter
import torch

from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.files.layer import Layer, ScaledLayer
from ..trilora_ops.files.low_rank import MID, LowRankLayer
from ..trilora_ops.files.numbers import ALPHA
from ..trilora_ops.files.transform import TransformLayer
from ..trilora_ops.files.whole import BiasLayer, DifferenceLayer
from ..trilora_ops.key_names import Spellings
from ..trilora_ops.message_words import counted, short, some
from .comfy_layers import LayerPatch
from .comfy_low_rank import LowRankPatch
from .comfy_stack import linear
from .comfy_transforms import TransformPatch
from .file_layers import FileLayers, read_layers
from .matching import Matched, match, target_shapes, title_of
from .names import layer_names
from .notices import notice

# kinds of the host's own, which the table of kinds reads
_HOSTS = {"lora", "loha", "lokr", "glora", "oft", "boft"}


@dataclass(frozen=True)
class Places:
    """Where a file's layers can go: every name a file may give a layer -> the host's target key, and the weights'
    shapes."""

    names: dict
    shapes: dict[str, torch.Size]
    has_clip: bool
    model: str = "a text encoder"  # what it is called

    @classmethod
    def of(cls, model, clip) -> "Places":
        """For a MODEL and an optional CLIP patcher."""
        return cls(layer_names(model, clip), target_shapes(model, clip), clip is not None, title_of(model))

    @functools.cached_property
    def spellings(self) -> Spellings:
        """The names in the forms in which they are compared with a file's."""
        return Spellings(self.names, self.shapes)

    def match(self, state: AdapterState, name: str) -> Matched:
        """Where the layers of a file go; see `matching.match`."""
        return match(state, self.spellings, name, self.model, self.has_clip)

    @functools.cached_property
    def blocks(self):
        """The `Blocks` of the model and of the text encoder."""
        from ..trilora_ops.blocks import Blocks  # not at the pack's import: only a graph with block weights needs it

        return Blocks.of(self.shapes)

    def patches(self, state: AdapterState, name: str, keep: int = 0) -> dict:
        """Every layer of a file as a patch by the host's target: plain low-rank ones as `LowRankPatch`, transforms as
        `TransformPatch`, differences as the host's own, every other kind as `LayerPatch`.

        Each is linear in the strength that add_patches is given. name: the file's, for messages; keep: directions
        kept of low-rank layers, 0 = all. What has no place in the model, or is of a kind that is not supported, is
        said in a notice. Raises TriLoRAError if too little has one (`Diagnosis.refusal`), or a layer is not whole, not
        finite or not of its weight's size.
        """
        matched = self.match(state, name)
        if refusal := matched.diagnosis.refusal():
            raise TriLoRAError(f"{refusal}; nothing was applied")
        found = read_layers(name, matched, self.shapes)
        others = _of_other_extensions(matched, found)
        if not found.layers and not others and not found.absent:
            raise TriLoRAError(_no_kind(name, matched, found))
        if keep and (count := sum(not _can_cut(layer) for layer in found.layers.values()) + len(others)):
            notice(f"{name}: keep_rank left {counted(count, 'layer')} alone, not being low-rank")
        _say_what_is_left(name, matched, found, others)
        _say_what_does_nothing(name, found.layers)
        patches = {target: _patch(layer, keep) for target, layer in found.layers.items()}
        return patches | {target: linear(target, patch) for target, patch in others.items()}


def _no_kind(name: str, matched: Matched, found: FileLayers) -> str:
    if found.unsupported:
        key, method = next(iter(found.unsupported.items()))
        return (
            f"{name}: holds {method} ({short(key)}), which is not supported; merge it into a model with the program that "
            "wrote it; nothing was applied"
        )
    return (
        f"{name}: none of its {counted(len(matched.tensors), 'tensor')} is of a kind that can be applied "
        f"({some(matched.tensors)}); choose a file of another kind; nothing was applied"
    )


def _say_what_does_nothing(name: str, layers) -> None:
    still = [layer.name for layer in layers.values() if isinstance(layer, ScaledLayer) and layer.scale == 0]
    if still:
        notice(f"{name}: an alpha of 0, with which a layer changes nothing, in {counted(len(still), 'layer')} ({short(still[0])})")


def _say_what_is_left(name: str, matched: Matched, found: FileLayers, others) -> None:
    methods: dict[str, list[str]] = {}
    for key, method in found.unsupported.items():
        methods.setdefault(method, []).append(key)
    for method, keys in methods.items():
        found_of = f"{counted(len(keys), 'tensor')} of {method}, which is not supported, left out"
        notice(f"{name}: {found_of} ({short(keys[0])})")
    used = set().union(*(getattr(patch, "loaded_keys", ()) for patch in others.values()))
    unread = [key for key in found.left if key not in found.unsupported and key not in used]
    if text := matched.diagnosis.notice(unread):
        notice(text)


def patches_from_state(state: AdapterState, model, clip, name: str, keep: int = 0) -> dict:
    """`Places.patches` of one file on a model and an optional text encoder; nothing is applied by this."""
    return Places.of(model, clip).patches(state, name, keep)


def _can_cut(layer: Layer) -> bool:
    # a Tucker core or DoRA's magnitudes make it more than up * down
    return isinstance(layer, LowRankLayer) and layer.magnitudes is None and MID not in layer.tensors


def _patch(layer: Layer, keep: int):
    if keep and _can_cut(layer):
        layer = layer.cut(keep)
    if isinstance(layer, LowRankLayer) and layer.is_plain:
        return LowRankPatch(
            {layer.name + ending for ending in (*layer.tensors, ALPHA)},
            (layer.tensors[layer.up_end], layer.tensors[layer.down_end], layer.alpha, None, None, None),
        )
    if isinstance(layer, TransformLayer):
        return TransformPatch(
            {layer.name + ending for ending in layer.tensors}, tuple(tuple(part.items()) for part in layer.parts())
        )
    if isinstance(layer, (DifferenceLayer, BiasLayer)):
        return ("diff", (layer.tensor,))
    return LayerPatch.of(layer)


def _of_other_extensions(placed: Matched, found: FileLayers) -> dict:
    """Target -> patch of a kind that another extension has added to the host's list, from tensors that the table does
    not know."""
    kinds = [
        kind
        for kind in comfy.weight_adapter.adapters
        if kind.name not in _HOSTS and not kind.name.startswith("trilora_")
    ]
    patches = {}
    for head, tensors in placed.layers.items() if kinds else ():
        alpha = tensors.get(".alpha")
        if placed.names[head] in found.layers or not found.left or (alpha is not None and alpha.numel() != 1):
            continue
        for kind in kinds:
            patch = kind.load(
                head, placed.tensors, None if alpha is None else alpha.item(), tensors.get(".dora_scale"), set()
            )
            if patch is not None:
                patches[placed.names[head]] = patch
    return patches
