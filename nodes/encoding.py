"""Training images through the host's encoders, and the check that what they give can be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..training.captions import tag_frequency
from ..training.dataset import ImageSet, summary
from ..trilora_ops.errors import TriLoRAError
from . import compat
from .notices import collected, notice
from .prompts import check_embeddings, check_lengths, encode_prompt
from .types import EncodedDataset, EncodedImage


@contextmanager
def fresh_status(node_id: str | None) -> Iterator[None]:
    """Around all that a dataset node does: after an error or a stop it does not show the images of an earlier run."""
    compat.show_text("reading the images", node_id)
    try:
        yield
    except BaseException:  # ComfyUI's interrupt is not an Exception
        compat.show_text("nothing was encoded: this run of the node did not end", node_id)
        raise


def encoded(images: ImageSet, vae, clip, trigger: str, node_id: str | None) -> io.NodeOutput:
    """What a dataset node gives: the images after the host's encoders, and the summary, also shown on the node."""
    for value, name in ((vae, "vae"), (clip, "clip")):
        if value is None:
            raise TriLoRAError(
                f"{name}: is empty; the checkpoint it comes from has none, so load one from another file"
            )
    with collected() as said:
        for remark in images.remarks:
            notice(remark)
        prompts = [(image.name, image.prompt) for image in images]
        check_embeddings(clip, prompts)
        check_lengths(clip, prompts)
    text = "\n".join([summary(images), *said])
    compat.show_text(text.replace("\n", ";\n"), node_id)  # 1.49's nodes 2.0 show no line breaks
    frequency = tag_frequency(image.prompt for image in images)
    done, empty = _encode(images, vae, clip), encode_prompt(clip, "")
    check_finite("the empty prompt", done[0].latent, empty)
    dataset = EncodedDataset(done, empty, trigger.strip(), frequency, text)
    return io.NodeOutput(dataset, text, ui=ui.PreviewText(text))


def _encode(images: ImageSet, vae, clip) -> tuple[EncodedImage, ...]:
    bar = comfy.utils.ProgressBar(len(images))
    prompts: dict[str, list] = {}
    done = []
    for image in images:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if image.prompt not in prompts:
            prompts[image.prompt] = encode_prompt(clip, image.prompt)
        latent, conditioning = vae.encode(image.pixels()), prompts[image.prompt]
        check_finite(image.name, latent, conditioning)
        done.append(EncodedImage(image.name, image.prompt, latent, conditioning, image.repeats, image.folder))
        bar.update(1)
    return tuple(done)


def check_finite(name: str, latent: Tensor, conditioning: list) -> None:
    """Raise TriLoRAError for values that are not finite: every step with this image would be lost."""
    for values, what, model, option in (
        (latent, "latent", "VAE", "--fp32-vae"),
        (conditioning, "encoded caption", "text encoder", "--fp32-text-enc"),
    ):
        if not all(torch.isfinite(tensor).all() for tensor in _tensors(values)):
            raise TriLoRAError(
                f"dataset: the {what} of {name} holds values that are not finite, mostly because the {model} computes "
                f"in fp16; start ComfyUI with {option}, or use another {model} file, and encode the dataset again"
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors of fractions anywhere in a CONDITIONING; masks, which may be infinite, are left out."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from _tensors(member)
    elif isinstance(value, dict):
        for key, member in value.items():
            if "mask" not in str(key):
                yield from _tensors(member)
