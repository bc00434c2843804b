"""Whether a file gives every layer once and whole: the host takes the last of two, and passes over a half in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..trilora_ops.checkpoint import ALPHA, PAIRS, part_of
from ..trilora_ops.errors import TriLoRAError

# endings that make a layer's weight by themselves, by kind; what is not here only accompanies (alpha, magnitudes, biases)
_WITHIN = {".hada_": "LoHa", ".lokr_": "LoKr", ".oft_": "OFT"}
_AT_THE_END = {".diff": "a full difference", ".set_weight": "a whole weight", ".w_norm": "a norm"}


def check_once(name: str, places: Mapping[str, tuple[str, object]], tensors: Mapping[str, Tensor]) -> None:
    """Raise TriLoRAError where a file has two layers for one place of the model, or an alpha that is more than a number.

    name: the file's; places: key -> (layer's name in the file, the host's target); tensors: of the file.
    """
    first: dict[object, tuple[str, str, str]] = {}
    for key, (head, target) in places.items():
        if key.endswith(ALPHA) and tensors[key].numel() != 1:
            raise TriLoRAError(f"{name}: {key} has shape {tuple(tensors[key].shape)}, expected one number; the file is broken; nothing was applied")
        kind = _kind_of(key)
        if kind is None:
            continue
        before = first.setdefault(target, (head, kind, key))
        if before[:2] != (head, kind):
            raise TriLoRAError(f"{name}: {before[2]} and {key} are two layers for one place of the model, of which only one could be applied; "
                               "keep one of them, or merge them; nothing was applied")


def check_left(name: str, keys: Iterable[str]) -> None:
    """Raise TriLoRAError for a key with a place in the model that no reader took although a layer is made of such keys."""
    for key in keys:
        if _kind_of(key) is not None:
            raise TriLoRAError(f"{name}: {key} is not part of a whole layer, its other tensors are missing; copy or download the file again; "
                               "nothing was applied")


def _kind_of(key: str) -> str | None:
    if part_of(key):
        return "a transform"
    for pair in PAIRS:
        if key.endswith(pair):
            return "low rank, " + pair[0]
    return next((kind for mark, kind in _WITHIN.items() if mark in key), None) or next(
        (kind for end, kind in _AT_THE_END.items() if key.endswith(end)), None)
