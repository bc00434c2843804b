"""Names in one form, and which of a file's names mean one weight for certain."""

import random
import time

import pytest
import torch
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.key_doctor import examine
from comfyui_trilora.trilora_ops.key_forms import known_forms, renamed
from comfyui_trilora.trilora_ops.key_names import (
    Spellings,
    form,
    grouped,
    is_text,
    names_in,
    parts_of_qkv,
    size_at,
    size_of,
)

WEIGHTS = {"diffusion_model.blocks.0.self_attn.q.weight": (32, 32), "diffusion_model.blocks.0.ffn.0.weight": (48, 32),
           "diffusion_model.blocks.0.attn.qkv.weight": (96, 32), "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (12, 8),
           "clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (20, 16), "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (24, 24)}  # fmt: skip


def spellings(weights=WEIGHTS) -> Spellings:
    return Spellings({key.removesuffix(".weight"): key for key in weights if key.startswith("diffusion_model.")} | parts_of_qkv(weights), weights)


@pytest.mark.parametrize(
    "names",
    [("diffusion_model.blocks.0.self_attn.q", "base_model.model.blocks.0.attn1.to_q", "lora_unet__blocks_0_self_attn_q", "lycoris_blocks_0_attn1_to_q",
      "transformer.blocks.0.attn1.processor.to_q", "model.diffusion_model.blocks.0.self_attn.q_proj", "_orig_mod.blocks.0.self_attn._orig_mod.q"),
     ("diffusion_model.layers.3.attention.out", "transformer.layers.3.attention.to_out.0", "lora_unet_layers_3_attention_to_out_0"),
     ("t.ff.net.0.proj", "t.mlp.fc1", "t.feed_forward.layer1", "t_ffn_0"), ("diffusion_model.b.norm.key_norm", "b.norm.key_norm.scale"),
     ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder.encoder.layers.0.mlp.fc1", "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
      "base_model.model.text_model.encoder.layers.0.mlp.fc1")],
)  # fmt: skip
def test_spellings_of_one_layer_have_one_form(names):
    assert len({form(name) for name in names}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("blocks.0.self_attn.q", "blocks.0.cross_attn.q"), ("blocks.0.self_attn.q", "blocks.1.self_attn.q"), ("blocks.11.attn.q", "blocks.1.1.attn.q"),
     ("blocks.0.ffn.0", "blocks.0.ffn.2"), ("blocks.0.attn.to_q", "blocks.0.attn.add_q_proj"), ("controlnet.blocks.0.ffn.0", "blocks.0.ffn.0"),
     ("single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"), ("input_blocks.1.1.proj_in", "output_blocks.1.1.proj_in")],
)  # fmt: skip
def test_different_layers_have_different_forms(one, other):
    assert form(one) != form(other)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_keys_are_grouped_by_layer_and_the_rest_is_extra():
    """A known name comes before what the ending leaves; of two known ones that which leaves a known ending."""
    tensors = {key: meta(2, 2) for key in ("a.b.lora_up.weight", "a.b.lora_down.weight", "c.to_q_lora.up.weight", "bundle_emb.sks.clip_l", "emb", ".alpha", "x.transform.core0")}
    found, extra = grouped(tensors)
    assert {layer: list(one) for layer, one in found.items()} == {"a.b": [".lora_up.weight", ".lora_down.weight"], "c.to_q": ["_lora.up.weight"], "x": [".transform.core0"]}
    assert extra == ("bundle_emb.sks.clip_l", "emb", ".alpha")
    names = {"a.b": "diffusion_model.blocks.0.ffn.0.weight", "bundle_emb": "diffusion_model.blocks.0.ffn.0.weight", "emb": "diffusion_model.gone.weight"}
    found, extra = grouped(tensors, Spellings(names, WEIGHTS))
    assert list(found["bundle_emb"]) == [".sks.clip_l"] and extra == ("emb", ".alpha")


