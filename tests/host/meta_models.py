"""Every network that a host knows, built on the `meta` device from the configuration of published weights: no memory, no weights."""

import re
from typing import NamedTuple

import comfy.model_detection
import comfy.supported_models
import torch

META = torch.device("meta")
# options that the older host's classes do not know: it builds the same network without them, or without a part outside its blocks
LATER = {"txt_ids_dims", "use_cond_type_embedding", "vision_in_dim", "meanflow_sum", "rope_theta", "use_additional_t_cond", "default_ref_method",
         "vec_in_dim", "clip_text_dim", "use_x0", "use_sequential_txt_ids"}
# options that are a network of their own: a host that does not know one has not that network
OWN_PARTS = {"siglip_feat_dim"}


class NotInHost(Exception):
    """This host has not the network, or not all of it."""


class Network(NamedTuple):
    """host_class: of comfy.supported_models; family: of the block registry; detected: what the host takes its keys for."""

    host_class: str
    family: str
    config: dict
    detected: str = ""


_SD1 = {
    "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4,
    "adm_in_channels": None, "use_temporal_attention": False, "use_temporal_resblock": False, "model_channels": 320, "num_res_blocks": [2] * 4,
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1, "use_linear_in_transformer": False, "context_dim": 768,
}  # fmt: skip
_SD2 = {**_SD1, "use_linear_in_transformer": True, "context_dim": 1024, "num_head_channels": 64}
_UNCLIP = {**_SD2, "num_classes": "sequential"}
_SDXL = {
    **_UNCLIP, "adm_in_channels": 2816, "num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
}  # fmt: skip
_VIDEO = {
    **_UNCLIP, "in_channels": 8, "adm_in_channels": 768, "use_temporal_attention": True, "use_temporal_resblock": True,
    "extra_ff_mix_layer": True, "use_spatial_context": True, "merge_strategy": "learned_with_images", "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1], "disable_temporal_crossattention": False,
}  # fmt: skip


def _sdxl(depth: list, out: list, middle: int, blocks: int = 2, **more) -> dict:
    return {**_SDXL, "num_res_blocks": [blocks] * 3, "transformer_depth": depth, "transformer_depth_output": out, "transformer_depth_middle": middle, **more}


def _sd3(depth: int, **more) -> dict:
    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": depth * 64}}
    return {"in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": depth, "input_size": None, "adm_in_channels": 2048,
            "context_embedder_config": context, "num_patches": 36864, "pos_embed_max_size": 192, "pos_embed_scaling_factor": None, **more}


def _flux(depth: int, single: int, **more) -> dict:
    return {"image_model": "flux", "axes_dim": [16, 56, 56], "num_heads": 24, "mlp_ratio": 4.0, "theta": 10000, "out_channels": 16, "qkv_bias": True,
            "txt_ids_dims": [], "in_channels": 16, "hidden_size": 3072, "context_in_dim": 4096, "patch_size": 2, "vec_in_dim": 768, "depth": depth,
            "depth_single_blocks": single, **more}


