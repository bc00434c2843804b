"""The block registry against every model that the host can build, on the `meta` device."""

import random
import re
from collections import Counter
from typing import NamedTuple

import comfy.supported_models
import comfy.utils
import pytest
import torch
from comfyui_trilora.tests.host import meta_encoders, meta_models
from comfyui_trilora.trilora_ops.block_families import BESIDE, FAMILIES
from comfyui_trilora.trilora_ops.blocks import BASE, KINDS, LAYOUTS, TEXT_GROUPS, Blocks

NETWORKS, ENCODERS = meta_models.NETWORKS, meta_encoders.ENCODERS

# blocks and kinds as people know them, for some models: the registry's own table has no part in these
_UNET = {r"input_blocks\.(\d+)\.": "IN{:02d}", r"middle_block\.(\d)\.": "MID{}", r"output_blocks\.(\d+)\.": "OUT{:02d}", r"(?:time_embed|label_emb)\.": "EMB",
         r"out\.": "FINAL"}  # fmt: skip
_UNET_KINDS = {r"\.attn1\.to_": "attn self", r"\.attn2\.to_": "attn cross", r"\.ff\.net\.": "mlp", r"(?:in|out)_layers\.[23]\.|skip_connection|\.op\.": "conv",
               r"\.proj_(?:in|out)\.": "proj", r"emb_layers": "mod"}  # fmt: skip
BY_HAND = {
    "SD1.5": (_UNET, _UNET_KINDS),
    "SDXL": (_UNET, _UNET_KINDS),
    "Flux.1": ({r"double_blocks\.(\d+)\.": "D{:02d}", r"single_blocks\.(\d+)\.": "S{:02d}", r"(?:img|txt|time|vector|guidance)_in\.": "IN", r"final_layer\.": "FINAL"},
               {r"img_attn\.(?:qkv|proj)": "attn img", r"txt_attn\.(?:qkv|proj)": "attn txt", r"img_mlp": "mlp img", r"txt_mod": "mod txt", r"linear[12]\.": "fused"}),
    "Wan 14B": ({r"blocks\.(\d+)\.": "B{:02d}", r"(?:patch|text|time)_embedding\.|time_projection\.|img_emb\.": "EMB", r"head\.": "FINAL"},
                {r"self_attn\.[qkvo]\.": "attn self", r"cross_attn\.[qkvo]\.": "attn cross", r"\d\.ffn\.[02]\.": "mlp"}),
    "Qwen-Image": ({r"transformer_blocks\.(\d+)\.": "B{:02d}", r"(?:img_in|txt_in|txt_norm|time_text_embed)\.": "EMB", r"(?:norm_out|proj_out)\.": "FINAL"},
                   {r"attn\.to_(?:[qkv]|out)\.": "attn img", r"attn\.add_[qkv]_proj|to_add_out": "attn txt", r"img_mlp": "mlp img", r"txt_mlp": "mlp txt"}),
    "SD3 Medium": ({r"joint_blocks\.(\d+)\.": "J{:02d}", r"(?:[xty]|context)_embedder\.|pos_embed|register": "EMB", r"final_layer\.": "FINAL"},
                   {r"x_block\.attn\.(?:qkv|proj)": "attn img", r"context_block\.attn\.(?:qkv|proj)": "attn txt", r"x_block\.mlp": "img mlp", r"context_block\.mlp": "mlp txt"}),
}  # fmt: skip


class Built(NamedTuple):
    """One of NETWORKS as the host builds it, and its blocks."""

    name: str
    network: meta_models.Network
    model: torch.nn.Module
    keys: list[str]
    blocks: Blocks


@pytest.fixture(scope="module", params=NETWORKS)
def built(request) -> Built:
    network = NETWORKS[request.param]
    try:
        model = meta_models.build(network)
    except meta_models.NotInHost as missing:
        pytest.skip(str(missing))
    keys = keys_of(model)
    return Built(request.param, network, model, keys, Blocks.of(keys))


@pytest.fixture
def known(built) -> Built:
    """The same, of a family that has a table of its own."""
    if built.network.family == "generic":
        pytest.skip("an unknown family: words that mean the same everywhere, and the lists' own names")
    return built


