"""What an adapter file says about itself: our own keys, kohya's `ss_*` and ModelSpec's, all plain strings.

Metadata describe and never decide: a file applies the same with all of it lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from types import MappingProxyType

from torch import Tensor

from .bounds import read_json
from .checkpoint import FORMAT, VERSION

_ARCHITECTURE = {("sd1", "eps"): "stable-diffusion-v1/lora", ("sd2", "eps"): "stable-diffusion-v2-512/lora",
                 ("sd2", "v"): "stable-diffusion-v2-768-v/lora", ("sdxl", "eps"): "stable-diffusion-xl-v1-base/lora"}
_BASE_VERSION = {("sd1", "eps"): "sd_v1", ("sd2", "eps"): "sd_v2", ("sd2", "v"): "sd_v2_768_v", ("sdxl", "eps"): "sdxl_base_v1-0"}


def describe(*, method: str, form: str, options: Mapping, plan: Mapping[str, int], family: str, prediction: str, base: str,
             training: Mapping, trigger: str, tag_frequency: Mapping[str, int], folders: Mapping[str, Mapping[str, int]],
             steps_done: int, regularisation: Mapping[str, Mapping[str, int]] = MappingProxyType({})) -> dict[str, str]:
    """Metadata of a freshly trained adapter.

    form: "svd" (canonical low-rank layers) or "transform"; options: of the method; plan: layer name -> rank; prediction:
    the base model's, "eps", "v" or "flow"; base: fingerprint of the base model; training: the settings as
    numbers and strings; tag_frequency: tag -> images that have it; folders: folder -> {"n_repeats": times that an epoch
    shows each image, "img_count": images in it}; steps_done: optimizer steps made; regularisation: folders of the
    regularisation set, empty where there was none.
    """
    shown, kept = (sum(f["n_repeats"] * f["img_count"] for f in each.values()) for each in (folders, regularisation))
    return describe_layers(method=method, form=form, options=options, plan=plan, family=family, prediction=prediction, base=base) | {
        "trilora.training": json.dumps(dict(training), sort_keys=True), "trilora.trigger": trigger, "trilora.steps": str(steps_done),
        "trilora.data": json.dumps({"folders": _plain(folders), "regularisation": _plain(regularisation)}, sort_keys=True),
        "ss_learning_rate": str(training.get("learning_rate")), "ss_max_train_steps": str(training.get("steps")),
        "ss_steps": str(steps_done), "ss_batch_size_per_device": str(training.get("batch_size")),
        "ss_gradient_accumulation_steps": str(training.get("accumulation")), "ss_seed": str(training.get("seed")),
        "ss_lr_scheduler": str(training.get("schedule")), "ss_optimizer": "torch.optim.AdamW",
        "ss_num_train_images": str(shown), "ss_dataset_dirs": json.dumps(_plain(folders)),
        "ss_num_reg_images": str(kept), "ss_reg_dataset_dirs": json.dumps(_plain(regularisation)),
        "ss_prior_loss_weight": str(training.get("prior_weight")), "ss_tag_frequency": json.dumps({"train": dict(tag_frequency)}),
        "modelspec.trigger_phrase": trigger,
    }


def describe_layers(*, method: str, form: str, options: Mapping, plan: Mapping[str, int], family: str, prediction: str, base: str) -> dict[str, str]:
    """What metadata say of any adapter of ours, trained or not; arguments as in `describe`."""
    metadata = {
        "trilora.format": FORMAT, "trilora.version": VERSION, "trilora.form": form, "trilora.method": method,
        "trilora.options": json.dumps(dict(options), sort_keys=True), **_ranks(plan),
        "trilora.family": family, "trilora.base_fingerprint": base,
        "ss_training_comment": f"ComfyUI-TriLoRA, {method}",
        "modelspec.sai_model_spec": "1.0.0", "modelspec.implementation": "diffusers",
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if form == "svd":  # what kohya's tools would read; a transform file is not theirs
        metadata["ss_network_module"] = "networks.lora"
    if (family, prediction) in _ARCHITECTURE:
        metadata |= {"modelspec.architecture": _ARCHITECTURE[family, prediction], "ss_base_model_version": _BASE_VERSION[family, prediction]}
    return metadata


def reworked(metadata: Mapping[str, str], ranks: Mapping[str, int], action: Mapping) -> dict[str, str]:
    """Metadata of an adapter that a tool has made from others: the ranks as they are now, and one step more in the provenance.

    ranks: layer name -> rank; action: what was done, JSON-able; `trilora.provenance` is the list of them, oldest first.
    """
    try:
        steps = list(read_json(metadata.get("trilora.provenance", "[]")))
    except (ValueError, TypeError):  # another program's
        steps = []
    return {**metadata, **_ranks(ranks), "trilora.provenance": json.dumps([*steps, dict(action)])}


def common(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all of several adapters say alike, with the trigger words of all."""
    shared = {key: value for key, value in parts[0].items() if all(other.get(key) == value for other in parts[1:])} if parts else {}
    triggers = dict.fromkeys(word for part in parts for word in trigger(part).split(", ") if word)
    return {**shared, "trilora.trigger": ", ".join(triggers), "modelspec.trigger_phrase": ", ".join(triggers)} if triggers else shared


def trigger(metadata: Mapping[str, str]) -> str:
    """The trigger words as they are written, "" where none are."""
    return metadata.get("trilora.trigger") or metadata.get("modelspec.trigger_phrase") or ""


def title(metadata: Mapping[str, str]) -> str:
    """The name the file was saved under, "" where it is not said."""
    return metadata.get("modelspec.title") or metadata.get("ss_output_name") or ""


def summary(metadata: Mapping[str, str]) -> str:
    """Four lines on what a file says about itself: trigger, base, method and rank."""
    base = [metadata.get(key) for key in ("modelspec.architecture", "ss_base_model_version", "trilora.family", "ss_sd_model_name")]
    said = {"trigger": trigger(metadata), "base": ", ".join(dict.fromkeys(filter(None, base))),
            "method": metadata.get("trilora.method") or metadata.get("ss_network_module"), "rank": metadata.get("ss_network_dim")}
    return "\n".join(f"{name}: {value or 'not said'}" for name, value in said.items())


def _plain(folders: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    return {name: dict(entry) for name, entry in folders.items()}


def _ranks(ranks: Mapping[str, int]) -> dict[str, str]:
    # chosen when the file is written, for all of its layers together
    return {"trilora.plan": json.dumps(dict(ranks), sort_keys=True), "ss_network_alpha": "Dynamic",
            "ss_network_dim": str(next(iter(ranks.values()))) if len(set(ranks.values())) == 1 else "Dynamic"}


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A short identity of a base model: SHA-256 over the sorted keys, shapes and first 16 values of every weight.

    Cheap (no pass over the whole model) and the same for the same weights in one dtype; a cast changes it.
    """
    digest = hashlib.sha256()
    for key in sorted(weights):
        tensor = weights[key].detach().flatten()[:16].float().cpu()
        digest.update(f"{key}{tuple(weights[key].shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
