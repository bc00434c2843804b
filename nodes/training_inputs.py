"""A run's samples, and what must hold of them and of the model before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import torch

from ..training.config import TrainingConfig
from ..training.host import Sample
from ..trilora_ops.errors import TriLoRAError
from .comfy_host import ComfyHost
from .notices import notice
from .types import EncodedDataset

_PASSED_ON = (
    TriLoRAError,
    MemoryError,
    torch.cuda.OutOfMemoryError,
    comfy.model_management.InterruptProcessingException,
)


def samples_of(
    host: ComfyHost, dataset: EncodedDataset | None, settings: TrainingConfig, field: str
) -> tuple[list[Sample], list[Sample]]:
    """The images for the loop, with their captions and with the empty prompt; no images where there is no dataset.

    field: the input that the dataset came by. Raises TriLoRAError for a dataset without images, naming the image whose latent or
    caption holds NaN or infinite values, and for images and captions that are not this model's.
    """
    if dataset is None:
        return [], []
    if not dataset.images:
        raise TriLoRAError(f"{field}: it holds no images; look at what is connected to it")
    _say_what_is_not_followed(dataset, field)
    with fitting(field, "its images and captions"):
        samples = [host.prepare(image, image.conditioning) for image in dataset.images]
        empty = samples
        if settings.caption_dropout:
            empty = [host.prepare(image, dataset.empty) for image in dataset.images]
    for sample in [*samples, *empty]:
        _check_finite(sample)
    return samples, empty


@contextmanager
def fitting(field: str, what: str) -> Iterator[None]:
    """What a model raises when it is given images or captions that were encoded for another one, as a sentence."""
    try:
        yield
    except _PASSED_ON:
        raise
    except Exception as error:  # every model stumbles in its own way
        said = (str(error).splitlines() or [""])[0][:200]
        raise TriLoRAError(
            f"{field}: this model cannot compute with {what} ({type(error).__name__}: {said}); encode them with this model's own "
            "VAE and text encoder, and take off the model what nodes have changed in how it computes"
        ) from error


def _say_what_is_not_followed(dataset: EncodedDataset, field: str) -> None:
    entries = [image.conditioning for image in dataset.images]
    if any("hooks" in options for entry in entries for _, options in entry):
        notice(
            f"{field}: its captions carry hooks, which act in sampling alone; what they load is not part of the model that is trained. Load "
            "it with a loader in front of Train Adapter where it shall be"
        )
    if any(len(entry) > 1 for entry in entries):
        notice(
            f"{field}: captions with several entries, such as a text encoder's schedule makes; the first of each is trained"
        )


def check_first_losses(losses: list[list[float]], host: ComfyHost) -> None:
    """Raise TriLoRAError where a loss before the first step is not finite: no step could change that."""
    if not all(math.isfinite(loss) for each in losses for loss in each):
        computed = str(host.compute_dtype).removeprefix("torch.")
        raise TriLoRAError(
            f"model: its loss is not finite before the first step, on images and captions that are; it computes in {computed}. "
            "Set precision to bf16 in Training Settings, or look whether the model draws a picture at all"
        )


def _check_finite(sample: Sample) -> None:
    if not torch.isfinite(sample.x0).all():
        raise TriLoRAError(
            f"dataset: the latent of {sample.name[:200]} holds NaN or infinite values; encode it again with the VAE in fp32 "
            "(start ComfyUI with --fp32-vae)"
        )
    # a mask may say minus infinity
    values = [cond.cond for name, cond in sample.conditions.items() if "mask" not in name]
    if not all(torch.isfinite(tensor).all() for tensor in _tensors(values)):
        raise TriLoRAError(
            f"dataset: what the text encoder made of the caption of {sample.name[:200]} holds NaN or infinite values; encode it "
            "again with the text encoder in fp32 (start ComfyUI with --fp32-text-enc)"
        )


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors(each)]
    return []
