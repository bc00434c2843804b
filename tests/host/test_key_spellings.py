"""Files of the right family under every spelling that tools write: read where it is certain, left out where not."""

from types import SimpleNamespace

import comfy.sd
import pytest
import torch
from comfyui_trilora.tests.host import meta_encoders, meta_models, small_families
from comfyui_trilora.tests.host.adapter_files import low_rank, normal
from comfyui_trilora.tests.host.foreign_writers import deltas
from comfyui_trilora.tests.host.small_families import layers_by_name, own_name
from comfyui_trilora.tests.host.tiny_run import distance, run_node

PREFIXES = {
    "bare": lambda path: path,
    "base_model.model.": lambda path: f"base_model.model.{path}",
    "model.diffusion_model.": lambda path: f"model.diffusion_model.{path}",
    "transformer.base_model.model.": lambda path: f"transformer.base_model.model.{path}",
    "unet.": lambda path: f"unet.{path}",
    "pipe.dit.": lambda path: f"pipe.dit.{path}",
    "_orig_mod": lambda path: f"transformer._orig_mod.{path}",
    "lora_transformer_": lambda path: "lora_transformer_" + path.replace(".", "_"),
    "lycoris_": lambda path: "lycoris_" + path.replace(".", "_"),
    "lora_unet__": lambda path: "lora_unet__" + path.replace(".", "_"),
}
# diffusers' names for Wan's layers
WAN = {"self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v", "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q",
       "cross_attn.k": "attn2.to_k", "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}  # fmt: skip


def spelled(tensors, names):
    """A file with every layer under the name that `names` gives it."""
    found = {}
    for key, tensor in tensors.items():
        ending = next(end for end in (".lora_up.weight", ".lora_down.weight", ".alpha") if key.endswith(end))
        found[names(key.removesuffix(ending).removeprefix("diffusion_model.")) + ending] = tensor
    return found


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(a, b) for key in expected for a, b in zip(found[key], expected[key], strict=True))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "wan", "z_image", "auraflow"])
def test_every_spelling_of_the_models_own_names_is_read(host_nodes, read, family):
    """Every matrix of the model under each beginning: the same layers in the same places, and nothing is said."""
    patcher = getattr(small_families, family)()
    file = layers_by_name(patcher, own_name)
    expected, said = read(patcher, file)
    assert len(expected) >= 30 and said == []
    for prefix, names in PREFIXES.items():
        found, said = read(patcher, spelled(file, names))
        assert same(found, expected) and said == [], prefix


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model.", "lycoris_", "lora_transformer_", "lora_unet_"])
def test_diffusers_names_of_wan(host_nodes, read, prefix):
    patcher = small_families.wan()
    own = layers_by_name(patcher, lambda name, target: own_name(name, target) and name.split(".", 3)[-1] in WAN)
    expected, _ = read(patcher, own)
    assert len(expected) == 300

    def diffusers(path):
        block, part = path.split(".")[1], path.split(".", 2)[2]
        name = f"blocks.{block}.{WAN[part]}"
        return prefix + (name.replace(".", "_") if prefix.endswith("_") else name)

    found, said = read(patcher, spelled(own, diffusers))
    assert same(found, expected) and said == []


def test_diffsynths_names_of_wan_with_the_adapters_name_in_them(host_nodes, read, saved):
    """`blocks.0.self_attn.q.lora_A.default.weight`, and what a state dict of PEFT with another adapter's name has."""
    patcher = small_families.wan()
    for name in ("default", "my-style_1"):
        file = {f"blocks.3.self_attn.q.lora_{half}.{name}.weight": normal(*size) for half, size in (("A", (2, 32)), ("B", (32, 2)))}
        (patched, _) = run_node(host_nodes, "TriLoRALoader", model=patcher, lora_name=saved(file), strength_model=1.0)
        ((key, delta),) = deltas(patched, patcher).items()
        assert key == "diffusion_model.blocks.3.self_attn.q.weight" and distance(delta, normal(32, 2) @ normal(2, 32)) <= 1e-6


@pytest.mark.parametrize("spelling", ["lora_unet_layers_3_attention_{}", "base_model.model.layers.3.attention.{}", "transformer.layers.3.attention.{}"])
def test_split_attention_of_z_image(host_nodes, read, spelling):
    """q, k and v of the one weight that the model has for them: musubi's raw names, PEFT's and diffusers'."""
    patcher = small_families.z_image()
    width = patcher.model.state_dict()["diffusion_model.layers.3.attention.out.weight"].shape[0]
    file = {}
    for seed, part in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
        file |= low_rank(spelling.format(part.replace(".", "_") if "_layers" in spelling else part), width, width, seed=seed)
    found, said = read(patcher, file)
    qkv = "diffusion_model.layers.3.attention.qkv.weight"
    assert said == [] and {target if isinstance(target, str) else (target[0], *target[1]) for target in found} == {
        (qkv, 0, 0, width), (qkv, 0, width, width), (qkv, 0, 2 * width, width), "diffusion_model.layers.3.attention.out.weight"}  # fmt: skip


