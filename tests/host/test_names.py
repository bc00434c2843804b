"""Other spellings of a file's names: the host's own loader must find the same delta on the same weight under every one."""

from types import SimpleNamespace

import comfy.lora
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.weight_adapter
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.test_nodes_names import LAYOUTS

STYLES = ("peft", "generic", "kohya")
ATTENTION = (".attn1.to_q", ".attn1.to_k", ".attn1.to_v", ".attn1.to_out.0", ".attn2.to_q", ".attn2.to_k", ".attn2.to_v", ".attn2.to_out.0")


def text_encoders(name: str):
    """A CLIP of the family's shape without weights, as far as names need one; None for families without one of these."""
    models = {"SD1.5": comfy.sd1_clip.SD1ClipModel, "SDXL": comfy.sdxl_clip.SDXLClipModel}
    if name not in models:
        return None
    with torch.inference_mode():
        return SimpleNamespace(cond_stage_model=models[name](device="meta", dtype=torch.float32))


@pytest.fixture(scope="module", params=["SD1.5", "SDXL", "SD2", "tiny Flux"])
def layout(request, pack_module):
    """(name, MODEL without weights, CLIP or None)."""
    if request.param == "tiny Flux":
        return request.param, tiny_models.flux_model().patcher, None
    config_name, network, _ = LAYOUTS[request.param]
    with torch.inference_mode():
        config = getattr(comfy.supported_models, config_name)(dict(network))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=torch.device("meta"))
        return request.param, tiny_models.as_patcher(model), text_encoders(request.param)


@pytest.fixture(scope="module")
def ops(pack_module):
    return SimpleNamespace(names=pack_module("nodes.names"), checkpoint=pack_module("trilora_ops.checkpoint"), naming=pack_module("trilora_ops.naming"),
                           error=pack_module("trilora_ops.errors").TriLoRAError, factors=pack_module("trilora_ops.factors"))  # fmt: skip


def hosts_map(model, clip) -> dict:
    """The host's own names, without any of ours."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    return names if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)


def shapes(model, clip) -> dict[str, torch.Size]:
    states = [model.model.state_dict()] + ([clip.cond_stage_model.state_dict()] if clip is not None else [])
    return {key: tensor.shape for state in states for key, tensor in state.items()}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture(scope="module")
def adapter(layout, ops):
    """A file in kohya's names on every matrix and kernel that has a name: U-Net or DiT, its fused slices, text encoders."""
    _, model, clip = layout
    found, spell, tensors = shapes(model, clip), ops.names.Speller(model, clip), {}
    for number, target in enumerate(dict.fromkeys(hosts_map(model, clip).values())):
        key, part = (target, None) if isinstance(target, str) else (target[0], target[1] if len(target) > 1 else None)
        if key not in found or not key.endswith(".weight") or len(found[key]) < 2:
            continue
        shape = list(found[key])
        if part is not None:
            shape[part[0]] = part[2]
        rank = 1 + number % 2
        pair = ops.factors.LowRank(draw(shape[0], rank, seed=number), draw(rank, torch.Size(shape[1:]).numel(), seed=number), 2.0 ** (number % 7 - 8))
        tensors |= ops.checkpoint.FileLayer(pair, tuple(shape[2:])).tensors(spell.name(target, "kohya"))
    return ops.checkpoint.canonical_state(ops.checkpoint.AdapterState(tensors, {"note": "kept"}))


def by_target(state, names) -> dict:
    """Target -> the layer's delta on a random input, from the host's own `load_lora`; every tensor must be used."""
    patches = comfy.lora.load_lora(dict(state), names, log_missing=False)
    loaded = set().union(*(patch.loaded_keys for patch in patches.values()))
    assert loaded >= set(state), sorted(set(state) - loaded)[:5]
    found = {}
    for target, patch in patches.items():
        up, down, alpha, *more = patch.weights
        assert not any(part is not None for part in more)
        up, down = up.flatten(1).double(), down.flatten(1).double()
        found[target] = (1.0 if alpha is None else alpha / down.shape[0]) * up @ (down @ draw(down.shape[1]).double())
    return found


def distance(found, expected) -> float:
    return max(float((found[target] - expected[target]).norm() / expected[target].norm()) for target in expected)


def in_style(ops, state, model, clip, style):
    renamed = ops.names.convert_names(state, model, clip, style)
    return (ops.checkpoint.peft_state if style == "peft" else ops.checkpoint.canonical_state)(renamed)


