"""Model and adapter files of SD1.5's shape with random weights, built from the host's own classes."""

from pathlib import Path

import torch
from measure import PACKAGE, module
from safetensors.torch import save_file

_COMMON = {
    "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True, "legacy": False, "in_channels": 4,
    "out_channels": 4, "model_channels": 320, "transformer_depth_middle": 1, "context_dim": 768,
    "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
}  # fmt: skip
FULL = {**_COMMON, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2] * 4, "transformer_depth": [1] * 6 + [0] * 2,
        "transformer_depth_output": [1] * 9 + [0] * 3}  # fmt: skip
#: One residual block a level and no widening: 74 million parameters instead of 860.
SMALL = {**_COMMON, "channel_mult": [1, 1, 1, 1], "num_res_blocks": [1] * 4, "transformer_depth": [1, 1, 1, 0],
         "transformer_depth_output": [1] * 6 + [0] * 2}  # fmt: skip
CONTEXT = (77, 768)  # tokens and width of the text encoder's output


def write_unet(path: Path, small: bool = False, seed: int = 0) -> int:
    """Write a U-Net of SD1.5's shape in fp32 (3.4 GB; `small`: 0.3 GB); returns its parameters.

    Matrices and kernels are N(0, 1/fan_in), norm weights 1, biases 0: activations keep their size.
    """
    config = module("comfy.supported_models").SD15(SMALL if small else FULL)
    classes = module("comfy.ldm.modules.diffusionmodules.openaimodel")
    unet = classes.UNetModel(**config.unet_config, dtype=torch.float32, device="cpu",
                             operations=module("comfy.ops").disable_weight_init)  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    state = {key: value.contiguous() for key, value in unet.state_dict().items()}
    save_file(state, path)
    return sum(p.numel() for p in unet.parameters())


def load_unet(path: Path, dtype: torch.dtype | None = None):
    """The file as a MODEL, through the host's own loader; dtype: of the weights, None = as the host chooses."""
    with torch.inference_mode():
        return module("comfy.sd").load_diffusion_model(str(path), model_options={} if dtype is None else {"dtype": dtype})


def conditioning(count: int, seed: int = 1) -> list[list]:
    """CONDITIONING of `count` captions, one list with one entry each."""
    generator = torch.Generator().manual_seed(seed)
    return [[[torch.randn((1, *CONTEXT), generator=generator), {}]] for _ in range(count)]


def latents(count: int, side: int, seed: int = 2) -> torch.Tensor:
    """(count, 4, side, side) latents as SD1.5's VAE gives them: raw scale, standard deviation 1 / 0.18215."""
    return torch.randn((count, 4, side, side), generator=torch.Generator().manual_seed(seed)) / 0.18215


def write_lora(path: Path, patcher, rank: int, seed: int) -> int:
    """Write an fp16 LoRA with kohya's names for attention layers and convolutions of a U-Net; returns its layers.

    down ~ N(0, 1/columns), up ~ N(0, 1e-4), alpha = rank / 2.
    """
    naming, targets = module(f"{PACKAGE}.trilora_ops.naming"), module(f"{PACKAGE}.trilora_ops.targets")
    weights = {f"diffusion_model.{name}.weight": layer.weight
               for name, layer in patcher.model.diffusion_model.named_modules() if getattr(layer, "weight", None) is not None}
    weights = {key: weight for key, weight in weights.items() if weight.ndim > 1}
    axes = {key: weight.ndim - 2 for key, weight in weights.items()}
    layout = naming.UNetLayout.of(weights)
    keys = [key for key in axes if axes[key]] + targets.select(axes, "attention")
    generator, state = torch.Generator().manual_seed(seed), {}
    for key in dict.fromkeys(keys):
        out, inp, *kernel = weights[key].shape
        down = torch.randn((rank, inp, *kernel), generator=generator) * weights[key][0].numel() ** -0.5
        up = torch.randn((out, rank, *[1] * len(kernel)), generator=generator) * 0.01
        name = naming.public_name(key, "sd1", layout)
        state |= {f"{name}.lora_up.weight": up.half(), f"{name}.lora_down.weight": down.half(),
                  f"{name}.alpha": torch.tensor(rank / 2)}
    save_file(state, path)
    return len(state) // 3
