"""A run's samples, and what must hold of them and of the model before the first step."""

from __future__ import annotations

import math

import torch

from ..training.config import TrainingConfig
from ..training.host import Sample
from ..trilora_ops.errors import TriLoRAError
from .comfy_host import ComfyHost
from .types import EncodedDataset


def samples_of(host: ComfyHost, dataset: EncodedDataset | None, settings: TrainingConfig) -> tuple[list[Sample], list[Sample]]:
    """The images for the loop, with their captions and with the empty prompt; no images where there is no dataset.

    Raises TriLoRAError naming the image whose latent or caption holds NaN or infinite values.
    """
    if dataset is None:
        return [], []
    samples = [host.prepare(image, image.conditioning) for image in dataset.images]
    empty = samples
    if settings.caption_dropout:
        empty = [host.prepare(image, dataset.empty) for image in dataset.images]
    for sample in [*samples, *empty]:
        _check_finite(sample)
    return samples, empty


def check_first_losses(losses: list[list[float]], host: ComfyHost) -> None:
    """Raise TriLoRAError where a loss before the first step is not finite: no step could change that."""
    if not all(math.isfinite(loss) for each in losses for loss in each):
        computed = str(host.compute_dtype).removeprefix("torch.")
        raise TriLoRAError(f"model: its loss is not finite before the first step, on images and captions that are; it computes in {computed}. "
                           "Set precision to bf16 in Training Settings, or look whether the model draws a picture at all")


def _check_finite(sample: Sample) -> None:
    if not torch.isfinite(sample.x0).all():
        raise TriLoRAError(f"dataset: the latent of {sample.name[:200]} holds NaN or infinite values; encode it again with the VAE in fp32 "
                           "(start ComfyUI with --fp32-vae)")
    # a mask may say minus infinity
    values = [cond.cond for name, cond in sample.conditions.items() if "mask" not in name]
    if not all(torch.isfinite(tensor).all() for tensor in _tensors(values)):
        raise TriLoRAError(f"dataset: what the text encoder made of the caption of {sample.name[:200]} holds NaN or infinite values; encode it "
                           "again with the text encoder in fp32 (start ComfyUI with --fp32-text-enc)")


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors(each)]
    return []
