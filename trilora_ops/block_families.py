"""The table of model families: how each is told from its keys, where its weights lie and what they do.

A path is one of the host's keys without `diffusion_model.`. A weight lies in the place whose path is the longest that its
own begins with, so the order in which a table is written never decides.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Family:
    """One family of denoisers.

    marks: beginnings of paths, with # for a number, that every model of the family has; `!path`: that none has. No two
    families' marks fit one model. places: group -> the paths of its weights, in the order in which the model runs; `IN##`
    is a numbered list, with as many digits as it has #. kinds: part of a path, the block's number as #, -> words of KINDS;
    `$` stands for the path's end. All that fit count, except a part of another that fits.
    """

    name: str
    marks: str
    places: dict[str, str]
    kinds: dict[str, str]

    def has(self, beginnings: set[str]) -> bool:
        """Whether a model with these beginnings of paths is of this family."""
        return all((mark[1:] not in beginnings) if mark.startswith("!") else mark in beginnings for mark in self.marks.split())


# the second axis: what a layer does, and for which stream
KINDS = {
    "attn": "attention", "self": "self-attention", "cross": "cross-attention", "mlp": "feed-forward", "fused": "attention and feed-forward in one weight",
    "proj": "into and out of a transformer", "mod": "modulation by time and pooled text", "conv": "convolutions", "norm": "norms", "emb": "embeddings",
    "img": "image stream", "txt": "text stream", "video": "video stream", "audio": "audio stream", "a2v": "audio to video", "v2a": "video to audio",
}

_UNET = {
    "input_blocks.#.0.$": "conv", "in_layers.0": "norm", "in_layers.2": "conv", "emb_layers": "mod", "out_layers.0": "norm", "out_layers.3": "conv",
    "skip_connection": "conv", "op": "conv", "conv": "conv", "attn1": "attn self", "attn2": "attn cross", "ff": "mlp", "ff_in": "mlp",
    "proj_in": "proj", "proj_out": "proj", "time_pos_embed": "emb", "time_mixer": "mod", "out.0": "norm", "out.2": "conv",
}
_FLUX = {
    "img_attn": "attn img", "txt_attn": "attn txt", "img_mlp": "mlp img", "txt_mlp": "mlp txt", "img_mod": "mod img", "txt_mod": "mod txt",
    # of a single block: rows q, k, v and feed-forward in; columns attention and feed-forward out
    "linear1": "fused", "linear2": "fused", "single_blocks.#.norm": "attn", "modulation": "mod", "adaLN_modulation": "mod",
}
_QWEN = {
    "attn": "attn", "to_q": "img", "to_k": "img", "to_v": "img", "to_out": "img", "norm_q": "img", "norm_k": "img", "img_qkv": "img",
    "add_q_proj": "txt", "add_k_proj": "txt", "add_v_proj": "txt", "to_add_out": "txt", "norm_added_q": "txt", "norm_added_k": "txt", "txt_qkv": "txt",
    "img_mlp": "mlp img", "txt_mlp": "mlp txt", "img_mod": "mod img", "txt_mod": "mod txt", "img_norm1": "img", "img_norm2": "img",
    "txt_norm1": "txt", "txt_norm2": "txt",
}
_LTX = {
    "attn1": "attn self", "attn2": "attn cross", "ff": "mlp", "video_embeddings_connector": "video", "audio_embeddings_connector": "audio",
    "transformer_blocks.#.attn1": "attn self video", "transformer_blocks.#.attn2": "attn cross video", "transformer_blocks.#.ff": "mlp video",
    "audio_attn1": "attn self audio", "audio_attn2": "attn cross audio", "audio_ff": "mlp audio",
    "audio_to_video_attn": "attn cross a2v", "video_to_audio_attn": "attn cross v2a",
    "transformer_blocks.#.scale_shift_table": "mod video", "audio_scale_shift_table": "mod audio",
    "scale_shift_table_a2v_ca_video": "mod video", "scale_shift_table_a2v_ca_audio": "mod audio",
}
_LUMINA = {
    "attention": "attn", "feed_forward": "mlp", "adaLN_modulation": "mod", "noise_refiner": "img", "siglip_refiner": "img", "context_refiner": "txt",
    "dec_net": "img", "dec_net.res_blocks.#.mlp": "mlp img",
}
_AURAFLOW = {
    **{f"double_layers.#.attn.w1{part}": "attn txt" for part in "qkvo"}, **{f"double_layers.#.attn.w2{part}": "attn img" for part in "qkvo"},
    "attn": "attn", "mlp": "mlp", "mlpX": "mlp img", "mlpC": "mlp txt", "modX": "mod img", "modC": "mod txt", "modCX": "mod", "modF": "mod",
}
_HIDREAM = {
    **{f"double_stream_blocks.#.block.attn1.{name}": "attn img" for name in ("to_q", "to_k", "to_v", "to_out", "q_rms_norm", "k_rms_norm")},
    **{f"{name}_t": "txt" for name in ("to_q", "to_k", "to_v", "to_out", "q_rms_norm", "k_rms_norm")},
    "attn1": "attn", "ff_i": "mlp", "double_stream_blocks.#.block.ff_i": "mlp img", "ff_t": "mlp txt", "adaLN_modulation": "mod",
}
_COSMOS2 = {
    "self_attn": "attn self", "cross_attn": "attn cross", "mlp": "mlp", "adaln_modulation_self_attn": "mod", "adaln_modulation_cross_attn": "mod",
    "adaln_modulation_mlp": "mod", "adaln_modulation": "mod", "llm_adapter": "txt",
}
_WAN = {
    "self_attn": "attn self", "cross_attn": "attn cross", "k_img": "img", "v_img": "img", "norm_k_img": "img", "ffn": "mlp", "modulation": "mod",
    "before_proj": "proj", "after_proj": "proj", "audio_cross_attn_wrapper": "audio", "audio_cross_attn": "attn cross",
    "audio_injector.injector": "attn cross audio", "audio_injector.injector_adain_layers": "mod audio", "music_injector.injector": "attn cross audio",
    "music_encoder": "audio", "music_encoder.#.linear1": "mlp audio", "music_encoder.#.linear2": "mlp audio", "fuser_blocks": "attn cross img",
}
_OMNIGEN2 = {
    "attn": "attn", "feed_forward": "mlp", "norm1.linear": "mod", "noise_refiner": "img", "ref_image_refiner": "img", "context_refiner": "txt",
    "img_instruct_attn": "attn", "img_self_attn": "attn self img", "img_feed_forward": "mlp img", "instruct_feed_forward": "mlp txt",
    **{f"processor.{part}": "img" for part in ("img_to_q", "img_to_k", "img_to_v", "img_out")},
    **{f"processor.{part}": "txt" for part in ("instruct_to_q", "instruct_to_k", "instruct_to_v", "instruct_out")},
    **{f"img_norm{n}.linear": "mod img" for n in (1, 2, 3)}, **{f"instruct_norm{n}.linear": "mod txt" for n in (1, 2)},
}

FAMILIES: tuple[Family, ...] = (
    # SD 1, SD 2, SDXL and their kin, SVD
    Family("unet", "input_blocks output_blocks", {
        "EMB": "time_embed label_emb", "IN##": "input_blocks.#", "MID#": "middle_block.#", "OUT##": "output_blocks.#", "FINAL": "out heatmap_head"}, _UNET),
    # SD3, SD3.5
    Family("sd3", "joint_blocks", {
        "EMB": "x_embedder t_embedder y_embedder context_embedder pos_embed register", "CP##": "context_processor.layers.#", "J##": "joint_blocks.#",
        "FINAL": "final_layer"},
        {"x_block": "img", "context_block": "txt", "context_processor": "txt", "attn": "attn", "attn2": "attn self", "mlp": "mlp", "adaLN_modulation": "mod"}),
    # Flux.1, Flux.2, Chroma, Chroma Radiance, Ovis, LongCat, Hunyuan3D 2
    Family("flux", "double_blocks.#.img_attn single_blocks !txt_in.individual_token_refiner", {
        "IN": "img_in img_in_patch txt_in txt_norm time_in vector_in guidance_in nerf_image_embedder latent_in cond_in", "GUID": "distilled_guidance_layer",
        "MOD": "double_stream_modulation_img double_stream_modulation_txt single_stream_modulation", "D##": "double_blocks.#", "S##": "single_blocks.#",
        "NERF#": "nerf_blocks.#", "FINAL": "final_layer nerf_final_layer nerf_final_layer_conv"},
        {**_FLUX, "distilled_guidance_layer": "mod", "double_stream_modulation_img": "mod img", "double_stream_modulation_txt": "mod txt",
         "single_stream_modulation": "mod", "param_generator": "mlp"}),
    # HunyuanVideo, HunyuanImage 2.1
    Family("hunyuan_video", "double_blocks txt_in.individual_token_refiner", {
        "IN": "img_in txt_in time_in time_r_in vector_in guidance_in byt5_in vision_in cond_type_embedding",
        "R#": "txt_in.individual_token_refiner.blocks.#", "D##": "double_blocks.#", "S##": "single_blocks.#", "FINAL": "final_layer"},
        {**_FLUX, "individual_token_refiner": "txt", "individual_token_refiner.blocks.#.self_attn": "attn self txt",
         "individual_token_refiner.blocks.#.mlp": "mlp txt"}),
    # Wan 2.1, 2.2 and what is built on them
    Family("wan", "blocks patch_embedding head.modulation", {
        "EMB": "patch_embedding text_embedding time_embedding time_projection img_emb img_emb_refimage vace_patch_embedding pose_patch_embedding "
               "patch_embedding_pose patch_embedding_mask patch_embedding_global motion_encoder face_encoder face_adapter control_adapter ref_conv "
               "audio_proj casual_audio_encoder cond_encoder trainable_cond_mask frame_packer music_projection",
        "MUSIC#": "music_encoder.#", "V##": "vace_blocks.#", "B##": "blocks.#", "AUDIO##": "audio_injector.injector.# audio_injector.injector_adain_layers.#",
        "BEAT#": "music_injector.injector.#", "FACE#": "face_adapter.fuser_blocks.#", "FINAL": "head head_global"}, _WAN),
    # Qwen-Image, Lens, Mage-Flow
    Family("qwen_image", "transformer_blocks time_text_embed", {
        "EMB": "img_in txt_in txt_norm time_text_embed", "B##": "transformer_blocks.#", "FINAL": "norm_out proj_out"}, _QWEN),
    # Lumina-Image 2, Z-Image, NewBie
    Family("lumina2", "layers cap_embedder", {
        "EMB": "x_embedder t_embedder cap_embedder x_pad_token cap_pad_token siglip_pad_token siglip_embedder clip_text_pooled_proj time_text_embed",
        "NR#": "noise_refiner.#", "CR#": "context_refiner.#", "SR#": "siglip_refiner.#", "L##": "layers.#", "DEC#": "dec_net.res_blocks.#",
        "FINAL": "final_layer norm_final dec_net"}, _LUMINA),
    # LTX-Video, LTX-2
    Family("ltx", "transformer_blocks patchify_proj", {
        "EMB": "patchify_proj audio_patchify_proj adaln_single audio_adaln_single av_ca_video_scale_shift_adaln_single av_ca_audio_scale_shift_adaln_single "
               "av_ca_a2v_gate_adaln_single av_ca_v2a_gate_adaln_single caption_projection audio_caption_projection audio_embeddings_connector "
               "video_embeddings_connector prompt_adaln_single audio_prompt_adaln_single keyframes_abs_pos_embedding",
        "VC#": "video_embeddings_connector.transformer_1d_blocks.#", "AC#": "audio_embeddings_connector.transformer_1d_blocks.#",
        "B##": "transformer_blocks.#", "FINAL": "proj_out audio_proj_out scale_shift_table audio_scale_shift_table"}, _LTX),
    Family("auraflow", "double_layers single_layers", {
        "EMB": "positional_encoding register_tokens t_embedder cond_seq_linear init_x_linear", "D##": "double_layers.#", "S##": "single_layers.#",
        "FINAL": "final_linear modF"}, _AURAFLOW),
    Family("hidream", "double_stream_blocks single_stream_blocks", {
        "EMB": "t_embedder p_embedder x_embedder caption_projection", "D##": "double_stream_blocks.#", "S##": "single_stream_blocks.#",
        "FINAL": "final_layer"}, _HIDREAM),
    # Cosmos 1: a block's parts are self-attention, cross-attention, feed-forward
    Family("cosmos", "blocks.block0", {
        "EMB": "x_embedder t_embedder affline_norm pos_embedder extra_pos_embedder", "B##": "blocks.block#", "FINAL": "final_layer"},
        {"blocks.0.block": "attn self", "blocks.1.block": "attn cross", "blocks.2.block": "mlp", "to_q.1": "norm", "to_k.1": "norm", "adaLN_modulation": "mod"}),
    # Cosmos-Predict2, Anima
    Family("cosmos2", "blocks.#.adaln_modulation_self_attn", {
        "EMB": "x_embedder t_embedder t_embedding_norm pos_embedder extra_pos_embedder llm_adapter", "A#": "llm_adapter.blocks.#", "B##": "blocks.#",
        "FINAL": "final_layer"}, _COSMOS2),
    Family("krea2", "blocks txtfusion", {
        "EMB": "first tmlp txtmlp tproj txtfusion", "TL#": "txtfusion.layerwise_blocks.#", "TR#": "txtfusion.refiner_blocks.#", "B##": "blocks.#",
        "FINAL": "last"},
        {"attn": "attn", "mlp": "mlp", "mod": "mod", "modulation": "mod", "prenorm": "norm", "postnorm": "norm", "qknorm": "norm", "txtfusion": "txt"}),
    # OmniGen2, Boogu
    Family("omnigen2", "ref_image_refiner context_refiner", {
        "EMB": "image_index_embedding x_embedder ref_image_patch_embedder time_caption_embed", "NR#": "noise_refiner.#", "RR#": "ref_image_refiner.#",
        "CR#": "context_refiner.#", "D##": "double_stream_layers.#", "L##": "layers.# single_stream_layers.#", "FINAL": "norm_out"}, _OMNIGEN2),
    Family("kandinsky5", "visual_transformer_blocks", {
        "EMB": "time_embeddings text_embeddings pooled_text_embeddings visual_embeddings", "T##": "text_transformer_blocks.#",
        "V##": "visual_transformer_blocks.#", "FINAL": "out_layer"},
        {"self_attention": "attn self", "cross_attention": "attn cross", "feed_forward": "mlp", "text_modulation": "mod", "visual_modulation": "mod",
         "modulation": "mod", "text_transformer_blocks": "txt", "visual_transformer_blocks": "img"}),
    Family("pixart", "blocks.#.scale_shift_table t_block", {
        "EMB": "x_embedder t_embedder t_block y_embedder csize_embedder ar_embedder pos_embed", "B##": "blocks.#", "FINAL": "final_layer"},
        {"attn": "attn self", "cross_attn": "attn cross", "mlp": "mlp", "scale_shift_table": "mod"}),
    Family("hunyuan_dit", "blocks mlp_t5", {
        "EMB": "x_embedder t_embedder extra_embedder mlp_t5 pooler text_embedding_padding style_embedder", "B##": "blocks.#", "FINAL": "final_layer"},
        {"attn1": "attn self", "attn2": "attn cross", "mlp": "mlp", "default_modulation": "mod", "skip_linear": "proj", "adaLN_modulation": "mod"}),
    Family("mochi", "blocks t5_yproj", {
        "EMB": "x_embedder t_embedder t5_y_embedder t5_yproj pos_frequencies", "B##": "blocks.#", "FINAL": "final_layer"},
        {"attn": "attn", **{name: "img" for name in ("qkv_x", "proj_x", "q_norm_x", "k_norm_x")},
         **{name: "txt" for name in ("qkv_y", "proj_y", "q_norm_y", "k_norm_y")}, "mlp_x": "mlp img", "mlp_y": "mlp txt", "mod_x": "mod img",
         "mod_y": "mod txt", "mod": "mod"}),
    Family("cogvideox", "blocks patch_embed.text_proj", {
        "EMB": "patch_embed time_embedding_linear_1 time_embedding_linear_2 ofs_embedding_linear_1 ofs_embedding_linear_2", "B##": "blocks.#",
        "FINAL": "norm_final norm_out proj_out"},
        {**{name: "attn" for name in ("q", "k", "v", "attn_out", "norm_q", "norm_k")}, "ff_proj": "mlp", "ff_out": "mlp", "norm1.linear": "mod",
         "norm2.linear": "mod", "norm_out.linear": "mod"}),
    Family("ernie_image", "layers.#.adaLN_sa_ln", {
        "EMB": "x_embedder text_proj time_embedding adaLN_modulation", "L##": "layers.#", "FINAL": "final_norm final_linear"},
        {"self_attention": "attn", "mlp": "mlp", "adaLN_modulation": "mod", "final_norm.linear": "mod"}),
    Family("ideogram4", "layers llm_cond_proj", {
        "EMB": "input_proj llm_cond_norm llm_cond_proj t_embedding adaln_proj embed_image_indicator", "L##": "layers.#", "FINAL": "final_layer"},
        {"attention": "attn", "feed_forward": "mlp", "adaln_modulation": "mod"}),
)

# words that mean the same wherever they stand, for families without a table of their own
GENERIC = Family("generic", "", {}, {
    "attn": "attn", "self_attn": "attn self", "cross_attn": "attn cross", "attention": "attn", "self_attention": "attn self", "cross_attention": "attn cross",
    "mlp": "mlp", "ffn": "mlp", "ff": "mlp", "feed_forward": "mlp", "adaLN_modulation": "mod", "modulation": "mod", "img_mlp": "mlp img",
    "txt_mlp": "mlp txt", "img_mod": "mod img", "txt_mod": "mod txt", "img_attn_qkv": "img", "img_attn_proj": "img", "txt_attn_qkv": "txt",
    "txt_attn_proj": "txt"})

# Text encoders: every encoder is a part of the CLIP with a name of its own. What its name has in it -> its group; the first that fits.
ENCODERS = (("clip_g", "TE2"), ("clip", "TE1"), ("jina", "TE1"), ("t5", "T5"), ("", "LLM"))
TEXT_ENCODER = Family("text_encoder", "", {
    "##": "transformer.text_model.encoder.layers.# transformer.bert.encoder.layer.# transformer.encoder.block.# transformer.model.encoder.layers.# "
          "transformer.model.layers.# transformer.layers.# layers.#",
    "VIS": "transformer.visual transformer.vision_model transformer.multi_modal_projector transformer.vision_embedder transformer.audio_tower"},
    {"self_attn": "attn self", "linear_attn": "attn self", "SelfAttention": "attn self", "mixer": "attn self", "attention": "attn self",
     "attention.output": "attn self", "mlp": "mlp", "DenseReluDense": "mlp", "intermediate": "mlp", "output": "mlp", "token_embedding": "emb",
     "position_embedding": "emb", "embeddings": "emb", "embed_tokens": "emb", "shared": "emb", "text_projection": "proj"})
# parts of a MODEL beside its denoiser that are no text encoder
BESIDE = ("model_sampling", "noise_augmentor", "seconds_start_embedder", "seconds_total_embedder", "padding_embedding", "cc_projection")
