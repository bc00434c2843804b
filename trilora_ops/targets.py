"""Which layers an adapter may change, by what they do in the model (the same words for every family)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .errors import TriLoRAError

# q, k, v and out of self- and cross-attention; Flux-like single-stream blocks fuse theirs into linear1 and linear2
_ATTENTION = r"\.(?:[a-z0-9_]*attn[0-9]*|[a-z0-9_]*attention)\.|single_(?:stream_)?blocks\.\d+\.linear[12]\."
_MODULATION = r"modulation|adaln|_mod\.|\.norm|emb_layers"
# the numbered blocks, without the first convolution of a U-Net, which is numbered among them
_BLOCK = r"(?:blocks?|layers)\.(?!0\.0\.weight)\d+\."
TARGETS = {
    "attention": "q, k, v and out of self- and cross-attention (the papers' choice)",
    "transformer": "all linear layers of the transformer blocks: attention, feed-forward, projections",
    "linear": "all linear layers inside blocks, modulation included",
    "linear+conv": "all linear layers and convolutions inside blocks (LoCon)",
    "everything": "also the layers outside the blocks, some of which only allow a small rank",
}


def select(layers: Mapping[str, int], target: str) -> list[str]:
    """The target keys that `target` names, in the model's order.

    layers: key of every adaptable weight -> number of kernel axes (0 for a linear layer). A 1x1 convolution inside a
    transformer (SD1.x's proj_in, proj_out) counts as linear. Raises TriLoRAError for an unknown word or no match.
    """
    if target not in TARGETS:
        raise TriLoRAError(f"target={target!r}: choose one of {', '.join(TARGETS)}")
    chosen = [key for key, axes in layers.items() if _matches(key, axes, target)]
    if not chosen:
        raise TriLoRAError(f"target={target!r} names no layer of this model ({len(layers)} adaptable layers, for example "
                           f"{_example(layers)}); choose a wider target")
    return chosen


def _matches(key: str, axes: int, target: str) -> bool:
    if target == "everything":
        return True
    if not re.search(_BLOCK, key):
        return False
    if target == "linear+conv":
        return True
    if axes and not (".proj_in." in key or ".proj_out." in key):
        return False
    if target == "linear":
        return True
    if re.search(_MODULATION, key):
        return False
    return target == "transformer" or (axes == 0 and bool(re.search(_ATTENTION, key)))


def _example(layers: Iterable[str]) -> str:
    return next(iter(layers), "none")
