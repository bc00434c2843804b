"""From trained adapters to the public file's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..trilora_ops.adapter import Adapter
from ..trilora_ops.checkpoint import FileLayer
from ..trilora_ops.factors import canonicalise
from ..trilora_ops.naming import UNetLayout, public_name
from ..trilora_ops.one_alpha import one_alpha


def export_tensors(adapters: Mapping[str, Adapter], family: str, model_keys: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(public key -> fp32 CPU tensor in canonical form, public layer name -> rank).

    adapters: target key -> trained adapter; family: one of naming.FAMILIES; model_keys: all target
    keys of the model, adapted or not, from which a U-Net's levels are read.
    """
    layout = UNetLayout.of(model_keys)
    tensors, ranks, pairs, kernels = {}, {}, {}, {}
    for key, adapter in adapters.items():
        name = public_name(key, family, layout)
        transform = adapter.transform.tensors()
        if transform:
            parts = {"transform": transform, "residual": adapter.residual.tensors()}
            tensors |= {f"{name}.{part}.{n}": t.cpu() for part, found in parts.items() for n, t in found.items()}
            ranks[name] = adapter.residual.rank
        else:  # without a transform every residual is a low-rank pair: an ordinary LoRA file
            pairs[name], kernels[name] = canonicalise(adapter.residual.low_rank().cpu()), adapter.shape.kernel
            ranks[name] = pairs[name].rank
    for name, pair in one_alpha(pairs).items():
        tensors |= FileLayer(pair, kernels[name]).tensors(name)
    return tensors, ranks
