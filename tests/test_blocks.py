"""The block registry's laws, on keys written by hand. Against whole models: tests/host/test_block_registry.py."""

import random
import re

import pytest
from comfyui_trilora.trilora_ops.block_families import FAMILIES, GENERIC, TEXT_ENCODER
from comfyui_trilora.trilora_ops.blocks import KINDS, LAYOUTS, TEXT_GROUPS, Blocks, Place
from comfyui_trilora.trilora_ops.errors import TriLoRAError

M = "diffusion_model."
# one key of every path in a family's table, and what marks the family
SOME = {family.name: [f"{M}{path.replace('#', '0')}.x.weight" for paths in family.places.values() for path in paths.split()]
        + [f"{M}{mark.replace('#', '0')}.weight" for mark in family.marks.split() if not mark.startswith("!")] for family in FAMILIES}  # fmt: skip
UNET = [f"{M}{path}.weight" for path in (
    "time_embed.0", "input_blocks.0.0", *(f"input_blocks.{n}.1.proj_in" for n in range(1, 12)), "middle_block.0.in_layers.2",
    "middle_block.1.transformer_blocks.0.attn2.to_k", *(f"output_blocks.{n}.0.in_layers.0" for n in range(12)), "out.2")]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_table_is_sound(family):
    """Groups and paths are once there, words are of KINDS, a list with numbers has its # in both."""
    paths = [path for paths in family.places.values() for path in paths.split()]
    assert len(set(paths)) == len(paths) and len({ids.rstrip("#") for ids in family.places}) == len(family.places)
    assert all(("#" in ids) == ("#" in path) for ids, paths in family.places.items() for path in paths.split())
    assert {word for words in family.kinds.values() for word in words.split()} <= KINDS.keys()
    assert not {ids.rstrip("#") for ids in family.places} & {*TEXT_GROUPS, "TE"}
    assert family.marks and Blocks.of(SOME[family.name]).family == family.name


def test_names_of_families_and_words_are_once_there():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) and len(FAMILIES) >= 20
    for table in (GENERIC, TEXT_ENCODER):
        assert {word for words in table.kinds.values() for word in words.split()} <= KINDS.keys()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_one_family_alone_fits_a_model(family):
    keys = SOME[family.name]
    beginnings = {".".join(path[:depth]) for key in keys for path in [re.sub(r"\.\d+(?=\.)", ".#", key).split(".")[1:]] for depth in range(1, 9)}
    assert [other.name for other in FAMILIES if other.has(beginnings)] == [family.name]


def test_the_longest_path_wins_whatever_the_order():
    """A list inside a part that has a place of its own; a list's name that ends like another's; 1 and 10."""
    wan = Blocks.of(SOME["wan"])
    assert [wan.place(f"{M}{path}.weight").block for path in ("face_adapter.fuser_blocks.3.linear2", "face_adapter.x", "vace_blocks.0.ffn.0", "blocks.0.ffn.0")] \
        == ["FACE3", "EMB", "V00", "B00"]  # fmt: skip
    hunyuan = Blocks.of(SOME["hunyuan_video"])
    assert hunyuan.place(f"{M}txt_in.individual_token_refiner.blocks.1.mlp.0.weight").block == "R1"
    assert hunyuan.place(f"{M}txt_in.input_embedder.weight").block == "IN"
    unet = Blocks.of(UNET)
    assert [unet.place(f"{M}input_blocks.{n}.1.proj_in.weight").block for n in (1, 10, 11)] == ["IN01", "IN10", "IN11"]


