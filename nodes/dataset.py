"""Training Dataset: a folder of captioned images, encoded once."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..training.folder import IMAGE_TYPES, MAX_REPEATS, belongs_to_system, numbered, shown, stamps
from ..trilora_ops.errors import TriLoRAError
from . import compat
from .shown_text import without_markup
from .types import Dataset

log = logging.getLogger("trilora")
_DEPTH = 4  # levels of folders that are listed
_NONE = "(put a folder of images into ComfyUI/input)"


class TrainingDatasetNode(io.ComfyNode):
    """Images and captions of an input subfolder as latents and conditioning."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRATrainingDataset",
            display_name="Training Dataset",
            category="TriLoRA/train",
            description="A subfolder of ComfyUI/input with images and, beside each, a .txt file of the same name with its caption.",
            search_aliases=["lora dataset", "training images"],
            inputs=[
                io.Combo.Input("folder", options=image_folders() or [_NONE], tooltip="A subfolder of ComfyUI/input that holds images."),
                io.Vae.Input("vae", tooltip="The VAE of the model that will be trained."),
                io.Clip.Input("clip", tooltip="The text encoder of the model that will be trained; it is not trained itself."),
                io.String.Input("trigger", default="", tooltip="A rare word that will call up what is learned, put in front of every caption "
                                                               "that lacks it. Images without a caption are trained with it alone."),
                resolution_input(),
                repeats_input(),
            ],
            outputs=[
                Dataset.Output(display_name="dataset", tooltip="Encoded images and captions, for Train Adapter."),
                io.String.Output(display_name="summary", tooltip="Images, captions and training sizes as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, folder):
        """The folder list was made when the page was loaded: check the folder itself, with our own words."""
        try:
            if folder is not None:  # a linked folder is known when the node runs
                folder_path(folder)
        except TriLoRAError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder, **others):
        """Run again when a file of the folder has changed."""
        if folder is None:  # linked: what it will hold is not known yet
            return float("nan")
        try:
            return stamps(folder_path(folder))
        except TriLoRAError:  # the node itself says why the folder cannot be read
            return float("nan")

    @classmethod
    def execute(cls, folder, vae, clip, trigger, resolution, repeats) -> io.NodeOutput:
        from ..training.dataset import read_folder, summary
        from .encoding import encoded, fresh_status

        with fresh_status(cls.hidden.unique_id):
            images = read_folder(folder_path(folder), trigger, resolution, repeats)
            log.info("dataset %s: %s", folder, summary(images).replace("\n", "; "))
            return encoded(images, vae, clip, trigger, cls.hidden.unique_id)


def resolution_input() -> io.Input:
    """The widget `resolution` of the dataset nodes."""
    return io.Int.Input("resolution", default=512, min=64, max=2048, step=64,
                        tooltip="Training area: resolution x resolution pixels. Each image keeps its aspect ratio. 512 for SD1.5, 1024 for SDXL and newer.")


def repeats_input() -> io.Input:
    """The widget `repeats` of the dataset nodes."""
    return compat.advanced(io.Int.Input("repeats", default=1, min=1, max=MAX_REPEATS,
                                        tooltip="How many times an epoch shows each image. It changes how sets are mixed and counted, not the number of steps."))


def image_folders() -> list[str]:
    """Subfolders of the input folder that hold images, or folders named "25_name" with images; relative, with forward slashes."""
    root = os.path.abspath(folder_paths.get_input_directory())
    found = set()
    for directory, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [d for d in sorted(subfolders) if not belongs_to_system(d) and not _leads_back(root, directory, d)]
        if directory.count(os.sep) - root.count(os.sep) >= _DEPTH:
            subfolders[:] = []
        if directory != root and any(f.lower().endswith(IMAGE_TYPES) and not belongs_to_system(f) for f in files):
            parent, name = os.path.split(directory)
            holders = [directory, parent] if numbered(name) and parent != root else [directory]
            found.update(os.path.relpath(holder, root).replace(os.sep, "/") for holder in holders)
    return without_markup(sorted(found))


def _leads_back(root: str, directory: str, name: str) -> bool:
    """Whether a subfolder is a link to a folder on the way to it: it would be listed again and again."""
    path = os.path.join(directory, name)
    if not os.path.islink(path):
        return False
    target, own = os.path.realpath(path), os.path.realpath(directory)
    return target == os.path.realpath(root) or own == target or own.startswith(target + os.sep)


def folder_path(folder: str) -> Path:
    """The folder inside the input folder. Raises TriLoRAError for a name that leads outside or to nothing."""
    if not isinstance(folder, str):
        raise TriLoRAError(f"folder: must be a name, not of type {type(folder).__name__}; choose one from the list")
    root = os.path.abspath(folder_paths.get_input_directory())
    path, folder = os.path.abspath(os.path.join(root, folder)), shown(folder)
    if not path.startswith(root + os.sep):
        raise TriLoRAError(f"folder={folder!r}: must be a subfolder of ComfyUI's input folder; choose one from the list")
    if not os.path.isdir(path):
        raise TriLoRAError(f"folder={folder!r}: there is no such folder in ComfyUI's input folder; create it, put images in, and press R")
    return Path(path)