@pytest.fixture(scope="module", params=ENCODERS)
def encoders(request):
    """(name, entry, the host's cond_stage_model)."""
    entry = ENCODERS[request.param]
    try:
        return request.param, entry, meta_encoders.build(entry)
    except (ModuleNotFoundError, AttributeError) as error:
        pytest.skip(f"this host has no such text encoder: {error}")


def keys_of(model) -> list[str]:
    return [key for key in model.state_dict() if key.partition(".")[0] not in BESIDE]


def is_numbered(block: str) -> bool:
    return block[-1].isdigit() and block not in TEXT_GROUPS


def test_every_model_class_of_the_host_is_built():
    known = {network.host_class for network in NETWORKS.values()} | meta_models.WITHOUT.keys()
    missing = {config.__name__ for config in comfy.supported_models.models} - known
    assert missing == set(), "add them to meta_models.NETWORKS, and to the families if people train them"


def test_the_host_takes_it_for_that_model(built):
    assert meta_models.detect(built.model) == (built.network.detected or built.network.host_class)


def test_the_family_is_told_from_the_keys_by_one_family_alone(built):
    assert built.blocks.family == built.network.family
    paths = [re.sub(r"\.\d+(?=\.)", ".#", key).split(".")[1:] for key in built.keys]
    beginnings = {".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)}
    fitting = [family.name for family in FAMILIES if family.has(beginnings)]
    assert fitting == ([] if built.network.family == "generic" else [built.network.family])


def test_every_weight_is_in_exactly_one_block(built):
    assert len(built.keys) > 50
    check_blocks(built.blocks, built.keys)


def test_blocks_and_kinds_are_what_people_call_them(built):
    if built.name not in BY_HAND:
        pytest.skip("not written out by hand")
    ids, kinds = BY_HAND[built.name]
    met = set()
    for key in built.keys:
        path, place = key.removeprefix("diffusion_model."), built.blocks.place(key)
        [(pattern, block)] = [(pattern, block) for pattern, block in ids.items() if re.match(pattern, path)]
        assert place.block == block.format(*map(int, re.match(pattern, path).groups())), key
        assert place.group == re.sub(r"\d+$", "", place.block) and place.name + key[len(place.name) :] == key
        words = [(part, words) for part, words in kinds.items() if place.block[-1].isdigit() and re.search(part, path)]
        assert all(place.kinds == set(wanted.split()) for _, wanted in words), (key, place.kinds, words)
        met |= {pattern, *(part for part, _ in words)}
    assert met == {*ids, *kinds}


def test_a_known_family_has_a_place_for_every_weight(known):
    assert [block for block in known.blocks.ids if block == BASE or "." in block] == []


def test_the_order_of_keys_means_nothing(built):
    assert Blocks.of(random.Random(1).sample(built.keys, len(built.keys))) == built.blocks


def test_a_layer_in_a_block_has_a_kind_and_its_bias_with_it(known):
    check_kinds(known.blocks, known.model, "diffusion_model.")


def test_a_numbered_group_is_as_long_as_the_list_in_the_model(known):
    modules = dict(known.model.diffusion_model.named_modules())
    lengths = Counter()
    for ids, paths in next(family for family in FAMILIES if family.name == known.network.family).places.items():
        for path in paths.split():
            if path.endswith(".#") and path[:-2] in modules:
                lengths[ids.rstrip("#")] = max(lengths[ids.rstrip("#")], len(modules[path[:-2]]))
    lengths = +lengths  # a list may be empty
    assert lengths or known.network.family == "cosmos"  # whose blocks have names, block0, block1, ...
    assert {group: len(known.blocks.groups[group]) for group in lengths} == lengths


def test_a_known_layout_is_what_the_model_has(built):
    if built.name not in LAYOUTS:
        pytest.skip("not among the known layouts")
    layout, elsewhere = Blocks.layout(built.name), set()
    assert layout.family == built.blocks.family
    if built.name == "LTX-2" and not hasattr(built.model.diffusion_model, "video_embeddings_connector"):
        elsewhere = {"VC", "AC"}  # this host has the connectors in the text encoder
    ids = [block for block in layout.ids if block.partition(".")[0] not in TEXT_GROUPS]
    assert tuple(block for block in ids if block.rstrip("0123456789") not in elsewhere) == built.blocks.ids
    assert built.blocks.kinds <= layout.kinds


def test_every_layout_has_a_model_and_text_encoders_to_check_it():
    assert LAYOUTS.keys() <= NETWORKS.keys()
    assert sorted(name for entry in ENCODERS.values() for name in entry.layouts) == sorted(LAYOUTS)


def test_text_encoders_have_their_layers(encoders):
    _, entry, built = encoders
    keys = list(built.state_dict())
    blocks = Blocks.of(keys)
    check_blocks(blocks, keys)
    assert blocks.family == "generic" and blocks.groups.keys() == entry.layers.keys()
    outside = {group: [block for block in ids if not is_numbered(block)] for group, ids in blocks.groups.items()}
    assert {group: len(ids) - len(outside[group]) for group, ids in blocks.groups.items()} == entry.layers
    assert {part for parts in outside.values() for part in parts} == {f"{group}.EMB" for group in entry.layers} | ({"LLM.VIS"} if entry.vision else set())
    check_kinds(blocks, built, "")
    for name in entry.layouts:
        layout = Blocks.layout(name)
        assert {group: ids for group, ids in layout.groups.items() if group in TEXT_GROUPS} == blocks.groups
        assert blocks.kinds <= layout.kinds


def test_a_model_and_its_text_encoders_together(host):
    network, entry = NETWORKS["SDXL"], ENCODERS["SDXL"]
    model, clip = keys_of(meta_models.build(network)), list(meta_encoders.build(entry).state_dict())
    blocks = Blocks.of([*model, *clip])
    assert blocks == Blocks.of([*clip, *model]) and blocks.ids == Blocks.layout("SDXL").ids
    check_blocks(blocks, [*model, *clip])


def test_slices_that_the_host_makes_of_fused_weights(host):
    config = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 24}
    blocks = Blocks.of(keys_of(meta_models.build(NETWORKS["Flux.1"])))
    kinds = {name: blocks.place(target).kinds for name, target in comfy.utils.flux_to_diffusers(config, "diffusion_model.").items()}
    for part in ("to_q", "to_k", "to_v"):
        assert kinds[f"single_transformer_blocks.1.attn.{part}.weight"] == kinds[f"single_transformer_blocks.1.attn.{part}.bias"] == {"attn"}
        assert kinds[f"transformer_blocks.1.attn.{part}.weight"] == {"attn", "img"}
    assert kinds["single_transformer_blocks.1.proj_mlp.weight"] == {"mlp"}
    assert kinds["single_transformer_blocks.1.proj_out.weight"] == {"fused"}
    assert kinds["transformer_blocks.0.attn.add_k_proj.weight"] == {"attn", "txt"}


