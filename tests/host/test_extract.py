"""Extract Adapter in the host: what comes out is the difference of what the host itself computes, for every way to make one."""

import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_trilora.tests.host import adapter_files, tiny_models
from comfyui_trilora.tests.host.adapter_files import CONV, KEYS, LINEAR, low_rank
from comfyui_trilora.tests.host.tiny_run import distance, list_saved_adapters, run_node, weights_hash
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def method(pack_module):
    """Function: kinds of residual and transform with their options -> TRILORA_METHOD."""
    registry = pack_module("trilora_ops.registry")

    def make(residual: str, rank: int = 0, transform: str = "none", **options):
        return registry.Method(registry.RESIDUALS[residual](**({"rank": rank} if rank else {})), registry.TRANSFORMS[transform](**options))

    return make


@pytest.fixture(scope="module")
def saved():
    """Function: tensors -> the name under which the loaders list the file."""
    folder, written = list_saved_adapters(), []

    def save(tensors) -> str:
        file = folder / f"extracted_{len(written)}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        written.append(file)
        return file.name

    yield save
    for file in written:
        file.unlink()


def with_files(host_nodes, patcher, names, strength=1.0):
    """A MODEL after one of the host's own loaders a file."""
    for name in names:
        (patcher,) = run_node(host_nodes, "LoraLoaderModelOnly", model=patcher, lora_name=name, strength_model=strength)
    return patcher


def weight_of(patcher, key: str) -> torch.Tensor:
    """A weight of an unloaded MODEL with all of its patches, in fp32, by the host's own merge."""
    with torch.inference_mode():
        weight = comfy.utils.get_attr(patcher.model, key).float().clone()
        weight = comfy.lora.calculate_weight(patcher.patches.get(key, []), weight, key)
    return weight.clone()


def difference(tuned, base, key: str) -> torch.Tensor:
    return weight_of(tuned, key) - weight_of(base, key)


def applied(pack_module, adapter, patcher):
    """The base with the adapter on it, through the host's own names and patches."""
    return pack_module("nodes.applying").apply_state(adapter, pack_module("nodes.types").StackEntry("the adapter", 1.0, 0.0), patcher, None)[0]


def predict(tiny, patcher, seed=8):
    latent = torch.randn(tiny.latent_shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return tiny_models.predict(tiny._replace(patcher=patcher), latent, 0.9)


def truncated(delta, rank):
    U, sigma, Vt = torch.linalg.svd(delta.double().flatten(1), full_matrices=False)
    return ((U[:, :rank] * sigma[:rank]) @ Vt[:rank]).view(delta.shape)


def test_a_lora_comes_back(host_nodes, pack_module, tiny, saved, method):
    """Core's LoRA on a base: extracted at its rank the error is rounding, and the base with it draws what the tuned model draws."""
    name = saved(low_rank(LINEAR, 128, 128, rank=3) | low_rank(CONV, 128, 128, rank=2, kernel=(3, 3)))
    tuned = with_files(host_nodes, tiny.patcher, [name], 0.8)
    before = weights_hash(tiny.patcher)
    adapter, report = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned, model_base=tiny.patcher, method=method("trilora", 3), target="linear+conv")
    assert adapter.canonical and adapter.metadata["trilora.method"] == "trilora"
    assert {key.rsplit(".", 2)[0] for key in adapter if key.endswith("lora_up.weight")} and len(adapter) == 2 * 3
    again = applied(pack_module, adapter, tiny.patcher)
    for key in KEYS:
        assert distance(difference(again, tiny.patcher, key), difference(tuned, tiny.patcher, key)) <= 1e-4
    wanted = predict(tiny, tuned)
    assert distance(predict(tiny, again), wanted) <= 1e-5 < 1e-3 < distance(predict(tiny, tiny.patcher), wanted)
    assert "0.0000 in all" in report and "nothing: no other weight differs" in report and "not seen" not in report
    assert adapter.metadata["trilora.base_fingerprint"] == pack_module("nodes.comfy_host").ComfyHost(tiny.patcher).fingerprint()
    assert weights_hash(tiny.patcher) == before and tiny.patcher.patches == {}


def test_the_host_reads_what_was_extracted_and_saved(host_nodes, tiny, saved, method):
    """Save Adapter's file of it in core's LoraLoader: the tuned weights again."""
    tuned = with_files(host_nodes, tiny.patcher, [saved(low_rank(LINEAR, 128, 128, seed=4))])
    for kind in (method("lora", 4), method("lora", 4, "tensor_ring")):
        adapter, _ = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned, model_base=tiny.patcher, method=kind)
        name = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="extracted", dtype="fp32")[0]
        again = with_files(host_nodes, tiny.patcher, [name])
        assert list(again.patches) == [KEYS[0]]
        assert distance(difference(again, tiny.patcher, KEYS[0]), difference(tuned, tiny.patcher, KEYS[0])) <= 1e-4