def test_sizes_are_told_where_the_tensors_tell_them():
    assert size_of("x", {".lora_up.weight": meta(8, 2), ".lora_down.weight": meta(2, 4)}) == (8, 4)
    assert size_of("x", {".lora_B.weight": meta(8, 2, 1, 1), ".lora_A.weight": meta(2, 4, 3, 3)}) == (8, 36)
    assert size_of("x", {".lora_up.weight": meta(8, 2, 1, 1), ".lora_down.weight": meta(2, 4, 1, 1), ".lora_mid.weight": meta(2, 2, 3, 3)}) == (8, 36)
    assert size_of("x", {".diff": meta(8, 4)}) == size_of("x", {".lokr_w1": meta(2, 2), ".lokr_w2": meta(4, 2)}) == (8, 4)
    assert size_of("x", {".set_weight": meta(8)}) == (8, 1)
    for unknown in ({}, {".lora_up.weight": meta(8, 2)}, {".oft_blocks": meta(2, 4, 4)}, {".diff_b": meta(8)}, {".transform.m": meta(8)}):
        assert size_of("x", unknown) is None
    assert size_at(("k", (0, 4, 6)), {"k": (12, 5, 3)}) == (6, 15) and size_at("k", {"k": (12,)}) == (12, 1) and size_at("k", {}) is None


def test_certain_is_one_weight_of_the_right_size_and_no_other_name_for_it():
    found = spellings()
    cases = {
        "transformer.blocks.0.attn1.to_q": ((32, 32), "diffusion_model.blocks.0.self_attn.q.weight"), "blocks.0.ffn.net.0.proj": ((48, 32), "diffusion_model.blocks.0.ffn.0.weight"),
        "lora_unet_blocks_0_attn_to_k": ((32, 32), ("diffusion_model.blocks.0.attn.qkv.weight", (0, 32, 32))),
        "base_model.model.text_model.encoder.layers.0.mlp.fc1": ((20, 16), "clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight"),
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": ((24, 24), "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"),
        "blocks.0.attn1.to_q": (None, "diffusion_model.blocks.0.self_attn.q.weight"),  # of a kind whose own check decides
    }  # fmt: skip
    for name, (size, target) in cases.items():
        assert found.certain({name: size}, set()) == {name: target}, name
        assert found.certain({name: size}, {target}) == {}
    for name, size in (("transformer.blocks.0.attn1.to_q", (64, 32)), ("blocks.1.attn1.to_q", (32, 32)), ("other.blocks.0.attn1.to_q", (32, 32)),
                       ("text_encoder.encoder.layers.0.mlp.fc1", None), ("lora_te_text_model_encoder_layers_0_mlp_fc1", (13, 8)), ("blocks.0.attn.to_k", (30, 32))):  # fmt: skip
        assert found.certain({name: size}, set()) == {}, name
    assert found.certain({"blocks.0.attn1.to_q": (32, 32), "lycoris_blocks_0_attn1_to_q": (32, 32)}, set()) == {}


def test_names_that_the_form_cannot_tell_apart_in_a_model_are_never_used():
    weights = {"diffusion_model.blocks.0.attn.q.weight": (4, 4), "diffusion_model.transformer_blocks.0.attn.to_q.weight": (4, 4)}
    assert spellings(weights).certain({"base_model.model.blocks.0.attn.q": (4, 4)}, set()) == {}


def test_layers_of_one_encoder_go_to_one_encoder():
    """Two layers under one beginning: an encoder that has a place for one of them alone is not theirs."""
    path = "transformer.text_model.encoder.layers.{}.mlp.fc1.weight"
    weights = {f"{part}.{path.format(n)}": (12, 8) for part, count in (("clip_l", 1), ("clip_h", 2)) for n in range(count)}
    names = {f"lora_te3_text_model_encoder_layers_{n}_mlp_fc1": (12, 8) for n in range(2)}
    assert spellings(weights).certain(dict(list(names.items())[:1]), set()) == {}


