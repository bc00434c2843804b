"""Which layers the target words name, on key lists as the families really spell them."""

import pytest
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.targets import TARGETS, select

# from the narrowest to the widest; a layer that one of them names is named by all that follow
WORDS = ("attention", "transformer", "linear", "linear+conv", "everything")
# family -> lines of "path, kernel axes, narrowest word that names it"
MODELS = {
    "sd15": """
        time_embed.0 0 everything
        input_blocks.0.0 2 everything
        input_blocks.1.0.in_layers.2 2 linear+conv
        input_blocks.1.0.emb_layers.1 0 linear
        input_blocks.4.0.skip_connection 2 linear+conv
        input_blocks.1.1.proj_in 2 transformer
        input_blocks.1.1.transformer_blocks.0.attn1.to_q 0 attention
        input_blocks.1.1.transformer_blocks.0.attn2.to_k 0 attention
        input_blocks.1.1.transformer_blocks.0.attn2.to_v 0 attention
        input_blocks.1.1.transformer_blocks.0.attn1.to_out.0 0 attention
        input_blocks.1.1.transformer_blocks.0.ff.net.0.proj 0 transformer
        input_blocks.1.1.transformer_blocks.0.ff.net.2 0 transformer
        input_blocks.1.1.proj_out 2 transformer
        input_blocks.3.0.op 2 linear+conv
        middle_block.0.emb_layers.1 0 linear
        middle_block.1.transformer_blocks.0.attn1.to_q 0 attention
        output_blocks.5.2.conv 2 linear+conv
        out.2 2 everything""",
    "sdxl": """
        label_emb.0.0 0 everything
        time_embed.2 0 everything
        input_blocks.0.0 2 everything
        input_blocks.4.0.in_layers.2 2 linear+conv
        input_blocks.4.0.emb_layers.1 0 linear
        input_blocks.4.1.proj_in 0 transformer
        input_blocks.4.1.transformer_blocks.1.attn1.to_q 0 attention
        input_blocks.4.1.transformer_blocks.1.attn2.to_out.0 0 attention
        input_blocks.4.1.transformer_blocks.1.ff.net.0.proj 0 transformer""",
    "flux": """
        img_in 0 everything
        time_in.in_layer 0 everything
        double_blocks.0.img_mod.lin 0 linear
        double_blocks.0.img_attn.qkv 0 attention
        double_blocks.0.img_attn.proj 0 attention
        double_blocks.0.img_mlp.0 0 transformer
        double_blocks.18.txt_attn.qkv 0 attention
        double_blocks.18.txt_mod.lin 0 linear
        double_blocks.18.txt_mlp.2 0 transformer
        single_blocks.37.linear1 0 attention
        single_blocks.37.linear2 0 attention
        single_blocks.37.modulation.lin 0 linear
        final_layer.linear 0 everything
        final_layer.adaLN_modulation.1 0 everything""",
    "sd3": """
        x_embedder.proj 2 everything
        context_embedder 0 everything
        joint_blocks.0.x_block.attn.qkv 0 attention
        joint_blocks.0.x_block.attn.proj 0 attention
        joint_blocks.0.x_block.attn2.qkv 0 attention
        joint_blocks.0.context_block.attn.qkv 0 attention
        joint_blocks.0.x_block.mlp.fc1 0 transformer
        joint_blocks.0.x_block.adaLN_modulation.1 0 linear
        joint_blocks.23.context_block.adaLN_modulation.1 0 linear
        final_layer.linear 0 everything""",
    "wan": """
        patch_embedding 3 everything
        text_embedding.0 0 everything
        time_projection.1 0 everything
        blocks.0.self_attn.q 0 attention
        blocks.0.self_attn.o 0 attention
        blocks.0.cross_attn.k 0 attention
        blocks.0.cross_attn.k_img 0 attention
        blocks.29.ffn.0 0 transformer
        blocks.29.ffn.2 0 transformer
        head.head 0 everything""",
    "lumina": """
        x_embedder 0 everything
        layers.0.attention.qkv 0 attention
        layers.0.attention.out 0 attention
        layers.0.feed_forward.w1 0 transformer
        layers.0.adaLN_modulation.1 0 linear
        final_layer.adaLN_modulation.1 0 everything""",
    "qwen": """
        img_in 0 everything
        transformer_blocks.0.attn.to_q 0 attention
        transformer_blocks.0.attn.add_k_proj 0 attention
        transformer_blocks.0.attn.to_add_out 0 attention
        transformer_blocks.0.img_mod.1 0 linear
        transformer_blocks.0.txt_mlp.net.0.proj 0 transformer
        norm_out.linear 0 everything
        proj_out 0 everything""",
}


@pytest.mark.parametrize("target", WORDS)
@pytest.mark.parametrize("family", MODELS)
def test_targets(family, target):
    rows = [line.split() for line in MODELS[family].strip().splitlines()]
    layers = {f"diffusion_model.{path}.weight": int(axes) for path, axes, _ in rows}
    expected = [key for key, (_, _, word) in zip(layers, rows, strict=True) if WORDS.index(word) <= WORDS.index(target)]
    assert expected and select(layers, target) == expected


def test_every_word_is_tested():
    assert set(TARGETS) == set(WORDS)


def test_norms_inside_attention_are_no_targets():
    """Where a family keeps its norms as layers, neither attention nor transformer means them."""
    norms = ["blocks.0.self_attn.norm_q", "double_blocks.0.img_attn.norm.query_norm", "input_blocks.1.1.norm"]
    layers = {f"diffusion_model.{path}.weight": 0 for path in [*norms, "blocks.0.self_attn.q"]}
    for target in ("attention", "transformer"):
        assert select(layers, target) == ["diffusion_model.blocks.0.self_attn.q.weight"]


@pytest.mark.parametrize(
    ("layers", "example"),
    [({"diffusion_model.conv_in.weight": 2, "diffusion_model.x.weight": 2}, "diffusion_model.conv_in.weight"), ({}, "none")],
    ids=["no-attention", "no-layers"],
)  # fmt: skip
def test_no_match_is_refused(layers, example):
    with pytest.raises(TriLoRAError, match=rf"target='attention' names no layer of this model \({len(layers)} .* {example}\); choose"):
        select(layers, "attention")


def test_an_unknown_word_is_refused():
    with pytest.raises(TriLoRAError, match="target='all': choose one of attention, transformer"):
        select({"a": 0}, "all")