@pytest.mark.parametrize("loaded", [False, True])
def test_any_kinds_become_one_file(host_nodes, pack_module, tiny, saved, method, loaded):
    """A chain of LoHa, LoKr, LoRA and a TLoRA: each layer of the result is the truncated SVD of the dense sum of what they do.

    Also while the tuned model is loaded, its patches merged into the weights that both models share.
    """
    pytest.importorskip("lycoris")
    registry = pack_module("trilora_ops.registry")
    files = [adapter_files.lycoris(tiny.patcher, "loha", 1), adapter_files.lycoris(tiny.patcher, "lokr", 2), low_rank(LINEAR, 128, 128, seed=3),
             adapter_files.transform(tiny.patcher, registry, 4)]
    tuned = with_files(host_nodes, tiny.patcher, [saved(file) for file in files], 0.7)
    wanted = {key: difference(tuned, tiny.patcher, key) for key in KEYS}
    if loaded:
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([tuned], force_full_load=True)
    try:
        adapter, report = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned, model_base=tiny.patcher, method=method("trilora", 6), target="linear+conv")
    finally:
        comfy.model_management.unload_all_models()
    again = applied(pack_module, adapter, tiny.patcher)
    missed, whole = 0.0, 0.0
    for key, delta in wanted.items():
        best = truncated(delta, 6)
        assert distance(difference(again, tiny.patcher, key), best) <= 1e-3
        missed, whole = missed + float((delta - best).square().sum()), whole + float(delta.square().sum())
    assert f"{(missed / whole) ** 0.5:.4f} in all" in report, "the stated error is the dense one"


def test_two_checkpoints(host_nodes, pack_module, method):
    """Every linear layer of another checkpoint: at full rank it becomes that checkpoint, at rank 4 each layer's SVD."""
    base, tuned = tiny_models.eps_prediction_model(), tiny_models.unet_model(tiny_models.comfy.model_base.ModelType.EPS, seed=7)
    adapter, report = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned.patcher, model_base=base.patcher, method=method("lora", 1024), target="everything")
    again = applied(pack_module, adapter, base.patcher)
    keys = [key for key in base.patcher.model.state_dict() if key.startswith("diffusion_model.") and comfy.utils.get_attr(base.patcher.model, key).ndim > 1]
    assert sorted(again.patches) == sorted(keys)
    for key in keys:
        assert distance(weight_of(again, key), weight_of(tuned.patcher, key)) <= 1e-5
    others = [key for key, p in base.patcher.model.named_parameters() if key.startswith("diffusion_model.") and p.ndim == 1]
    assert f"{len(others)} other weights differ" in report
    adapter, report = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned.patcher, model_base=base.patcher, method=method("trilora", 4))
    again = applied(pack_module, adapter, base.patcher)
    for key in again.patches:
        delta = weight_of(tuned.patcher, key) - weight_of(base.patcher, key)
        found = difference(again, base.patcher, key)
        assert distance(found, truncated(delta, 4)) <= 1e-3
    errors = sorted(distance(truncated(d, 4), d) for d in (difference(tuned.patcher, base.patcher, key) for key in again.patches))
    assert f"{errors[-1]:.4f}  diffusion_model" in report or f"{errors[-1]:.4f}  lora_unet" in report


@pytest.mark.parametrize("transform", ["tensor_ring", "diagonal", "block_orthogonal"])
@pytest.mark.parametrize("residual", ["lora", "none"])
def test_transforms_come_back(host_nodes, pack_module, tiny, method, transform, residual):
    """A transform on one layer and nothing elsewhere is found again, and core's merge of the result is the tuned weight."""
    adapters, weight = method(residual, 2 if residual == "lora" else 0, transform), weight_of(tiny.patcher, KEYS[0])
    planted = adapters.build(torch.nn.Linear(128, 128), weight, torch.Generator().manual_seed(1))
    for number, parameter in enumerate(planted.parameters()):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    tuned = tiny.patcher.clone()
    tuned.add_patches({KEYS[0]: ("diff", (planted.delta(weight).detach(),))}, 1.0)
    adapter, report = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned, model_base=tiny.patcher, method=adapters)
    assert adapter.metadata["trilora.form"] == "transform" and f"{len(select_attention(pack_module, tiny)) - 1} of the" in report
    again = applied(pack_module, adapter, tiny.patcher)
    assert distance(difference(again, tiny.patcher, KEYS[0]), difference(tuned, tiny.patcher, KEYS[0])) <= 1e-3


def select_attention(pack_module, tiny):
    host = pack_module("nodes.comfy_host").ComfyHost(tiny.patcher)
    return pack_module("trilora_ops.targets").select(pack_module("training.plan").adaptable(host), "attention")