def test_known_forms_leave_every_other_key_alone():
    keys = ["a.lora_B.bias", "a.lora_A.weight", "a.lora_A.one.weight", "a.lora_B.two.weight", "double_blocks.0.processor.other_lora1.up.weight", "x.alpha"]
    tensors = {key: torch.ones(1) for key in keys}
    assert list(known_forms(tensors)) == keys  # two adapters in one file: whose each is, is not told
    assert list(known_forms({"a.lora_A.one.weight": torch.ones(1), "a.lora_embedding_A.one": torch.ones(1)})) == ["a.lora_A.weight", "a.lora_embedding_A.one"]
    with pytest.raises(TriLoRAError, match="a.lora_A.weight and a.lora_A.default.weight are two names of one tensor"):
        known_forms({"a.lora_A.weight": torch.ones(1), "a.lora_A.default.weight": torch.ones(1)})
    with pytest.raises(TriLoRAError) as refused:
        renamed({"x" * 100_000: torch.ones(1), "y": torch.ones(1)}, {"y": "x" * 100_000})
    assert len(str(refused.value)) < 600


def hostile(seed: int) -> str:
    letters = random.Random(seed)
    pieces = ["a", ".", "_", "..", "__", "lora_", "lora.", "transformer_", ".lora_A.", "1", ".hada_", "text_model.", "base_model.model.", "é", "\n", "blocks_0_", ".oft_"]
    return "".join(letters.choices(pieces, k=letters.choice((5, 60, 40_000)))) + letters.choice(("", ".lora_up.weight", ".alpha", ".lora_A.x.weight"))


def test_any_key_is_read_in_bounded_time_and_repeated_at_bounded_length():
    """100,000 letters in a name, ten thousand dots, 5,000 layers: seconds would be a hang for somebody."""
    weights = {f"diffusion_model.blocks.{block}.self_attn.{part}.weight": (8, 8) for block in range(300) for part in "qkvo"}
    found = Spellings({key.removesuffix(".weight"): key for key in weights}, weights)
    names = ["x." * 50_000 + "lora_up.weight", "_" * 100_000, "1" * 100_000 + ".alpha", ".lora_A" * 14_000, "lora_unet_" * 10_000 + ".lora_up.weight",
             "_1" * 50_000 + ".diff", "transformer." * 9_000 + "diff"] + [hostile(seed) for seed in range(60)]  # fmt: skip
    start = time.process_time()
    for key in names:
        diagnosis = examine("a.safetensors", {key: meta(8, 2), "blocks.0.attn1.to_q.diff": meta(8, 8)}, found, "Model")
        texts = [diagnosis.refusal(), diagnosis.notice(), *diagnosis.report().values()]
        assert max(map(len, texts)) < 3_000 and not any(letter in text for text in texts for letter in "\n\r\0")
    assert time.process_time() - start < 0.05 * len(names)


def test_a_large_file_is_matched_fast():
    """5,000 keys of other names on 3,000 weights, the model's forms made anew."""
    weights = {f"diffusion_model.blocks.{block}.self_attn.{part}{n}.weight": (8, 8) for block in range(150) for part in "qkvo" for n in range(5)}
    file = {key.replace("diffusion_model.", "transformer.").replace("self_attn", "attn1").replace(".weight", end): meta(*shape)
            for key in weights for end, shape in ((".lora_A.weight", (2, 8)), (".lora_B.weight", (8, 2)))}  # fmt: skip
    start = time.process_time()
    diagnosis = examine("a", file, Spellings({key.removesuffix(".weight"): key for key in weights}, weights), "Model")
    assert len(diagnosis.renamed) == 3000 and not diagnosis.notice() and time.process_time() - start < 1.0


def test_names_are_cut_off_at_dots_the_longest_first():
    assert names_in("a.b.c.lora_up.weight", {"a", "a.b", "a.b.c.d"}) == ["a.b", "a"] and names_in("a.b_lora.up.weight", ["a.b"]) == ["a.b"]


def test_text_encoders_are_told_by_name():
    for name in ("lora_te_x", "lora_te2_x", "text_encoder.x", "text_encoder_3.x", "text_encoders.t5.x", "base_model.model.text_model.encoder", "te1.x", "lora_prior_te_x"):
        assert is_text(name), name
    for name in ("text_embedding.0", "text_transformer_blocks.0.x", "lora_unet_text_model", "transformer.text_encoder_proj.0", "texture.0"):
        assert not is_text(name), name