def xlabs(width: int, blocks=(0, 3)) -> dict:
    """XLabs' Flux LoRA on the double blocks alone."""
    file = {}
    for i in blocks:
        for a in "12":
            for part, out in (("qkv", 3 * width), ("proj", width)):
                file |= {f"double_blocks.{i}.processor.{part}_lora{a}.down.weight": normal(2, width, seed=i),
                         f"double_blocks.{i}.processor.{part}_lora{a}.up.weight": normal(out, 2, seed=i)}  # fmt: skip
    return file


@pytest.mark.parametrize("with_model", [False, True])
def test_xlabs_with_double_blocks_only(host_nodes, read, saved, with_model):
    """Read, and saved by Load -> Save with and without MODEL as the same adapter for core's loader."""
    patcher, file = small_families.flux(), xlabs(32)
    name = saved(file)
    (patched, _) = run_node(host_nodes, "TriLoRALoader", model=patcher, lora_name=name, strength_model=1.0)
    found = deltas(patched, patcher)
    parts = {"img_attn.qkv": "qkv_lora1", "img_attn.proj": "proj_lora1", "txt_attn.qkv": "qkv_lora2", "txt_attn.proj": "proj_lora2"}
    wanted = {f"diffusion_model.double_blocks.{i}.{ours}.weight": file[f"double_blocks.{i}.processor.{theirs}.up.weight"]
              @ file[f"double_blocks.{i}.processor.{theirs}.down.weight"] for i in (0, 3) for ours, theirs in parts.items()}  # fmt: skip
    assert found.keys() == wanted.keys() and all(distance(found[key], wanted[key]) <= 1e-5 for key in wanted)
    adapter = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)[0]
    (written,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="xlabs", dtype="fp32", **({"model": patcher} if with_model else {}))
    (patched,) = run_node(host_nodes, "LoraLoaderModelOnly", model=patcher, lora_name=written, strength_model=1.0)
    again = deltas(patched, patcher)
    assert again.keys() == wanted.keys() and all(distance(again[key], wanted[key]) <= 1e-5 for key in wanted)


@pytest.fixture(scope="module")
def encoders(host_nodes):
    """Function: name of meta_encoders.ENCODERS -> its CLIP, without weights."""

    def build(name):
        with torch.inference_mode():
            clip = comfy.sd.CLIP(no_init=True)
            clip.cond_stage_model = meta_encoders.build(meta_encoders.ENCODERS[name])
        return clip

    return build


@pytest.mark.parametrize("spelling", ["text_encoder_2.{}", "base_model.model.text_encoder_2.{}", "lora_te3_{}", "lora_te2_{}", "text_encoders.t5xxl.transformer.{}",
                                      "te2.{}"])  # fmt: skip
def test_t5_of_flux(host_nodes, read, encoders, spelling):
    patcher, clip, path = small_families.flux(), encoders("Flux"), "encoder.block.3.layer.0.SelfAttention.q"
    name = spelling.format(path.replace(".", "_") if spelling.startswith("lora") else path)
    found, said = read(patcher, low_rank(name, 4096, 4096, rank=1), clip)
    assert list(found) == [f"t5xxl.transformer.{path}.weight"] and said == []


def test_clip_l_and_clip_g_are_told_apart_by_their_sizes(host_nodes, read, encoders):
    """Names without a number the host knows; where a size fits none of the encoders, the layer is left out."""
    patcher, clip = small_families.sdxl(), encoders("SDXL")
    for out, inp, encoder in ((3072, 768, "clip_l"), (5120, 1280, "clip_g")):
        found, said = read(patcher, low_rank("base_model.model.text_model.encoder.layers.3.mlp.fc1", out, inp, rank=1), clip)
        assert list(found) == [f"{encoder}.transformer.text_model.encoder.layers.3.mlp.fc1.weight"] and said == []
    with pytest.raises(ValueError, match="none of its layers is for the model, and 1 layer for a text encoder"):
        read(patcher, low_rank("base_model.model.text_model.encoder.layers.3.mlp.fc1", 512, 512), clip)


def test_what_is_not_certain_is_not_done(host_nodes, read):
    """An unknown beginning, a size of another model, two names of one weight: left out, named, never guessed."""
    patcher = small_families.wan()
    good = layers_by_name(patcher, lambda name, target: own_name(name, target) and ".self_attn." in name)
    for file in (low_rank("controlnet.blocks.0.ffn.0", 48, 32), low_rank("transformer.blocks.0.ffn.net.0.proj", 96, 64),
                 low_rank("transformer.blocks.0.ffn.net.0.proj", 48, 32) | low_rank("lycoris_blocks_0_ffn_net_0_proj", 48, 32, seed=5)):  # fmt: skip
        names = {key.removesuffix(".alpha") for key in file if key.endswith(".alpha")}
        found, (text,) = read(patcher, good | file)
        assert found.keys() == {f"{key.removesuffix('.alpha')}.weight" for key in good if key.endswith(".alpha")}
        assert all(name in text for name in names) and "diffusion_model.blocks.0.ffn.0" in text


