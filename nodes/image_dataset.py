"""Training Dataset (images): pictures of the same graph as a dataset, such as those that the base model has just drawn."""

from __future__ import annotations

import re

from comfy_api.latest import io
from torch import Tensor

from ..trilora_ops.errors import TriLoRAError
from . import compat
from .dataset import repeats_input, resolution_input
from .types import Dataset


class ImageDatasetNode(io.ComfyNode):
    """An IMAGE batch, or a list of them in several sizes, with captions, as latents and conditioning."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRAImageDataset",
            display_name="Training Dataset (images)",
            category="TriLoRA/train",
            description="Images of the same graph as a dataset: for example a regularisation set that the base model draws itself.",
            search_aliases=["regularisation images", "regularization images", "prior preservation", "class images"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="One batch, or a list of images of several sizes."),
                io.Vae.Input("vae", tooltip="The VAE of the model that will be trained."),
                io.Clip.Input("clip", tooltip="The text encoder of the model that will be trained; it is not trained itself."),
                io.String.Input("captions", default="", multiline=True,
                                tooltip="One line for all images, or one line for each. For a regularisation set: the prompts that the images were made with."),
                io.String.Input("trigger", default="", tooltip="A rare word put in front of every caption that lacks it. Empty for a regularisation set."),
                resolution_input(),
                repeats_input(),
            ],
            outputs=[
                Dataset.Output(display_name="dataset", tooltip="Encoded images and captions, for dataset or regularisation of Train Adapter."),
                io.String.Output(display_name="summary", tooltip="Images, captions and training sizes as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, vae, clip, captions, trigger, resolution, repeats) -> io.NodeOutput:
        from ..training.dataset import from_pictures
        from .encoding import encoded, fresh_status

        # every input is a list: of one for a widget or a plain link, of more where a list is linked
        pictures = []
        for batch in images:
            pictures += batch if isinstance(batch, Tensor) and batch.ndim else [batch]
        with fresh_status(cls.hidden.unique_id):
            chosen = from_pictures(pictures, caption_lines(captions), trigger[0], resolution[0], repeats[0])
            return encoded(chosen, vae[0], clip[0], trigger[0], cls.hidden.unique_id)


def caption_lines(texts: list[str]) -> list[str]:
    """One text: its lines that are not empty. Several (a linked list): each is one caption, "" too, its line breaks become spaces."""
    if not all(isinstance(text, str) for text in texts):
        raise TriLoRAError("captions: must be text; look at what is connected to it")
    if len(texts) > 1:
        return [" ".join(text.split()) for text in texts]
    lines = [" ".join(line.split()) for line in re.split(r"[\r\n]", texts[0])]
    return [line for line in lines if line]
