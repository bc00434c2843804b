"""Models of the host's own classes with all of their blocks and hardly any width, and language models that are not there at all.

Knows nothing of pytest. Import it only where the host is already imported.
"""

import dataclasses
import inspect

import comfy.ldm.flux.model
import comfy.ldm.lumina.model
import comfy.lora
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from comfyui_trilora.tests.host.adapter_files import low_rank
from comfyui_trilora.tests.host.tiny_models import as_patcher, initialise

_UNET = {
    "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 2], "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 48, "use_linear_in_transformer": True,
    "num_head_channels": 32, "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
_SD15 = {
    "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 2, 2], "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1, "context_dim": 48, "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
}  # fmt: skip
_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 24, "context_in_dim": 48, "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2,
    "depth": 19, "depth_single_blocks": 38, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
_SD3 = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "input_size": None, "adm_in_channels": 32, "num_patches": 64, "pos_embed_max_size": 8,
    "pos_embed_scaling_factor": None, "qk_norm": "rms",
}  # fmt: skip
_LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 48, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2, "multiple_of": 16,
    "ffn_dim_multiplier": 2.0, "qk_norm": True, "cap_feat_dim": 40, "axes_dims": [8, 8, 8], "axes_lens": [8, 8, 8], "z_image_modulation": True,
}  # fmt: skip
_AURA = {"in_channels": 4, "out_channels": 4, "patch_size": 2, "dim": 32, "n_layers": 36, "n_double_layers": 4, "n_heads": 2, "global_conddim": 24,
         "cond_seq_dim": 40, "max_seq": 16}  # fmt: skip
_WAN = {"image_model": "wan2.1", "model_type": "t2v", "dim": 32, "ffn_dim": 48, "freq_dim": 16, "text_dim": 40, "num_heads": 2, "num_layers": 30,
        "in_dim": 16, "out_dim": 16}  # fmt: skip


def sd15():
    """IN00-IN11, MID0-MID2, OUT00-OUT11."""
    return _built(comfy.supported_models.SD15, _SD15)


def sdxl():
    """IN00-IN08, MID0-MID2, OUT00-OUT08."""
    return _built(comfy.supported_models.SDXL, _UNET)


def flux():
    """D00-D18, S00-S37."""
    # fields come and go between host versions
    known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)} | {"image_model"}
    return _built(comfy.supported_models.Flux, {name: value for name, value in _FLUX.items() if name in known})


def sd3(depth: int = 3):
    """J00 and on. A block more makes the model wider by 64."""
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 64 * depth}}
    return _built(comfy.supported_models.SD3, {**_SD3, "depth": depth, "context_embedder_config": embedder})


def z_image():
    """NR0, NR1, CR0, CR1, L00-L29: Z-Image, and a Lumina 2 of its size on hosts that know no Z-Image."""
    known = inspect.signature(comfy.ldm.lumina.model.NextDiT).parameters
    return _built(comfy.supported_models.Lumina2, {name: value for name, value in _LUMINA.items() if name in known})


def auraflow():
    """D00-D03, S00-S31."""
    return _built(comfy.supported_models.AuraFlow, _AURA)


def wan():
    """B00-B29."""
    return _built(comfy.supported_models.WAN21_T2V, _WAN)


def language_model():
    """(CLIP, its name for the encoder) with the 36 layers of Z-Image's Qwen3, or the 26 of Lumina's Gemma 2; on `meta`, not to be run."""
    try:
        from comfy.text_encoders.z_image import te

        name = "qwen3_4b"
    except ImportError:
        from comfy.text_encoders.lumina2 import te

        name = "gemma2_2b"
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = te()(device="meta", dtype=torch.float32)
    clip.patcher = comfy.model_patcher.ModelPatcher(clip.cond_stage_model, torch.device("cpu"), torch.device("cpu"))
    clip.tokenizer, clip.layer_idx, clip.tokenizer_options = None, None, {}
    clip.use_clip_schedule, clip.apply_hooks_to_conds = False, None
    return clip, name


def layers_by_name(patcher, wanted, rank: int = 2) -> dict[str, torch.Tensor]:
    """A low-rank file with a layer for every linear weight, or slice of one, that has a name of which `wanted(name, target)` is true.

    names and targets: of the host's own map. Where a target has several such names, the first.
    """
    shapes, found, tensors = {key: tuple(tensor.shape) for key, tensor in patcher.model.state_dict().items()}, {}, {}
    for name, target in comfy.lora.model_lora_keys_unet(patcher.model, {}).items():
        if wanted(name, target):
            found.setdefault(target, name)
    for seed, (target, name) in enumerate(found.items()):
        key, offset = (target, None) if isinstance(target, str) else target[:2]
        if len(shapes.get(key, ())) == 2:
            shape = list(shapes[key])
            if offset:
                shape[offset[0]] = offset[2]
            tensors |= low_rank(name, *shape, rank=rank, seed=seed)
    return tensors


def own_name(name: str, target) -> bool:
    """Whether a name is the host's own of a whole weight, without the ending."""
    return name == str(target).removesuffix(".weight")


def _built(kind, unet_config: dict):
    """The MODEL of a configuration class, fp32, with random weights that behave."""
    with torch.inference_mode():
        config = kind(dict(unet_config))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=torch.device("cpu"))
        initialise(model.diffusion_model, 1)
        return as_patcher(model)