def test_the_base_may_have_patches_too(host_nodes, pack_module, tiny, saved, method):
    """Only what the tuned model has more: an adapter on both is not extracted."""
    shared, extra = saved(low_rank(LINEAR, 128, 128, seed=1)), saved(low_rank(LINEAR, 128, 128, rank=2, seed=2))
    base = with_files(host_nodes, tiny.patcher, [shared])
    tuned = with_files(host_nodes, base, [extra])
    adapter, _ = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned, model_base=base, method=method("lora", 2))
    again = applied(pack_module, adapter, base)
    assert distance(difference(again, base, KEYS[0]), difference(tuned, base, KEYS[0])) <= 1e-4
    (up,) = [tensor for key, tensor in adapter.items() if key.endswith("lora_up.weight")]
    assert up.shape[1] == 2


def test_what_is_not_in_the_weights_is_said(host_nodes, tiny, saved, method):
    """A bypass loader (newer hosts) changes layers while they run: the report names it, and the rest is extracted."""
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this host has no bypass loader")
    tuned = with_files(host_nodes, tiny.patcher, [saved(low_rank(LINEAR, 128, 128))])
    bypassed = comfy.sd.load_bypass_lora_for_models(tuned, None, low_rank(CONV, 128, 128, kernel=(3, 3)), 1.0, 0)[0]
    adapter, report = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=bypassed, model_base=tiny.patcher, method=method("lora", 2), target="linear+conv")
    assert "not seen" in report and len(adapter) == 3


def test_energy_and_what_lies_outside_the_target(host_nodes, tiny, saved, method):
    name = saved(low_rank(LINEAR, 128, 128, rank=8) | low_rank(CONV, 128, 128, kernel=(3, 3)))
    tuned = with_files(host_nodes, tiny.patcher, [name])
    adapter, report = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned, model_base=tiny.patcher, method=method("lora", 16), target="attention", energy=0.5)
    (up,) = [tensor for key, tensor in adapter.items() if key.endswith("lora_up.weight")]
    sigma = torch.linalg.svdvals(difference(tuned, tiny.patcher, KEYS[0]).double()).square()
    assert up.shape[1] == int((sigma.cumsum(0) < 0.5 * sigma.sum()).sum()) + 1 < 8
    assert "1 other weights differ" in report


def test_no_difference_and_models_that_do_not_match(host_nodes, pack_module, tiny, saved, method):
    """One error with key, got and expected; nothing comes out."""
    error = pack_module("trilora_ops.errors").TriLoRAError
    inputs = {"model_base": tiny.patcher, "method": method("lora", 2)}
    with pytest.raises(error, match="equals model_base in all .* layers"):
        run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tiny.patcher.clone(), **inputs)
    with pytest.raises(error, match="equals model_base"):
        run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=with_files(host_nodes, tiny.patcher, [saved(low_rank(CONV, 128, 128, kernel=(3, 3)))]), **inputs)
    with pytest.raises(error, match=r"diffusion_model\.\S+ is not there, expected \(\d+, \d+\) as in model_base"):
        run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tiny_models.flow_model().patcher, **inputs)
    broken = tiny.patcher.clone()
    broken.add_patches({KEYS[0]: ("diff", (torch.full((128, 128), float("nan")),))}, 1.0)
    with pytest.raises(error, match=f"{KEYS[0]}: the difference holds NaN"):
        run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=broken, **inputs)


def test_a_cancelled_run_stops_at_once(host_nodes, tiny, saved, method):
    tuned = with_files(host_nodes, tiny.patcher, [saved(low_rank(LINEAR, 128, 128))])
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned, model_base=tiny.patcher, method=method("lora", 2))
    comfy.model_management.interrupt_current_processing(False)


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp8", "scaled-fp8", "quantised"])
def test_stored_weights_of_every_kind(pack_module, kind):
    """The weight that is compared is the one the layer multiplies by: cast, scaled, dequantised, with its patches in fp32."""
    with torch.inference_mode():
        layer, wanted = stored_layer(kind)
    patcher = holder(layer)
    delta = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5))
    patcher.add_patches({"diffusion_model.fc.weight": ("diff", (delta,))}, 0.5)
    weights = pack_module("nodes.effective_weights").EffectiveWeights(patcher)
    with torch.inference_mode(False):
        found = weights.weight("diffusion_model.fc.weight")
    assert found.dtype == torch.float32 and not found.is_inference()
    torch.testing.assert_close(found, wanted + 0.5 * delta, rtol=1e-6, atol=1e-6)
    assert weights.shape("diffusion_model.fc.weight") == (48, 32)


