"""What Inspect Adapter says: facts from an adapter's tensors and from its metadata."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from ..training.report import describe_run
from ..trilora_ops.analysis import LayerFacts, analyse
from ..trilora_ops.bounds import read_json
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.metadata import title, trigger

_STRONGEST = 5
_UNKNOWN = "not said"


def inspect(adapter: Mapping[str, torch.Tensor]) -> list[LayerFacts]:
    """`analysis.analyse` of a LORA_MODEL. Raises TriLoRAError where it holds no tensors."""
    layers = analyse(adapter)
    if not layers:
        raise TriLoRAError("adapter: holds no tensors; connect the output of Load Adapter or Train Adapter")
    return layers


def describe_adapter(layers: Sequence[LayerFacts], metadata: Mapping[str, str]) -> str:
    """The report: facts from metadata, from the tensors, the layers of most energy, kinds that are not measured."""
    spectra = [layer for layer in layers if layer.rank]
    whole = sum(layer.energy for layer in spectra)
    ranks = Counter(layer.rank for layer in spectra)
    changes = [layer.change for layer in layers if layer.change is not None]
    facts = {
        "method": metadata.get("trilora.method") or metadata.get("ss_network_module") or _UNKNOWN,
        "base": _base(metadata),
        "trigger": trigger(metadata) or _UNKNOWN,
        "layers": ", ".join(f"{count} {kind}" for kind, count in Counter(layer.kind for layer in layers).items()),
        "size": f"{sum(layer.bytes for layer in layers) / 2**20:.1f} MiB of tensors",
    }
    if spectra:
        facts["rank"] = ", ".join(f"{rank} in {count} layer{'s' * (count > 1)}" for rank, count in ranks.most_common(6)) + (" and others" if len(ranks) > 6 else "")
        facts["effective rank"] = f"{statistics.median(layer.effective_rank for layer in spectra):.1f} in the middle layer, {max(layer.effective_rank for layer in spectra):.1f} at most"
        facts["energy"] = f"‖R‖ = {whole**0.5:.4g} over {len(spectra)} layers"
    if changes:
        facts["transforms"] = f"‖T − I‖/√J = {statistics.median(changes):.4g} in the middle layer, {max(changes):.4g} at most"
    if steps := _provenance(metadata):
        facts["made by"] = "; ".join(steps)
    if others := len(layers) - len(spectra) - sum(layer.change is not None and not layer.rank for layer in layers):
        facts["not measured"] = f"{others} layer{'s' * (others > 1)} of other kinds, which only count for the size"
    strongest = sorted(spectra, key=lambda layer: -layer.energy)[:_STRONGEST]
    lines = [f"  {layer.energy / (whole or 1):6.1%}  {layer.short_name}" for layer in strongest]
    return "\n".join([describe_run(facts), *(["most energy", *lines] if lines else [])])


def picture_title(layers: Sequence[LayerFacts], metadata: Mapping[str, str]) -> str:
    """What stands above the pictures."""
    name = title(metadata) or metadata.get("trilora.method") or "adapter"
    return f"{name if len(name) <= 60 else name[:59] + '…'}, {len(layers)} layers"


def _base(metadata: Mapping[str, str]) -> str:
    family = metadata.get("trilora.family") or metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture") or _UNKNOWN
    name, fingerprint = metadata.get("ss_sd_model_name"), metadata.get("trilora.base_fingerprint")
    return ", ".join(part for part in (family, name, fingerprint and f"fingerprint {fingerprint[:12]}") if part)


def _provenance(metadata: Mapping[str, str]) -> list[str]:
    """The tools that the adapter went through, oldest first, a phrase each."""
    try:
        steps = read_json(metadata.get("trilora.provenance", "[]"))
        return [", ".join(_phrase(key, value) for key, value in step.items() if value) for step in steps]
    except (ValueError, TypeError, AttributeError):  # another program's
        return []


def _phrase(key: str, value) -> str:
    if key == "action":
        return f"{value!s:.200}"
    return f"{key} " + (f"{len(value)} adapters" if isinstance(value, list) else f"{value:.4g}" if isinstance(value, float) else f"{value!s:.200}")
