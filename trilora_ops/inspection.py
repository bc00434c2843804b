"""What is said of an adapter: facts from its tensors, from its metadata, from the names of its layers and, with a model, where they go."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from .analysis import LayerFacts, analyse
from .block_names import blocks_in_file
from .bounds import read_json
from .errors import TriLoRAError
from .file_origin import family_told, spellings_told
from .key_doctor import in_runs
from .key_names import LONGEST, grouped, size_of
from .message_words import counted, some
from .metadata import title, trigger

_STRONGEST = 5
_UNKNOWN = "not said"


def inspect(adapter: Mapping[str, torch.Tensor]) -> list[LayerFacts]:
    """`analysis.analyse` of a LORA_MODEL. Raises TriLoRAError where it holds no tensors."""
    layers = analyse(adapter)
    if not layers:
        raise TriLoRAError("adapter: holds no tensors; connect the output of Load Adapter or Train Adapter")
    return layers


def describe_adapter(layers: Sequence[LayerFacts], metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor],
                     places: Mapping[str, str] = MappingProxyType({})) -> str:
    """The report: facts from metadata, from the tensors, from the names, the layers of most energy.

    tensors: the adapter's by key; places: `Diagnosis.report`, where there is a model.
    """
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
    facts |= _told(tensors, metadata)
    facts |= {f"in the model, {subject}": text for subject, text in places.items()}
    strongest = sorted(spectra, key=lambda layer: -layer.energy)[:_STRONGEST]
    lines = [f"  {layer.energy / (whole or 1):6.1%}  {layer.short_name}" for layer in strongest]
    return "\n".join([aligned(facts), *(["most energy", *lines] if lines else [])])


def _told(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """What names and sizes tell without a model: the family, whose names they are, the layers of each block."""
    layers, extra = grouped(tensors)
    told = family_told({layer: size_of(layer, found) for layer, found in layers.items()})
    counts = Counter(place.block for place in blocks_in_file(layer[:LONGEST] for layer in layers).values())
    facts = {
        "model family": f"{told}, by its names" if told else "not told by its names",
        "names": spellings_told(layers, metadata),
        "blocks": in_runs({block: (count,) for block, count in counts.items()}) or "none",
    }
    return facts | ({"extra": f"{counted(len(extra), 'tensor')} of no layer: {some(extra)}"} if extra else {})


def aligned(facts: Mapping[str, object]) -> str:
    """One line a fact, names aligned."""
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


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