def stored_layer(kind: str):
    """(a linear layer of the host with a stored weight of this kind, the fp32 weight that it stands for)."""
    plain = torch.randn(48, 32, generator=torch.Generator().manual_seed(4)) * 0.1
    if kind == "quantised":
        if not hasattr(comfy.ops, "mixed_precision_ops"):
            pytest.skip("this host has no quantised layers")
        return quantised(plain)
    if kind == "scaled-fp8":
        if not hasattr(comfy.ops, "scaled_fp8_ops"):
            pytest.skip("this host has no scaled fp8 layers of the old kind")
        layer = comfy.ops.scaled_fp8_ops(override_dtype=torch.float8_e4m3fn).Linear(32, 48)
        layer.reset_parameters()
        layer.weight = torch.nn.Parameter((plain / 0.3).to(torch.float8_e4m3fn), requires_grad=False)
        layer.scale_weight = torch.nn.Parameter(torch.tensor(0.3), requires_grad=False)
        return layer, (layer.weight.float() * 0.3).clone()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[kind]
    layer = comfy.ops.manual_cast.Linear(32, 48, dtype=dtype)
    layer.weight = torch.nn.Parameter(plain.to(dtype), requires_grad=False)
    return layer, layer.weight.float().clone()


def quantised(plain: torch.Tensor):
    """The host's own fp8 layer with a scale, read from a state dict as from a file."""
    import json

    ops = comfy.ops.mixed_precision_ops({}, compute_dtype=torch.float32)
    layer = ops.Linear(32, 48, bias=False, device="cpu", dtype=torch.float32)
    stored = (plain / 0.01).to(torch.float8_e4m3fn)
    config = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    layer.load_state_dict({"weight": stored, "weight_scale": torch.tensor(0.01), "comfy_quant": config}, strict=False)
    if not isinstance(layer.weight, comfy.ops.QuantizedTensor):
        pytest.skip("this host tells quantised layers otherwise than by a tensor beside their weight")
    return layer, (stored.float() * 0.01).clone()


def holder(layer):
    """A patcher around a model whose denoiser is this one layer."""
    model = torch.nn.Module()
    model.diffusion_model = torch.nn.Module()
    model.diffusion_model.fc = layer
    return tiny_models.as_patcher(model)


def wider_first_layer(tiny, key: str):
    """The model again, with nine input channels, and `key` changed."""
    with torch.inference_mode():
        model_config = type(tiny.patcher.model.model_config)({**tiny.patcher.model.model_config.unet_config, "in_channels": 9})
        model_config.unet_config["num_head_channels"] = 32
        model_config.set_inference_dtype(torch.float32, None)
        model = comfy.model_base.BaseModel(model_config, device=torch.device("cpu"))
        state = {name: value.clone() for name, value in tiny.patcher.model.diffusion_model.state_dict().items()}
        mine = model.diffusion_model.state_dict()
        state = {name: value if value.shape == mine[name].shape else mine[name] for name, value in state.items()}
        state[key.removeprefix("diffusion_model.")] = state[key.removeprefix("diffusion_model.")] + 0.1
        model.diffusion_model.load_state_dict(state)
    return tiny_models.as_patcher(model)


def test_a_first_convolution_of_another_shape_is_left_out_and_named(host_nodes, tiny, method):
    """An inpainting model minus its base: all the rest is extracted."""
    key, first = "diffusion_model.middle_block.1.proj_in.weight", "diffusion_model.input_blocks.0.0.weight"
    tuned = wider_first_layer(tiny, key)
    adapter, report = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned, model_base=tiny.patcher,
                               method=method("lora", 2), target="everything")
    assert [name for name in adapter if ".lora_up" in name] == ["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"]
    (line,) = [line for line in report.splitlines() if line.startswith("notice")]
    assert f"{first} ((64, 9, 3, 3), in model_base (64, 4, 3, 3))" in line and "left out" in line


def test_a_patch_that_widens_the_first_convolution_is_left_out_too(host_nodes, tiny, method, error):
    """As Flux control files do; in a layer inside the blocks it means another model."""
    first, inside = "diffusion_model.input_blocks.0.0.weight", "diffusion_model.middle_block.1.proj_in.weight"
    tuned = tiny.patcher.clone()
    tuned.add_patches({inside: (0.1 * torch.ones(tiny.patcher.model.state_dict()[inside].shape),),
                       first: ("diff", (torch.ones(64, 9, 3, 3), {"pad_weight": True}))}, 1.0)
    adapter, report = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned, model_base=tiny.patcher, method=method("lora", 2), target="everything")
    assert len(adapter) == 3 and f"left out, since its shape differs in the two models: {first}" in report
    broken = tiny.patcher.clone()
    broken.add_patches({inside: ("diff", (torch.ones(128, 200), {"pad_weight": True}))}, 1.0)
    with pytest.raises(error, match="connect two models of one family and size"):
        run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=broken, model_base=tiny.patcher, method=method("lora", 2), target="everything")
