"""Small models built from the host's own classes, with random weights that behave: finite, not zero, gradients flow.

Each function returns a ``TinyModel`` made under ``torch.inference_mode()``, as the host's loaders run: its parameters
are inference tensors, which is what a training node meets.
"""

import dataclasses
from typing import NamedTuple

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models
import torch


class TinyModel(NamedTuple):
    """A model as the host hands it from node to node, with one input that fits it."""

    patcher: comfy.model_patcher.ModelPatcher
    latent_shape: tuple[int, ...]  # (1, C, H, W)
    conditioning: list  # CONDITIONING with one entry: [[(1, T, D) tensor, options]]


def initialise(module: torch.nn.Module, seed: int, gain: float = 1.0) -> None:
    """Sets every parameter from ``seed`` alone: the host leaves weights as they lie in memory, or at zero.

    Matrices and kernels: N(0, gain²/fan_in), so that activations keep their size. Vectors: norm weights around 1, biases
    around 0. Scalars stay.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 0:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * (gain * fan_in**-0.5))
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.02)
            else:
                parameter.copy_(1 + noise * 0.05)


def as_patcher(model: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """Wraps a model as the host's checkpoint loader does."""
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher_class(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def as_stored(model, dtype: torch.dtype, compute: torch.dtype | None = torch.float32):
    """The model again with its weights in ``dtype``, computing in ``compute``, or in ``dtype`` itself where that is None."""
    with torch.inference_mode():
        model.model_config.set_inference_dtype(dtype, compute)
        again = type(model)(model.model_config, model_type=model.model_type, device=torch.device("cpu"))
        again.diffusion_model.load_state_dict(model.diffusion_model.state_dict())
    return again


def random_conditioning(shape: tuple[int, int, int], seed: int, **options) -> list:
    """CONDITIONING with one entry of shape (1, T, D), unit variance."""
    return [[torch.randn(shape, generator=torch.Generator().manual_seed(seed)), options]]


def unet_model(model_type: comfy.model_base.ModelType, seed: int = 1) -> TinyModel:
    """An SD2-like U-Net of 64 and 128 channels with one transformer per resolution, about 6 million parameters."""
    unet_config = {
        "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True, "legacy": False,
        "in_channels": 4, "out_channels": 4, "model_channels": 64, "channel_mult": [1, 2], "num_res_blocks": [1, 1],
        "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
        "context_dim": 64, "use_linear_in_transformer": True, "adm_in_channels": None, "use_temporal_attention": False,
    }  # fmt: skip
    with torch.inference_mode():
        config = comfy.supported_models.SD20(unet_config)
        config.unet_config["num_head_channels"] = 32
        config.set_inference_dtype(torch.float32, None)
        model = comfy.model_base.BaseModel(config, model_type=model_type, device=torch.device("cpu"))
        initialise(model.diffusion_model, seed)
        return TinyModel(as_patcher(model), (1, 4, 16, 16), random_conditioning((1, 77, 64), seed))


def eps_prediction_model() -> TinyModel:
    """A U-Net that predicts the noise."""
    return unet_model(comfy.model_base.ModelType.EPS)


def v_prediction_model() -> TinyModel:
    """A U-Net that predicts v."""
    return unet_model(comfy.model_base.ModelType.V_PREDICTION)


def sd15_model(seed: int = 4) -> TinyModel:
    """SD1.5's U-Net block by block, 64 channels wide."""
    unet_config = {
        "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4,
        "model_channels": 64, "channel_mult": [1, 1, 1, 1], "num_res_blocks": [2] * 4, "transformer_depth": [1] * 6 + [0] * 2,
        "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "context_dim": 48,
        "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
    }  # fmt: skip
    with torch.inference_mode():
        config = comfy.supported_models.SD15(unet_config)
        config.set_inference_dtype(torch.float32, None)
        model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.EPS, device=torch.device("cpu"))
        initialise(model.diffusion_model, seed)
        return TinyModel(as_patcher(model), (1, 4, 16, 16), random_conditioning((1, 7, 48), seed))


def flow_model(seed: int = 2) -> TinyModel:
    """An SD3 of width 128 with two joint blocks: a rectified-flow model that plain autograd differentiates."""
    unet_config = {
        "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 32,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}},
        "num_patches": 256, "pos_embed_max_size": 16, "pos_embed_scaling_factor": None, "qk_norm": "rms",
    }  # fmt: skip
    with torch.inference_mode():
        config = comfy.supported_models.SD3(unet_config)
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=torch.device("cpu"))
        initialise(model.diffusion_model, seed)
        generator = torch.Generator().manual_seed(seed)
        # A buffer, not a parameter, and just as uninitialised.
        positions = model.diffusion_model.pos_embed
        positions.copy_(torch.randn(positions.shape, generator=generator) * 0.5)
        pooled = torch.randn((1, 32), generator=generator)
        return TinyModel(as_patcher(model), (1, 16, 8, 8), random_conditioning((1, 12, 48), seed, pooled_output=pooled))


def flux_model(seed: int = 3) -> TinyModel:
    """A Flux of width 64 with two double and two single blocks: a flow model with fused q/k/v weights.

    Its blocks add in place to tensors that autograd has saved, so a backward pass needs
    ``torch.autograd.graph.allow_mutation_on_saved_tensors``, and on newer hosts ``model_management.in_training`` too.
    """
    wanted = {
        "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 48, "hidden_size": 64,
        "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12],
        "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [],
    }  # fmt: skip
    # Fields come and go between host versions (0.3.64 knows no txt_ids_dims) and unknown ones are errors.
    known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
    with torch.inference_mode():
        config = comfy.supported_models.FluxSchnell(
            {"image_model": "flux", **{key: value for key, value in wanted.items() if key in known}}
        )
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=torch.device("cpu"))
        initialise(model.diffusion_model, seed)
        pooled = torch.randn((1, 32), generator=torch.Generator().manual_seed(seed))
        return TinyModel(as_patcher(model), (1, 16, 8, 8), random_conditioning((1, 12, 48), seed, pooled_output=pooled))


def predict(tiny: TinyModel, latent: torch.Tensor, sigma: float) -> torch.Tensor:
    """x0 that the model predicts for ``latent`` (B, C, H, W) at noise level ``sigma``, by the host's own path.

    Goes through the patches and the model options, as a sampler does.
    """
    patcher = tiny.patcher
    comfy.model_management.load_models_gpu([patcher])
    conds = {"positive": comfy.sampler_helpers.convert_cond(tiny.conditioning)}
    conds = comfy.samplers.process_conds(patcher.model, latent, conds, latent.device)
    patcher.pre_run()
    try:
        levels = torch.full((latent.shape[0],), float(sigma))
        return comfy.samplers.calc_cond_batch(
            patcher.model, [conds["positive"]], latent, levels, patcher.model_options
        )[0]
    finally:
        patcher.cleanup()