def test_unet():
    blocks = Blocks.of(UNET)
    assert blocks.family == "unet" and list(blocks.groups) == ["EMB", "IN", "MID", "OUT", "FINAL"] and blocks.groups["MID"] == ("MID0", "MID1")
    assert blocks.ids == ("EMB", *(f"IN{n:02d}" for n in range(12)), "MID0", "MID1", *(f"OUT{n:02d}" for n in range(12)), "FINAL")
    key = f"{M}middle_block.1.transformer_blocks.0.attn2.to_k"
    assert blocks.place(f"{key}.weight") == Place("MID1", "MID", frozenset({"attn", "cross"}), key)
    kinds = {path: blocks.place(f"{M}{path}.weight").kinds for path in (
        "input_blocks.0.0", "input_blocks.3.0.op", "input_blocks.1.0.in_layers.0", "input_blocks.1.0.in_layers.2", "input_blocks.1.0.emb_layers.1",
        "output_blocks.2.1.conv", "output_blocks.2.1.norm", "output_blocks.2.1.proj_in", "output_blocks.2.1.transformer_blocks.0.norm2",
        "output_blocks.2.1.transformer_blocks.0.ff.net.0.proj", "output_blocks.2.1.transformer_blocks.0.attn1.to_out.0", "time_embed.2")}  # fmt: skip
    assert [" ".join(sorted(words)) for words in kinds.values()] == ["conv", "conv", "norm", "conv", "mod", "conv", "norm", "proj", "norm", "mlp", "attn self", "emb"]


def test_a_bias_is_where_its_weight_is():
    blocks = Blocks.of(UNET)
    for path in ("input_blocks.1.0.in_layers.2", "out.0", "time_embed.0", "middle_block.1.proj_in"):
        assert blocks.place(f"{M}{path}.bias") == blocks.place(f"{M}{path}.weight")
    assert blocks.place("clip_l.transformer.text_model.encoder.layers.7.mlp.fc1.bias").block == "TE1.07"


def test_context_in_a_name_is_no_text_encoder():
    """Routing by the words "text" and "encoder" took half of SD3's weights for the CLIP's."""
    sd3 = Blocks.of(SOME["sd3"])
    place = sd3.place(f"{M}joint_blocks.17.context_block.attn.qkv.weight")
    assert (place.block, place.kinds) == ("J17", {"attn", "txt"})
    assert sd3.place(f"{M}context_embedder.weight").block == "EMB"
    assert Blocks.of(SOME["lumina2"]).place(f"{M}context_refiner.1.attention.qkv.weight").block == "CR1"
    assert Blocks.of(SOME["wan"]).place(f"{M}text_embedding.0.weight").block == "EMB"
    assert sd3.place("qwen3_4b.transformer.model.layers.5.mlp.up_proj.weight").block == "LLM.05"


@pytest.mark.parametrize(("joint", "kinds"), [("x_block.attn2.qkv", "attn img self"), ("x_block.mlp.fc1", "img mlp"), ("context_block.adaLN_modulation.1", "mod txt"),
                                              ("x_block.attn.ln_q", "attn img norm")])  # fmt: skip
def test_streams_of_sd3(joint, kinds):
    assert " ".join(sorted(Blocks.of(SOME["sd3"]).place(f"{M}joint_blocks.0.{joint}.weight").kinds)) == kinds


def test_streams_of_others():
    for family, path, kinds in [
        ("flux", "double_blocks.0.img_attn.norm.key_norm", "attn img norm"), ("flux", "double_stream_modulation_txt.lin", "mod txt"),
        ("qwen_image", "transformer_blocks.9.attn.add_k_proj", "attn txt"), ("qwen_image", "transformer_blocks.9.attn.to_out.0", "attn img"),
        ("wan", "blocks.1.cross_attn.k_img", "attn cross img"), ("wan", "blocks.1.cross_attn.q", "attn cross"), ("wan", "blocks.1.ffn.2", "mlp"),
        ("ltx", "transformer_blocks.1.attn1.to_q", "attn self video"), ("ltx", "transformer_blocks.1.audio_attn2.to_q", "attn audio cross"),
        ("ltx", "transformer_blocks.1.audio_to_video_attn.to_q", "a2v attn cross"), ("ltx", "audio_embeddings_connector.transformer_1d_blocks.0.attn1.to_q", "attn audio self"),
        ("cosmos2", "blocks.3.adaln_modulation_cross_attn.1", "mod"), ("auraflow", "double_layers.0.attn.w1q", "attn txt"), ("auraflow", "single_layers.0.attn.w1q", "attn"),
        ("hidream", "double_stream_blocks.0.block.attn1.to_q", "attn img"), ("hidream", "double_stream_blocks.0.block.attn1.to_q_t", "attn txt"),
        ("hidream", "single_stream_blocks.0.block.attn1.to_q", "attn"), ("omnigen2", "layers.0.norm1.linear", "mod"), ("omnigen2", "layers.0.norm1.norm", "norm"),
    ]:  # fmt: skip
        assert " ".join(sorted(Blocks.of(SOME[family]).place(f"{M}{path}.weight").kinds)) == kinds, path