def check_blocks(blocks: Blocks, keys: list[str]) -> None:
    """The laws of every registry: each key in one of the ids, each id once in one group, ids of a group alike and in order."""
    places = {key: blocks.place(key) for key in keys}
    assert {place.block for place in places.values()} == set(blocks.ids) and len(set(blocks.ids)) == len(blocks.ids)
    assert [block for ids in blocks.groups.values() for block in ids] == list(blocks.ids)
    for place in places.values():
        assert place.block in blocks.groups[place.group] and place.kinds <= blocks.kinds <= KINDS.keys()
    for ids in blocks.groups.values():
        numbered = [block for block in ids if is_numbered(block)]
        assert len({len(block) for block in numbered}) <= 1 and numbered == sorted(numbered)
        if blocks.family != "generic":  # a group of blocks has no holes
            assert [int(re.search(r"\d+$", block)[0]) for block in numbered] == list(range(len(numbered)))


def check_kinds(blocks: Blocks, model: torch.nn.Module, prefix: str) -> None:
    """Every layer of a numbered block has a kind, norms are norms, and a bias is where its weight is."""
    seen = Counter()
    for name, module in model.named_modules():
        if not name.startswith(prefix) or not isinstance(getattr(module, "weight", None), torch.Tensor):
            continue
        place = blocks.place(f"{name}.weight")
        assert isinstance(getattr(module, "bias", None), type(None)) or blocks.place(f"{name}.bias") == place
        if not is_numbered(place.block):
            continue
        is_norm = "Norm" in type(module).__name__
        assert place.kinds and ("norm" in place.kinds) == is_norm, name
        assert is_norm or place.kinds != {"img"} and place.kinds != {"txt"} and place.kinds != {"audio"}, f"{name}: a stream is not what a layer does"
        seen[is_norm] += 1
    assert seen[False] > 20