def test_every_style_is_the_same_adapter(layout, ops, adapter):
    """kohya -> peft -> generic -> kohya: after each step core's loader finds the same delta on every target, and at last the same names."""
    name, model, clip = layout
    names = hosts_map(model, clip)
    expected, state = by_target(adapter, names), adapter
    assert len(expected) >= (30 if name == "tiny Flux" else 250)
    if clip is not None:
        assert any(isinstance(target, str) and target.startswith("clip_") for target in expected)
    if name == "tiny Flux":
        assert sum(isinstance(target, tuple) for target in expected) >= 12
    for style in STYLES:
        state = in_style(ops, state, model, clip, style)
        found = by_target(state, names)
        assert found.keys() == expected.keys() and distance(found, expected) <= 1e-6, style
        assert state.metadata["note"] == "kept"
    assert state.keys() == adapter.keys()


def test_names_of_every_style(layout, ops, adapter):
    """The prefixes that other programs look for, and modules that diffusers has."""
    name, model, clip = layout
    files = {style: in_style(ops, adapter, model, clip, style) for style in STYLES}
    heads = {style: {key.split(".")[0] if style != "kohya" else key[:8] for key in state} for style, state in files.items()}
    if name == "tiny Flux":  # slices keep diffusers' names
        assert heads["peft"] == heads["generic"] == {"diffusion_model", "transformer"}
        assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in files["peft"]
        assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in files["peft"]
        return
    encoders = {"SD1.5": {"text_encoder"}, "SDXL": {"text_encoder", "text_encoder_2"}}.get(name, set())
    # a text projection has no name in diffusers
    assert heads["peft"] - {"text_encoders"} == {"unet"} | encoders
    assert heads["generic"] == {"diffusion_model"} | ({"text_encoders"} if encoders else set())
    assert heads["kohya"] <= {"lora_une", "lora_te_", "lora_te1", "lora_te2", "text_enc"}
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in files["peft"])
    block = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
    assert {f"{block}{part}.lora_B.weight" for part in ATTENTION} <= set(files["peft"])
    assert not any("processor" in key for state in files.values() for key in state)
    if encoders:
        fc = "text_model.encoder.layers.0.mlp.fc1"
        assert f"text_encoder.{fc}.lora_A.weight" in files["peft"]
        te = "lora_te_" if name == "SD1.5" else "lora_te1_"
        assert te + fc.replace(".", "_") + ".alpha" in files["kohya"]
        assert f"text_encoders.clip_l.transformer.{fc}.lora_up.weight" in files["generic"]


def test_what_diffusers_itself_writes_today_is_read_by_the_hosts_loader(layout, ops, adapter):
    """`unet.X.attn1.to_q.lora.down.weight`, and PEFT's `base_model.model.X`; without our class the host leaves attention out."""
    name, model, clip = layout
    if name == "tiny Flux":
        pytest.skip("its names are the host's own")
    names = hosts_map(model, clip)
    file = {key: t for key, t in in_style(ops, adapter, model, clip, "peft").items() if key.startswith("unet.")}
    expected = by_target(file, names)
    todays = {key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): t for key, t in file.items()}
    pefts = {key.replace("unet.", "base_model.model.", 1): t for key, t in file.items()}
    for other in (todays, pefts):
        found = by_target(other, names)
        assert found.keys() == expected.keys() and distance(found, expected) == 0
    with_ours = comfy.weight_adapter.adapters[:]
    try:
        comfy.weight_adapter.adapters[:] = [kind for kind in with_ours if not kind.name.startswith("trilora")]
        without = comfy.lora.load_lora(dict(file), names, log_missing=False)
    finally:
        comfy.weight_adapter.adapters[:] = with_ours
    left_out = {target for target in expected if target not in without}
    assert left_out == {target for target in expected if target.removesuffix(".weight").endswith(ATTENTION)} and left_out and without


def test_a_dreambooth_file_with_alphas_keeps_its_scale(layout, ops, adapter):
    """An alpha beside today's names counts, as it does beside every other name."""
    name, model, clip = layout
    if name == "tiny Flux":
        pytest.skip("its names are the host's own")
    query = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    file = {f"{query}.lora_B.weight": draw(8, 4), f"{query}.lora_A.weight": draw(4, 6), f"{query}.alpha": torch.tensor(1.0)}
    ((target, found),) = by_target(file, hosts_map(model, clip)).items()
    assert target == "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(found, 0.25 * draw(8, 4).double() @ (draw(4, 6).double() @ draw(6).double()))