@pytest.mark.parametrize("h", [3, 8, 3072])
def test_a_fused_weight_is_neither_attention_nor_feed_forward_but_its_slices_are(h):
    """Rows of a single block's linear1: q, k, v of h each, then 4 h of the feed-forward."""
    key = f"{M}single_blocks.20.linear1.weight"
    flux = Blocks.of([*SOME["flux"], key])
    for start, length, kind in [(0, h, "attn"), (h, h, "attn"), (2 * h, h, "attn"), (0, 3 * h, "attn"), *((3 * h, m * h, "mlp") for m in (1, 2, 4, 6, 8))]:
        assert flux.place((key, (0, start, length))) == Place("S20", "S", frozenset({kind}), key.removesuffix(".weight"))
        assert flux.place((key, (0, start, length), abs)).kinds == {kind}
    for whole in (key, (key, None), (key, None, abs), f"{M}single_blocks.20.linear2.weight"):
        assert flux.place(whole).kinds == {"fused"}
    assert {"attn", "mlp", "fused"} <= flux.kinds
    slice_of_one_kind = (f"{M}double_blocks.3.txt_attn.qkv.weight", (0, h, h))
    assert flux.place(slice_of_one_kind) == flux.place(slice_of_one_kind[0])


def test_text_encoders():
    keys = [f"{part}.{path}.weight" for part, path in (
        ("clip_l", "transformer.text_model.encoder.layers.11.self_attn.q_proj"), ("clip_g", "transformer.text_model.encoder.layers.31.mlp.fc1"),
        ("clip_h", "transformer.text_model.encoder.layers.23.layer_norm1"), ("t5xxl", "transformer.encoder.block.5.layer.0.SelfAttention.q"),
        ("umt5xxl", "transformer.encoder.block.5.layer.1.DenseReluDense.wi_0"), ("qwen25_7b", "transformer.model.layers.27.mlp.up_proj"),
        ("qwen25_7b", "transformer.visual.blocks.3.attn.qkv"), ("clip_l", "transformer.text_model.embeddings.token_embedding"),
        ("t5xxl", "transformer.shared"), ("gemma2_2b", "transformer.model.norm"))]  # fmt: skip
    alone = [Blocks.of([key]) for key in keys]
    places = [blocks.place(key) for blocks, key in zip(alone, keys, strict=True)]
    assert [place.block for place in places] == ["TE1.11", "TE2.31", "TE1.23", "T5.05", "T5.05", "LLM.27", "LLM.VIS", "TE1.EMB", "T5.EMB", "LLM.EMB"]
    assert [" ".join(sorted(place.kinds)) for place in places] == ["attn self", "mlp", "norm", "attn self", "mlp", "mlp", "img", "emb", "emb", "norm"]
    assert all(blocks.ids == (place.block,) and blocks.groups == {place.group: (place.block,)} for blocks, place in zip(alone, places, strict=True))