def test_a_layer_in_place_is_never_given_a_second_name(host_nodes, read):
    patcher = small_families.wan()
    own, other = (low_rank(name, 32, 32, seed=seed) for seed, name in enumerate(("diffusion_model.blocks.0.self_attn.q", "transformer.blocks.0.attn1.to_q")))
    found, (text,) = read(patcher, own | other)
    ((up, _),) = found.values()
    assert torch.equal(up, own["diffusion_model.blocks.0.self_attn.q.lora_up.weight"]) and "transformer.blocks.0.attn1.to_q" in text


# name of a network -> the file's names for some layers, and the weight or the rows (start, count) of it that they are for
DIFFUSERS = {
    "HunyuanVideo": {
        "transformer.transformer_blocks.3.attn.to_k": ("double_blocks.3.img_attn.qkv", 3072, 3072),
        "lora_unet_transformer_blocks_3_attn_add_v_proj": ("double_blocks.3.txt_attn.qkv", 6144, 3072),
        "base_model.model.transformer_blocks.3.ff.net.0.proj": ("double_blocks.3.img_mlp.0",),
        "transformer.single_transformer_blocks.7.proj_mlp": ("single_blocks.7.linear1", 9216, 12288),
        "single_transformer_blocks.7.proj_out": ("single_blocks.7.linear2",),
    },
    "Lumina-Image 2": {
        "transformer.layers.3.attn.to_q": ("layers.3.attention.qkv", 0, 2304),
        "diffusion_model.layers.3.attention.to_k": ("layers.3.attention.qkv", 2304, 768),
        "lycoris_layers_3_attention_to_v": ("layers.3.attention.qkv", 3072, 768), "layers.3.attn.to_out.0": ("layers.3.attention.out",),
    },
    "Cosmos-Predict2 2B": {
        "transformer.transformer_blocks.3.attn1.to_q": ("blocks.3.self_attn.q_proj",), "net.blocks.3.cross_attn.output_proj": ("blocks.3.cross_attn.output_proj",),
        "transformer_blocks.5.attn2.to_out.0": ("blocks.5.cross_attn.output_proj",), "transformer.transformer_blocks.3.ff.net.2": ("blocks.3.mlp.layer2",),
    },
    "Wan I2V": {
        "transformer.blocks.3.attn2.add_k_proj": ("blocks.3.cross_attn.k_img",), "transformer.condition_embedder.text_embedder.linear_1": ("text_embedding.0",),
        "blocks.3.attn2.add_v_proj": ("blocks.3.cross_attn.v_img",), "transformer.condition_embedder.time_proj": ("time_projection.1",),
    },
    "SD3.5 Large": {"lora_unet_transformer_blocks_3_attn_to_q": ("joint_blocks.3.x_block.attn.qkv", 0, 2432), "lora_unet_joint_blocks_3_x_block_mlp_fc1": ("joint_blocks.3.x_block.mlp.fc1",)},
    "Qwen-Image": {"base_model.model.transformer_blocks.3.attn.add_q_proj": ("transformer_blocks.3.attn.add_q_proj",),
                   "lora_transformer_transformer_blocks_3_img_mlp_net_0_proj": ("transformer_blocks.3.img_mlp.net.0.proj",)},
    "LTXV 2B": {"transformer.transformer_blocks.3.attn1.to_out.0": ("transformer_blocks.3.attn1.to_out.0",)},
    "Chroma": {"lora_transformer_single_transformer_blocks_3_attn_to_v": ("single_blocks.3.linear1", 6144, 3072)},
}  # fmt: skip


@pytest.mark.parametrize("network", DIFFUSERS)
def test_names_of_other_programs_on_published_networks(host_nodes, pack_module, network):
    """By name and size on the networks as they are published, without weights."""
    with torch.inference_mode():
        patcher = SimpleNamespace(model=meta_models.build(meta_models.NETWORKS[network]))
    places = pack_module("nodes.comfy_patches").Places.of(patcher, None)
    weights = {key: tuple(tensor.shape) for key, tensor in patcher.model.named_parameters()}
    file, wanted = {}, {}
    for name, (path, *rows) in DIFFUSERS[network].items():
        key = f"diffusion_model.{path}.weight"
        out = rows[1] if rows else weights[key][0]
        file |= {f"{name}.lora_A.weight": torch.empty(2, *weights[key][1:], device="meta"), f"{name}.lora_B.weight": torch.empty(out, 2, device="meta")}
        wanted[name] = (key, (0, *rows)) if rows else key
    diagnosis = pack_module("trilora_ops.key_doctor").examine("a", file, places.spellings, network)
    found = {name: target if isinstance(target, str) else target[:2] for name, target in diagnosis.placed.items()}
    assert found == wanted and diagnosis.notice() == diagnosis.refusal() == ""
