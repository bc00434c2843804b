"""Sampling with hooks by the host's own nodes, and the same from separate runs joined. Knows nothing of pytest."""

import torch
from comfyui_trilora.tests.host.tiny_models import TinyModel
from comfyui_trilora.tests.host.tiny_run import run_node

CFG = 2.0


def layers_of(patcher, words: tuple[str, ...] = ()) -> dict[str, torch.Size]:
    """The denoiser's matrices and kernels by name, or those with one of the words in it."""
    shapes = {key: p.shape for key, p in patcher.model.named_parameters() if key.startswith("diffusion_model.") and p.ndim > 1}
    return {key.removesuffix(".weight"): s for key, s in shapes.items() if key.endswith(".weight") and (not words or any(w in key for w in words))}


def low_rank_file(layers: dict[str, torch.Size], seed: int = 0, rank: int = 2, size: float = 0.6) -> dict[str, torch.Tensor]:
    """A LoRA or LoCon for all of the layers, big enough to be seen."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, (out, inp, *kernel) in layers.items():
        up, down = torch.randn(out, rank, *(1 for _ in kernel), generator=generator), torch.randn(rank, inp, *kernel, generator=generator)
        tensors[f"{name}.lora_up.weight"] = up * size * out**-0.5
        tensors[f"{name}.lora_down.weight"] = down * size * down[0].numel() ** -0.5
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    return tensors


def other_prompt(tiny: TinyModel, seed: int = 9) -> list:
    """A second conditioning of the same shape."""
    (text, options), = tiny.conditioning
    noise = torch.randn(text.shape, generator=torch.Generator().manual_seed(seed))
    return [[noise, {key: value.flip(-1) if isinstance(value, torch.Tensor) else value for key, value in options.items()}]]


def with_hooks(nodes, cond: list, hooks, mask: torch.Tensor | None = None, prev: list | None = None) -> list:
    """Core's Cond Set Props (Combine)."""
    if prev is None:
        return run_node(nodes, "ConditioningSetProperties", cond_NEW=cond, strength=1.0, set_cond_area="default", mask=mask, hooks=hooks)[0]
    return run_node(nodes, "ConditioningSetPropertiesAndCombine", cond=prev, cond_NEW=cond, strength=1.0, set_cond_area="default", mask=mask, hooks=hooks)[0]


def with_keyframes(nodes, hooks, *keyframes: tuple[float, float]):
    """Core's Set Hook Keyframes with (start, strength) ..."""
    group = None
    for start, strength in keyframes:
        group = run_node(nodes, "CreateHookKeyframe", strength_mult=strength, start_percent=start, prev_hook_kf=group)[0]
    return run_node(nodes, "SetHookKeyframes", hooks=hooks, hook_kf=group)[0]


def sample(nodes, tiny: TinyModel, positive: list, negative: list, steps: int = 6, model=None, scheduler: str = "simple", denoise: float = 1.0) -> torch.Tensor:
    """Latents of core's KSampler."""
    latent = {"samples": torch.zeros(tiny.latent_shape)}
    return run_node(nodes, "KSampler", model=model or tiny.patcher, seed=3, steps=steps, cfg=CFG, sampler_name="euler", scheduler=scheduler,
                    positive=positive, negative=negative, latent_image=latent, denoise=denoise)[0]["samples"]


def joined(nodes, tiny: TinyModel, parts: list, positive: list, negative: list, scheduler: str = "simple") -> torch.Tensor:
    """Latents of separate runs of core's KSampler (Advanced), one after the other. parts: a model for each step."""
    latent = {"samples": torch.zeros(tiny.latent_shape)}
    for step, model in enumerate(parts):
        latent = run_node(nodes, "KSamplerAdvanced", model=model, add_noise="disable" if step else "enable", noise_seed=3, steps=len(parts), cfg=CFG,
                          sampler_name="euler", scheduler=scheduler, positive=positive, negative=negative, latent_image=latent, start_at_step=step,
                          end_at_step=step + 1, return_with_leftover_noise="enable" if step + 1 < len(parts) else "disable")[0]
    return latent["samples"]


class PatchCounter:
    """Counts how often the host patches a weight for hooks, within a `with` block."""

    def __init__(self, patcher):
        self.owner, self.count = type(patcher), 0

    def __enter__(self):
        self.original, counter = self.owner.patch_hook_weight_to_device, self

        def counted(patcher, *args, **kwargs):
            counter.count += 1
            return counter.original(patcher, *args, **kwargs)

        self.owner.patch_hook_weight_to_device = counted
        return self

    def __exit__(self, *_):
        self.owner.patch_hook_weight_to_device = self.original