def _flux2(depth: int, single: int, hidden: int, context: int, guidance: bool) -> dict:
    return _flux(depth, single, image_model="flux2", axes_dim=[32] * 4, mlp_ratio=3.0, theta=2000, out_channels=128, global_modulation=True,
                 mlp_silu_act=True, qkv_bias=False, ops_bias=False, ref_index_scale=10.0, txt_ids_dims=[3], patch_size=1, in_channels=128,
                 hidden_size=hidden, num_heads=hidden // 128, context_in_dim=context, vec_in_dim=None, guidance_embed=guidance)


def _chroma(**more) -> dict:
    return _flux(19, 38, **{"image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120,
                            "n_layers": 5, "vec_in_dim": None, **more})


def _hunyuan(depth: int, single: int, patch: list, **more) -> dict:
    return {"image_model": "hunyuan_video", "in_channels": 16, "patch_size": patch, "out_channels": 16, "vec_in_dim": None, "context_in_dim": 4096,
            "axes_dim": [64, 64] if len(patch) == 2 else [16, 56, 56], "meanflow": False, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24,
            "depth": depth, "depth_single_blocks": single, "theta": 256, "qkv_bias": True, "byt5": False, "guidance_embed": True,
            "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False, **more}


def _wan(dim: int, layers: int, ffn: int, kind: str = "t2v", **more) -> dict:
    return {"image_model": "wan2.1", "dim": dim, "out_dim": 16, "num_heads": dim // 128, "ffn_dim": ffn, "num_layers": layers, "patch_size": (1, 2, 2),
            "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "model_type": kind, **more}


def _wan14(kind: str, **more) -> dict:
    return _wan(5120, 40, 13824, kind, **more)


def _lumina(n_layers: int, **more) -> dict:
    return {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 2304, "cap_feat_dim": 2304, "n_layers": n_layers, "qk_norm": True,
            "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32] * 3, "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0, **more}


def _z_image(**more) -> dict:
    return _lumina(30, **{"dim": 3840, "cap_feat_dim": 2560, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "rope_theta": 256.0,
                          "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32, **more})


def _cosmos(model: str, channels: int, blocks: int, **more) -> dict:
    ratios = {f"{kind}_{axis}_extrapolation_ratio": 1.0 for kind in ("rope", "extra") for axis in "hwt"}
    return {"image_model": model, "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
            "patch_temporal": 1, "model_channels": channels, "concat_padding_mask": True, "pos_emb_cls": "rope3d", "pos_emb_interpolation": "crop",
            "use_adaln_lora": True, "adaln_lora_dim": 256, "num_blocks": blocks, "num_heads": channels // 128, **ratios, **more}


def _predict2(model: str, channels: int, blocks: int) -> dict:
    return _cosmos(model, channels, blocks, crossattn_emb_channels=1024, pos_emb_learnable=True, min_fps=1, max_fps=30, extra_per_block_abs_pos_emb=False,
                   rope_enable_fps_modulation=False)


def _ltx(model: str, layers: int, head: int) -> dict:
    return {"image_model": model, "num_layers": layers, "attention_head_dim": head, "cross_attention_dim": 32 * head}


def _pixart(model: str, **more) -> dict:
    return {"image_model": model, "num_heads": 16, "patch_size": 2, "hidden_size": 1152, "in_channels": 4, "depth": 28, **more}


def _cogvideo(**more) -> dict:
    return {"image_model": "cogvideox", "num_attention_heads": 48, "attention_head_dim": 64, "time_embed_dim": 512, "num_layers": 42, "in_channels": 16,
            "patch_size": 2, "text_embed_dim": 4096, "use_learned_positional_embeddings": False, "use_rotary_positional_embeddings": True, **more}


def _hydit(model: str, **more) -> dict:
    return {"image_model": model, "depth": 40, "hidden_size": 1408, "mlp_ratio": 4.3637, **more}


def _kandinsky(dim: int, blocks: int, axes: tuple, **more) -> dict:
    return {"image_model": "kandinsky5", "model_dim": dim, "axes_dims": axes, "time_dim": 512, "ff_dim": 4 * dim, "visual_embed_dim": 132,
            "num_text_blocks": 2, "num_visual_blocks": blocks, **more}


# a name of LAYOUTS is that layout's model
NETWORKS: dict[str, Network] = {
    "SD1.5": Network("SD15", "unet", _SD1),
    "SD2": Network("SD20", "unet", _SD2),
    "SD2 unCLIP L": Network("SD21UnclipL", "unet", {**_UNCLIP, "adm_in_channels": 1536}),
    "SD2 unCLIP H": Network("SD21UnclipH", "unet", {**_UNCLIP, "adm_in_channels": 2048}),
    "SDXL": Network("SDXL", "unet", _SDXL),
    "SDXL refiner": Network("SDXLRefiner", "unet", {**_SDXL, "adm_in_channels": 2560, "model_channels": 384, "num_res_blocks": [2] * 4, "context_dim": 1280,
                            "channel_mult": [1, 2, 4, 4], "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0], "transformer_depth_middle": 4,
                            "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0]}),
    "SSD-1B": Network("SSD1B", "unet", _sdxl([0, 0, 2, 2, 4, 4], [0, 0, 0, 1, 1, 2, 10, 4, 4], -1)),
    "Segmind Vega": Network("Segmind_Vega", "unet", _sdxl([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2], -1)),
    "KOALA 700M": Network("KOALA_700M", "unet", _sdxl([0, 2, 5], [0, 0, 2, 2, 5, 5], -2, 1)),
    "KOALA 1B": Network("KOALA_1B", "unet", _sdxl([0, 2, 6], [0, 0, 2, 2, 6, 6], 6, 1)),
    "Stable Video Diffusion": Network("SVD_img2vid", "unet", _VIDEO),
    "SV3D u": Network("SV3D_u", "unet", {**_VIDEO, "adm_in_channels": 256}),
    "SV3D p": Network("SV3D_p", "unet", {**_VIDEO, "adm_in_channels": 1280}),
    "Stable Zero123": Network("Stable_Zero123", "unet", {**_SD1, "in_channels": 8}),
    "InstructPix2Pix": Network("SD15_instructpix2pix", "unet", {**_SD1, "in_channels": 8}),
    "InstructPix2Pix XL": Network("SDXL_instructpix2pix", "unet", {**_SDXL, "in_channels": 8}),
    "Lotus D": Network("LotusD", "unet", {**_SD2, "adm_in_channels": 4}),
    "SD x4 upscaler": Network("SD_X4Upscaler", "unet", {**_SD2, "in_channels": 7, "model_channels": 256, "channel_mult": [1, 2, 2, 4], "num_classes": 1000,
                              "transformer_depth": [0] * 2 + [1] * 6, "transformer_depth_output": [0] * 3 + [1] * 9}),
    "Stable Cascade C": Network("Stable_Cascade_C", "generic", {"stable_cascade_stage": "c", "c_cond": 2048}),
    "Stable Cascade B": Network("Stable_Cascade_B", "generic", {"stable_cascade_stage": "b", "c_hidden": [320, 640, 1280, 1280], "nhead": [-1, -1, 20, 20],
                                "blocks": [[2, 6, 28, 6], [6, 28, 6, 2]], "block_repeat": [[1, 1, 1, 1], [3, 3, 2, 2]]}),
    "SD3 Medium": Network("SD3", "sd3", _sd3(24)),
    "SD3.5 Medium": Network("SD3", "sd3", _sd3(24, qk_norm="rms", x_block_self_attn_layers=list(range(13)))),
    "SD3.5 Large": Network("SD3", "sd3", _sd3(38, qk_norm="rms")),
    "SD3 with a context processor": Network("SD3", "sd3", _sd3(24, context_processor_layers=2)),
    "AuraFlow": Network("AuraFlow", "auraflow", {"max_seq": 1024, "cond_seq_dim": 2048, "n_double_layers": 4, "n_layers": 36}),
    "PixArt alpha": Network("PixArtAlpha", "pixart", _pixart("pixart_alpha", model_max_length=120, input_size=128, pe_interpolation=2, micro_condition=True)),
    "PixArt": Network("PixArtSigma", "pixart", _pixart("pixart_sigma", model_max_length=300, micro_condition=False)),
    "HunyuanDiT": Network("HunyuanDiT", "hunyuan_dit", _hydit("hydit")),
    "HunyuanDiT 1.0": Network("HunyuanDiT1", "hunyuan_dit", _hydit("hydit1", size_cond=True, use_style_cond=True)),
    "Flux.1": Network("Flux", "flux", _flux(19, 38, guidance_embed=True)),
    "Flux.1 Fill": Network("FluxInpaint", "flux", _flux(19, 38, guidance_embed=True, in_channels=96)),
    "Flux.1 schnell": Network("FluxSchnell", "flux", _flux(19, 38, guidance_embed=False)),
    "Flux.2 dev": Network("Flux2", "flux", _flux2(8, 48, 6144, 15360, True)),
    "Flux.2 Klein 4B": Network("Flux2", "flux", _flux2(5, 20, 3072, 7680, False)),
    "Flux.2 Klein 9B": Network("Flux2", "flux", _flux2(8, 24, 4096, 12288, False)),
    "LongCat-Image": Network("LongCatImage", "flux", _flux(10, 20, context_in_dim=3584, vec_in_dim=None, guidance_embed=False, txt_ids_dims=[1, 2])),
    "Chroma": Network("Chroma", "flux", _chroma()),
    "Chroma Radiance": Network("ChromaRadiance", "flux", _chroma(image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=16, nerf_depth=4,
                               nerf_hidden_size=64, nerf_mlp_ratio=4, nerf_max_freqs=8, nerf_tile_size=512, nerf_final_head_type="conv",
                               nerf_embedder_dtype=torch.float32, use_x0=False, use_sequential_txt_ids=False)),
    "Hunyuan3D 2": Network("Hunyuan3Dv2", "flux", {"image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 1536, "hidden_size": 1024, "depth": 16,
                           "mlp_ratio": 4.0, "num_heads": 16, "depth_single_blocks": 32, "qkv_bias": True, "guidance_embed": False}),
    "Hunyuan3D 2 mini": Network("Hunyuan3Dv2mini", "flux", {"image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 1536, "hidden_size": 1024,
                                "depth": 8, "mlp_ratio": 4.0, "num_heads": 16, "depth_single_blocks": 16, "qkv_bias": True, "guidance_embed": False}),
    "Hunyuan3D 2.1": Network("Hunyuan3Dv2_1", "generic", {"image_model": "hunyuan3d2_1", "in_channels": 64, "context_dim": 1024, "hidden_size": 2048,
                             "mlp_ratio": 4.0, "num_heads": 16, "depth": 21, "qkv_bias": False, "guidance_cond_proj_dim": None}),
    "HunyuanVideo": Network("HunyuanVideo", "hunyuan_video", _hunyuan(20, 40, [1, 2, 2], vec_in_dim=768)),
    "HunyuanVideo I2V": Network("HunyuanVideoI2V", "hunyuan_video", _hunyuan(20, 40, [1, 2, 2], vec_in_dim=768, in_channels=33)),
    "SkyReels I2V": Network("HunyuanVideoSkyreelsI2V", "hunyuan_video", _hunyuan(20, 40, [1, 2, 2], vec_in_dim=768, in_channels=32)),
    "HunyuanImage 2.1": Network("HunyuanImage21", "hunyuan_video", _hunyuan(20, 40, [1, 1], in_channels=64, out_channels=64, context_in_dim=3584, byt5=True,
                                hidden_size=3584, num_heads=28)),
    "HunyuanImage 2.1 refiner": Network("HunyuanImage21Refiner", "hunyuan_video", _hunyuan(2, 2, [1, 1, 1], in_channels=128, out_channels=64, meanflow=True)),
    "HunyuanVideo 1.5": Network("HunyuanVideo15", "hunyuan_video", _hunyuan(54, 0, [1, 1, 1], in_channels=65, out_channels=32, context_in_dim=3584, byt5=True,
                                hidden_size=2048, num_heads=16, guidance_embed=False, use_cond_type_embedding=True, vision_in_dim=1152, meanflow_sum=True)),
    "HunyuanVideo 1.5 SR": Network("HunyuanVideo15_SR_Distilled", "hunyuan_video", _hunyuan(54, 0, [1, 1, 1], in_channels=98, out_channels=32, byt5=True,
                                   context_in_dim=3584, hidden_size=2048, num_heads=16, guidance_embed=False, use_cond_type_embedding=True,
                                   vision_in_dim=1152, meanflow_sum=True)),
    "Wan 14B": Network("WAN21_T2V", "wan", _wan14("t2v")),
    "Wan 1.3B": Network("WAN21_T2V", "wan", _wan(1536, 30, 8960)),
    "Wan 2.2 5B": Network("WAN22_T2V", "wan", _wan(3072, 30, 14336, in_dim=48, out_dim=48)),
    "Wan I2V": Network("WAN21_I2V", "wan", _wan14("i2v", in_dim=36)),
    "Wan first and last frame": Network("WAN21_I2V", "wan", _wan14("i2v", in_dim=36, flf_pos_embed_token_number=514)),
    "Wan Fun Control": Network("WAN21_FunControl2V", "wan", _wan14("i2v", in_dim=48, in_dim_ref_conv=16)),
    "Wan 14B VACE": Network("WAN21_Vace", "wan", _wan14("vace", vace_in_dim=96, vace_layers=8)),
    "Wan Camera": Network("WAN21_Camera", "wan", _wan14("camera", in_dim=32)),
    "Wan 2.2 Camera": Network("WAN22_Camera", "wan", _wan14("camera_2.2", in_dim=36)),
    "Wan HuMo": Network("WAN21_HuMo", "wan", _wan14("humo", in_dim=36)),
    "Wan S2V": Network("WAN22_S2V", "wan", _wan14("s2v")),
    "Wan Animate": Network("WAN22_Animate", "wan", _wan14("animate", in_dim=36)),
    "Wan SCAIL": Network("WAN21_SCAIL", "wan", _wan14("scail", in_dim=20)),
    "Wan SCAIL 2": Network("WAN21_SCAIL2", "wan", _wan14("scail2", in_dim=20)),
    "WanDancer": Network("WAN22_WanDancer", "wan", _wan14("wandancer", in_dim=36)),
    "Wan Animate 2": Network("WAN_Animate2", "wan", _wan14("animate2", in_dim=36), "WAN21_I2V"),
    "Qwen-Image": Network("QwenImage", "qwen_image", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}),
    "Qwen-Image Layered": Network("QwenImage", "qwen_image", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60,
                                  "use_additional_t_cond": True, "default_ref_method": "negative_index"}),
    "Mage-Flow": Network("MageFlow", "qwen_image", {"image_model": "mage_flow", "in_channels": 128, "num_layers": 20}),
    "Lens": Network("Lens", "qwen_image", {"image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 40, "num_attention_heads": 24,
                    "enc_hidden_dim": 2880, "multi_layer_encoder_feature": True, "selected_layer_index": (0, 1, 2, 3)}),
    "JoyImage": Network("JoyImage", "generic", {"image_model": "joyimage", "in_channels": 32, "hidden_size": 4096, "patch_size": [1, 2, 2],
                        "num_layers": 40, "num_attention_heads": 32, "text_dim": 4096}),
    "Lumina-Image 2": Network("Lumina2", "lumina2", _lumina(26)),
    "NewBie": Network("Lumina2", "lumina2", _lumina(36, clip_text_dim=1024, cap_feat_dim=2560)),
    "Z-Image": Network("ZImage", "lumina2", _z_image()),
    "Z-Image Omni": Network("ZImage", "lumina2", _z_image(siglip_feat_dim=1152)),
    "Z-Image in pixels": Network("ZImagePixelSpace", "lumina2", _z_image(image_model="zimage_pixel", patch_size=32, in_channels=3, decoder_in_channels=3072,
                                 decoder_hidden_size=1024, decoder_num_res_blocks=4, decoder_max_freqs=8)),
    "LTXV 2B": Network("LTXV", "ltx", _ltx("ltxv", 28, 64)),
    "LTXV 13B": Network("LTXV", "ltx", _ltx("ltxv", 48, 128)),
    "LTX-2": Network("LTXAV", "ltx", _ltx("ltxav", 48, 128)),
    "HiDream-I1": Network("HiDream", "hidream", {"image_model": "hidream", "attention_head_dim": 128, "axes_dims_rope": [64, 32, 32], "in_channels": 16,
                          "caption_channels": [4096, 4096], "max_resolution": [128, 128], "llama_layers": [*range(32), *[31] * 16], "out_channels": 16,
                          "num_attention_heads": 20, "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 16, "num_single_layers": 32,
                          "patch_size": 2, "text_emb_dim": 2048}),
    "HiDream-O1": Network("HiDreamO1", "generic", {"image_model": "hidream_o1"}),
    "Cosmos": Network("CosmosT2V", "cosmos", _cosmos("cosmos", 4096, 28, block_config="FA-CA-MLP", pos_emb_learnable=False, block_x_format="THWBD",
                      affline_emb_norm=True, extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable")),
    "Cosmos video": Network("CosmosI2V", "cosmos", _cosmos("cosmos", 5120, 36, block_config="FA-CA-MLP", pos_emb_learnable=False, block_x_format="THWBD",
                            affline_emb_norm=True, extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable", in_channels=17)),
    "Cosmos-Predict2 2B": Network("CosmosT2IPredict2", "cosmos2", _predict2("cosmos_predict2", 2048, 28)),
    "Cosmos-Predict2 14B": Network("CosmosT2IPredict2", "cosmos2", _predict2("cosmos_predict2", 5120, 36)),
    "Cosmos-Predict2 video": Network("CosmosI2VPredict2", "cosmos2", {**_predict2("cosmos_predict2", 2048, 28), "in_channels": 17}),
    "Anima": Network("Anima", "cosmos2", _predict2("anima", 2048, 28)),
    "Krea 2": Network("Krea2", "krea2", {"image_model": "krea2", "features": 6144, "channels": 16, "patch": 2, "layers": 28, "heads": 48, "kvheads": 12,
                      "txtlayers": 12, "txtdim": 2560}),
    "OmniGen2": Network("Omnigen2", "omnigen2", {"image_model": "omnigen2", "axes_dim_rope": [40] * 3, "axes_lens": [1024, 1664, 1664], "hidden_size": 2520,
                        "ffn_dim_multiplier": None, "in_channels": 16, "multiple_of": 256, "norm_eps": 1e-5, "num_attention_heads": 21, "num_kv_heads": 7,
                        "num_layers": 32, "num_refiner_layers": 2, "out_channels": None, "patch_size": 2, "text_feat_dim": 2048, "timestep_scale": 1000.0}),
    "Boogu": Network("Boogu", "omnigen2", {"image_model": "boogu", "hidden_size": 3360, "num_layers": 32, "num_double_stream_layers": 8,
                     "num_refiner_layers": 2, "instruction_feat_dim": 4096}),
    "Kandinsky 5 Lite": Network("Kandinsky5", "kandinsky5", _kandinsky(1792, 32, (16, 24, 24))),
    "Kandinsky 5 Image": Network("Kandinsky5Image", "kandinsky5", _kandinsky(2560, 50, (32, 48, 48), rope_scale_factor=(1.0, 1.0, 1.0), visual_embed_dim=64)),
    "Mochi": Network("GenmoMochi", "mochi", {"image_model": "mochi_preview", "depth": 48, "patch_size": 2, "num_heads": 24, "hidden_size_x": 3072,
                     "hidden_size_y": 1536, "mlp_ratio_x": 4.0, "mlp_ratio_y": 4.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True,
                     "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True,
                     "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 4096,
                     "t5_token_length": 256, "rope_theta": 10000.0}),
    "CogVideoX 5B": Network("CogVideoX_T2V", "cogvideox", _cogvideo()),
    "CogVideoX I2V": Network("CogVideoX_I2V", "cogvideox", _cogvideo(in_channels=32, ofs_embed_dim=512, use_learned_positional_embeddings=True)),
    "CogVideoX inpainting": Network("CogVideoX_Inpaint", "cogvideox", _cogvideo(in_channels=48)),
    "Ernie-Image": Network("ErnieImage", "ernie_image", {"image_model": "ernie"}),
    "Ideogram 4": Network("Ideogram4", "ideogram4", {"image_model": "ideogram4", "in_channels": 128, "num_layers": 34}),
    "MiniMax H3": Network("MiniMaxH3", "generic", {"image_model": "minimax_h3", "num_layers": 8, "token_refiner_num_layers": 2, "hidden_size": 1024,
                          "latents_dim": 16, "audio_latents_dim": 64, "attention_head_dim": 128, "num_attention_heads": 8, "ffn_hidden_size": 2048,
                          "text_dim": 2048, "timestep_input_dim": 256, "time_embed_hidden_size": 1024, "time_embed_dim": 1024, "rope_inv_freq_len": 16}),
    "PiD": Network("PiD", "generic", {"image_model": "pid", "lq_hidden_dim": 1536, "lq_interval": 2, "lq_latent_channels": 16,
                   "latent_spatial_down_factor": 8}),
    "SeedVR2": Network("SeedVR2", "generic", {"image_model": "seedvr2", "vid_dim": 2560, "heads": 20, "num_layers": 32, "norm_eps": 1e-5,
                       "mlp_type": "swiglu", "vid_out_norm": True}),
    "TRELLIS 2": Network("Trellis2", "generic", {"image_model": "trellis2", "resolution": 64, "init_txt_model": True, "txt_only": False}),
    "TripoSplat": Network("TripoSplat", "generic", {"image_model": "triposplat"}),
    "ACE-Step": Network("ACEStep", "generic", {"audio_model": "ace", "attention_head_dim": 128, "in_channels": 8, "inner_dim": 2560, "max_height": 16,
                        "max_position": 32768, "max_width": 32768, "mlp_ratio": 2.5, "num_attention_heads": 20, "num_layers": 24, "out_channels": 8,
                        "patch_size": [16, 1], "rope_theta": 1e6, "speaker_embedding_dim": 512, "text_embedding_dim": 768, "ssl_encoder_depths": [8, 8],
                        "ssl_latent_dims": [1024, 768], "ssl_names": ["mert", "m-hubert"], "lyric_encoder_vocab_size": 6693, "lyric_hidden_size": 1024}),
    "MiniMax Music 3": Network("MiniMaxMusic3", "generic", {"audio_model": "minimax_music3"}),
}  # fmt: skip
# What the tests leave out of the host's list, and why.
WITHOUT = {
    "RT_DETR_v4": "finds objects", "SAM3": "finds objects", "SAM31": "finds objects", "DepthAnything3": "estimates depth",
    "StableAudio": "built from weights beside the denoiser", "StableAudio3": "built from weights beside the denoiser",
    "ACEStep15": "counts its codebook while it is built, which `meta` cannot",
    "PixelDiTT2I": "the network of PiD", "WAN21_CausalAR_T2V": "the network of Wan", "WAN21_FlowRVS": "the network of Wan",
}  # fmt: skip


@torch.no_grad()
def build(network: Network) -> torch.nn.Module:
    """The host's model (a BaseModel), its denoiser on `meta`. Raises NotInHost."""
    if not hasattr(comfy.supported_models, network.host_class):
        raise NotInHost(f"this host has no {network.host_class}: its counts are those that its authors published")
    options = dict(network.config)
    projection = {"cc_projection.weight": torch.empty(768, 772, device=META), "cc_projection.bias": torch.empty(768, device=META)}
    while True:
        config = getattr(comfy.supported_models, network.host_class)(dict(options))
        config.set_inference_dtype(torch.bfloat16, None)
        try:
            return config.get_model(projection if network.host_class == "Stable_Zero123" else {}, device=META)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is not None and unknown[1] in OWN_PARTS:
                raise NotInHost(f"this host's {network.host_class} knows no {unknown[1]}") from None
            if unknown is None or unknown[1] not in LATER & options.keys():
                raise
            del options[unknown[1]]


def detect(model: torch.nn.Module) -> str:
    """The class that the host's loader chooses for a checkpoint with this model's weights."""
    return type(comfy.model_detection.model_config_from_unet(model.state_dict(), "diffusion_model.")).__name__