def test_two_text_encoders_of_one_group_are_told_apart():
    small, large = ("qwen3_06b.transformer.model.layers.1.mlp.up_proj.weight", "qwen3_2b.transformer.model.layers.0.mlp.up_proj.weight")
    for keys in ([small, large], [large, small]):
        blocks = Blocks.of(keys)
        assert blocks.ids == ("LLM.01", "LLM2.00") and blocks.place(small).block == "LLM.01" and blocks.place(large).group == "LLM2"


def test_parts_beside_the_denoiser_are_no_blocks():
    blocks = Blocks.of([*UNET, "model_sampling.sigmas", "noise_augmentor.betas"])
    assert blocks == Blocks.of(UNET) and blocks.place("model_sampling.sigmas").block == "BASE"


def test_an_unknown_family_is_addressed_by_its_own_lists():
    """The first numbered list of modules in a path; a number before the weight's own name counts layers, not blocks."""
    keys = [f"{M}{path}.weight" for path in ("towers.left.layers.0.attn.q", "towers.left.layers.11.mlp.0", "joined.2.3.norm", "embed.0", "head")]
    blocks = Blocks.of(keys)
    assert blocks.family == "generic" and blocks.groups == {"BASE": ("BASE",), "joined": ("joined.02",), "towers.left.layers": ("towers.left.layers.00", "towers.left.layers.11")}
    assert [blocks.place(key).block for key in keys] == ["towers.left.layers.00", "towers.left.layers.11", "joined.02", "BASE", "BASE"]
    assert [blocks.place(key).kinds for key in keys[:3]] == [{"attn"}, {"mlp"}, {"norm"}]


def test_a_part_that_a_known_family_has_not_had_yet_gets_its_lists_name():
    blocks = Blocks.of([*SOME["wan"], f"{M}new_adapter.blocks.3.proj.weight", f"{M}new_thing.weight"])
    assert blocks.family == "wan" and blocks.ids[-2:] == ("BASE", "new_adapter.blocks.03")


@pytest.mark.parametrize("seed", range(3))
def test_keys_in_any_order(seed):
    keys = [*UNET, *(f"clip_l.transformer.text_model.encoder.layers.{n}.mlp.fc1.weight" for n in range(12))]
    assert Blocks.of(random.Random(seed).sample(keys, len(keys))) == Blocks.of(keys)
    assert Blocks.of(keys).ids[:12] == tuple(f"TE1.{n:02d}" for n in range(12))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    blocks, layout = Blocks.layout(name), LAYOUTS[name]
    family = next(family for family in FAMILIES if family.name == layout.family)
    assert layout.blocks.keys() <= {ids.rstrip("#") for ids in family.places} and layout.encoders.keys() <= set(TEXT_GROUPS)
    assert blocks.family == layout.family and len(set(blocks.ids)) == len(blocks.ids)
    counts = {group: len(ids) for group, ids in blocks.groups.items()}
    assert counts == layout.blocks | {group: n + 1 + (layout.vision and group == "LLM") for group, n in layout.encoders.items()}
    assert list(blocks.groups) == sorted(layout.encoders, key=TEXT_GROUPS.index) + list(layout.blocks), "in the order in which the model runs"
    assert blocks.place(f"{M}nothing").block == "BASE" and blocks.kinds <= KINDS.keys()


def test_layouts_of_people_who_know_them():
    assert [len(Blocks.layout(name).groups[group]) for name, group in (("SD1.5", "IN"), ("SDXL", "OUT"), ("Flux.1", "D"), ("Flux.1", "S"), ("Qwen-Image", "B"))] \
        == [12, 9, 19, 38, 60]  # fmt: skip
    assert Blocks.layout("SD1.5").ids[-3:] == ("OUT10", "OUT11", "FINAL") and Blocks.layout("SDXL").groups["MID"] == ("MID0", "MID1", "MID2")


def test_an_unknown_layout_says_which_there_are():
    with pytest.raises(TriLoRAError, match=r"layout='SD9'.*SD1\.5.*Flux\.1"):
        Blocks.layout("SD9")