def test_the_class_is_in_the_hosts_list_once(pack_module):
    own = pack_module("nodes.comfy_diffusers")
    pack_module("nodes.compat").register_adapter(own.DiffusersLoRA)
    assert [kind.name for kind in comfy.weight_adapter.adapters].count(own.DiffusersLoRA.name) == 1


def test_what_has_no_place_is_left_out_and_named(layout, ops, adapter, pack_module):
    """The first five of the layers and what is in the file beside them; the rest is renamed as it is without them."""
    _, model, clip = layout
    strangers = {f"lora_unet_elsewhere_{i}.{end}": draw(3, 3) for i in range(7) for end in ("lora_up.weight", "lora_down.weight")}
    state = ops.checkpoint.AdapterState({**adapter, **strangers, "bundle_emb.sks.clip_l": draw(4, 8)})
    with pack_module("nodes.notices").collected() as said:
        renamed = ops.names.convert_names(state, model, clip, "generic", "a.safetensors")
    assert renamed.keys() == ops.names.convert_names(adapter, model, clip, "generic").keys()
    (text,) = said
    assert text.startswith("a.safetensors: 7 of ") and "no place: lora_unet_elsewhere_0, lora_unet_elsewhere_1" in text
    assert "elsewhere_4 and 2 more" in text and "elsewhere_5" not in text
    assert text.endswith("1 tensor of no layer of the model left out: bundle_emb.sks.clip_l")


def test_a_file_of_which_hardly_a_layer_has_a_place_is_an_error(layout, ops, adapter):
    _, model, clip = layout
    strangers = {f"lora_unet_elsewhere_{i}.{end}": draw(3, 3) for i in range(3000) for end in ("lora_up.weight", "lora_down.weight")}
    with pytest.raises(ops.error, match=r"adapter: only \d+ of its 3\d{3} layers found a place in this model \(lora_unet_elsewhere_0 and 2999 more\); its names are"):
        ops.names.convert_names(ops.checkpoint.AdapterState({**adapter, **strangers}), model, clip, "generic")


def test_two_names_of_one_layer_are_an_error(layout, ops):
    """The host would apply one of them and drop the other."""
    name, model, clip = layout
    key = "double_blocks.0.img_mlp.0" if name == "tiny Flux" else "middle_block.0.in_layers.2"
    names = (f"diffusion_model.{key}", "lora_unet_" + key.replace(".", "_"))
    out, *inp = shapes(model, clip)[f"diffusion_model.{key}.weight"]
    state = ops.checkpoint.AdapterState({f"{n}.{end}": draw(*size) for n in names for end, size in (("lora_up.weight", (out, 2)), ("lora_down.weight", (2, *inp)))})
    with pytest.raises(ops.error, match=f"{names[1]} and {names[0]} are two names of one layer"):
        ops.names.convert_names(state, model, clip, "kohya")


def test_other_kinds_are_renamed_whole(layout, ops):
    """LoHa, differences, biases and transforms under a new name keep their tensors and their endings."""
    name, model, clip = layout
    path = "double_blocks.0.img_mlp.0" if name == "tiny Flux" else "middle_block.0.in_layers.2"
    ends = ("hada_w1_a", "hada_w1_b", "alpha", "dora_scale", "diff_b", "transform.core0", "residual.lora_up")
    out, *inp = shapes(model, clip)[f"diffusion_model.{path}.weight"]
    sizes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, torch.Size(inp).numel())}
    file = {f"lora_unet_{path.replace('.', '_')}.{end}": draw(*sizes.get(end, (2, 2)), seed=i) for i, end in enumerate(ends)}
    renamed = ops.names.convert_names(ops.checkpoint.AdapterState(file), model, clip, "generic")
    assert list(renamed) == [f"diffusion_model.{path}.{end}" for end in ends]
    assert all(torch.equal(a, b) for a, b in zip(renamed.values(), file.values(), strict=True))


def test_the_plan_in_the_metadata_is_renamed_too(layout, ops, adapter):
    import json

    _, model, clip = layout
    layers = ops.checkpoint.split_layers(adapter)[0]
    plan = {layer: found.pair.rank for layer, found in layers.items()}
    state = ops.checkpoint.AdapterState(adapter, {"trilora.plan": json.dumps(plan)})
    renamed = ops.names.convert_names(state, model, clip, "generic")
    found = {layer: part.pair.rank for layer, part in ops.checkpoint.split_layers(renamed)[0].items()}
    assert json.loads(renamed.metadata["trilora.plan"]) == found
    broken = ops.checkpoint.AdapterState(adapter, {"trilora.plan": "no plan"})
    assert ops.names.convert_names(broken, model, clip, "generic").metadata == {"trilora.plan": "no plan"}
