"""One file with block weights through each of our loaders, and what it did to every weight. Knows nothing of pytest."""

import torch
from comfyui_trilora.tests.host.foreign_writers import deltas
from comfyui_trilora.tests.host.tiny_run import run_node

LOADERS = ("TriLoRALoader", "TriLoRAApplyStack")


def load(nodes, loader: str, model, name: str, clip=None, strength: float = 1.0, strength_clip: float = 1.0, **inputs):
    """(MODEL, CLIP) from the Loader or from a Stack of one file."""
    more = {} if clip is None else {"clip": clip}
    given = {"lora_name": name, "strength_model": strength, "strength_clip": strength_clip, **inputs}
    if loader == "TriLoRALoader":
        return run_node(nodes, loader, model=model, **more, **given)
    (stack,) = run_node(nodes, "TriLoRAAdapterStack", **given)
    return run_node(nodes, loader, model=model, stack=stack, **more)


def whole(nodes, model, name: str) -> dict[str, torch.Tensor]:
    """Weight key -> W_1 - W by the host's own loader."""
    return deltas(run_node(nodes, "LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)[0], model)


def strengths(nodes, loader: str, model, name: str, text: str) -> dict[str, float]:
    """Weight key -> ratio, W' being W + ratio * (W_1 - W), for each weight that the file changes whole."""
    once = whole(nodes, model, name)
    found, ratios = deltas(load(nodes, loader, model, name, block_weights=text)[0], model), {}
    for key, delta in once.items():
        change = found.pop(key, torch.zeros_like(delta))
        ratios[key] = float((change.double() * delta.double()).sum() / delta.double().square().sum())
        assert float((change - ratios[key] * delta).norm()) <= 1e-5 * float(delta.norm()), key
    assert not found
    return {key: round(ratio, 4) for key, ratio in ratios.items()}


def parts(model) -> int:
    """How many layers of files are in a MODEL's patches."""
    return sum(len(patch[1].weights) for found in model.patches.values() for patch in found)
