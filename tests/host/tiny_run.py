"""A whole training run in miniature: photographs with captions, the stock checkpoint, and nodes run as the executor does.

Knows nothing of pytest. Import it only where the host is already imported.
"""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import comfy.model_management
import comfy.sample
import folder_paths
import torch
from comfy_api.internal import make_locked_method_func
from PIL import Image

# File of scikit-image -> what is to be seen in it. One is square and two are wider than high.
PHOTOGRAPHS = {
    "astronaut.png": "photograph, a smiling astronaut in an orange suit",
    "chelsea.png": "photograph, a tabby cat looking up",
    "coffee.png": "photograph, a cup of coffee on a wooden table",
}
CHECKPOINT = "tiny_sd15.safetensors"


def write_photographs(folder: Path, side: int = 192, captions: bool = True) -> Path:
    """Fills ``folder`` with photographs of at most ``side`` pixels, each with a caption file beside it."""
    import skimage

    folder.mkdir(parents=True, exist_ok=True)
    for name, caption in PHOTOGRAPHS.items():
        with Image.open(os.path.join(skimage.data_dir, name)) as photograph:
            small = photograph.convert("RGB")
            small.thumbnail((side, side))
            small.save(folder / name)
        if captions:
            (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder


def run_node(nodes, class_name: str, **inputs) -> tuple:
    """Outputs of one node, run as the host's executor runs it; inputs left out take their defaults."""
    node_class = nodes.NODE_CLASS_MAPPINGS[class_name]
    with torch.inference_mode():
        if not hasattr(node_class, "GET_SCHEMA"):
            return getattr(node_class(), node_class.FUNCTION)(**inputs)
        clone = node_class.PREPARE_CLASS_CLONE(None)
        given = {i.id: i.default for i in node_class.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
        return make_locked_method_func(node_class, node_class.FUNCTION, clone)(**{**given, **inputs}).result


@functools.cache
def load_checkpoint(nodes):
    """(MODEL, CLIP, VAE) of the tiny SD1.5 from the stock loader, read once for all tests."""
    return run_node(nodes, "CheckpointLoaderSimple", ckpt_name=CHECKPOINT)


@functools.cache
def list_saved_adapters() -> Path:
    """Makes the host list output/loras among its LoRA folders, as its main.py does; returns that folder."""
    folder = Path(folder_paths.get_output_directory()) / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path("loras", str(folder))
    return folder


@functools.cache
def encode_photographs(nodes):
    """TRILORA_DATASET of the photographs at resolution 128, from the pack's own node."""
    folder = Path(folder_paths.get_input_directory()) / "photographs"
    if not folder.is_dir():
        write_photographs(folder)
    _, clip, vae = load_checkpoint(nodes)
    return run_node(nodes, "TriLoRATrainingDataset", folder=folder.name, vae=vae, clip=clip, resolution=128)[0]


@functools.cache
def tiny_dataset(nodes):
    """The encoded photographs, cut down to latents of 8 x 8: a training step on them takes a fraction of a second."""
    dataset = encode_photographs(nodes)
    images = tuple(dataclasses.replace(image, latent=image.latent[..., :8, :8].clone()) for image in dataset.images)
    return dataclasses.replace(dataset, images=images)


def weights_hash(patcher) -> str:
    """SHA-256 over names, dtypes and bytes of everything in the model's state dict, with this patcher's patches alone."""
    comfy.model_management.load_models_gpu([patcher])  # copies of one patcher share the model; another's patches may be in it
    digest = hashlib.sha256()
    for key, tensor in patcher.model.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def traces(patcher) -> list[str]:
    """What a training run may have left on a model's modules: own forwards, hooks, and tensors that ask for gradients."""
    found = []
    for name, module in patcher.model.named_modules():
        if "forward" in module.__dict__:
            found.append(f"{name}.forward")
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            found.append(f"{name} hooks")
        found += [f"{name}.{key}" for key, p in module._parameters.items() if p is not None and p.grad is not None]
    return found


def sample_latents(patcher, positive, negative, shape: tuple[int, ...], steps: int = 2, cfg: float = 1.0) -> torch.Tensor:
    """Latents of the host's own sampler from fixed noise."""
    with torch.inference_mode():
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(11))
        return comfy.sample.sample(
            patcher, noise, steps, cfg, "euler", "normal", positive, negative, torch.zeros(shape), disable_pbar=True, seed=11
        )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance of two tensors, ‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def random_dataset(types, tiny, count: int = 3, sizes: tuple[tuple[int, int], ...] = (), tokens: tuple[int, ...] = ()):
    """TRILORA_DATASET of random latents and captions for a TinyModel; ``types`` is the pack's own nodes.types.

    sizes: (H, W) of the latents in turn, default the model's own; tokens: lengths of the captions in turn, likewise.
    """
    _, channels, *space = tiny.latent_shape
    (text, options), generator = tiny.conditioning[0], torch.Generator().manual_seed(5)
    with torch.inference_mode():  # what encoders give

        def caption(length: int) -> list:
            return [[torch.randn((1, length, text.shape[2]), generator=generator), dict(options)]]

        images = tuple(
            types.EncodedImage(
                f"{i}.png", f"caption {i}",
                torch.randn((1, channels, *(sizes[i % len(sizes)] if sizes else space)), generator=generator),
                caption(tokens[i % len(tokens)] if tokens else text.shape[1]),
            )
            for i in range(count)
        )  # fmt: skip
        return types.EncodedDataset(images, caption(text.shape[1]), "", {}, f"{count} images")
