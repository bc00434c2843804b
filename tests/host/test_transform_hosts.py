"""Transform files on every kind of base and by every way in which the host applies a patch, against the dense formula."""

import json
from typing import NamedTuple

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import comfy.weight_adapter
import pytest
import torch
import torch.nn.functional as F
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.test_transform_files import CONV, LINEAR, generator, kinds, trained
from comfyui_trilora.tests.host.tiny_run import distance
from torch import nn

OUT, INP = 16, 32
CPU = torch.device("cpu")
STRENGTH = 3.0  # far enough from the base that the coarsest rounding cannot hide a missing part
FP8 = torch.float8_e4m3fn
# distance that one rounding of all weights makes: to the nearest for halves, to either neighbour (at random) for fp8
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8, FP8: 2**-4}


class Base(NamedTuple):
    """A model of one layer, W0 as its forward pass uses it, and the dtype in which a changed weight is stored."""

    model: nn.Module
    weight: torch.Tensor
    stored: torch.dtype
    rounds_low_vram: bool = False  # whether the host rounds to the stored dtype when it patches on the fly, too


def one_layer(operations, shape, dtype) -> nn.Module:
    model = nn.Module()
    if len(shape) == 2:
        model.layer = operations.Linear(shape[1], shape[0], dtype=dtype, device=CPU)
    else:
        model.layer = operations.Conv2d(shape[1], shape[0], shape[2:], stride=2, padding=1, dtype=dtype, device=CPU)
    weight = (torch.randn(shape, generator=generator(1)) * 0.2).to(dtype)
    model.layer.weight = nn.Parameter(weight, requires_grad=False)
    model.layer.bias = nn.Parameter(torch.randn(shape[0], generator=generator(2)).to(torch.bfloat16 if dtype == FP8 else dtype), requires_grad=False)
    return model


def cast(dtype):
    """Stored in `dtype`, cast to the activations' dtype in every forward pass."""

    def make(shape):
        model = one_layer(comfy.ops.manual_cast, shape, dtype)
        return Base(model, model.layer.weight.float(), dtype)

    return make


def scaled_fp8(shape):
    """0.3.64's layers of `*_fp8_scaled` checkpoints."""
    model = one_layer(comfy.ops.scaled_fp8_ops(override_dtype=FP8), shape, FP8)
    model.layer.reset_parameters()
    model.layer.scale_weight.data.fill_(0.37)
    return Base(model, model.layer.weight.float() * 0.37, FP8, rounds_low_vram=True)


def quantised_fp8(shape):
    """0.33.0's quantised layers."""
    if not hasattr(comfy.utils, "convert_old_quants"):
        pytest.skip("this host tells quantised layers otherwise than by a tensor beside their weight")
    model = one_layer(comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True), shape, torch.float32)
    weight = (torch.randn(shape, generator=generator(1)) * 50).to(FP8)
    state = {"layer.weight": weight, "layer.bias": model.layer.bias.data, "layer.weight_scale": torch.tensor(0.004)}
    layers = json.dumps({"layers": {"layer": {"format": "float8_e4m3fn", "params": {}}}})
    state, _ = comfy.utils.convert_old_quants(state, metadata={"_quantization_metadata": layers})
    model.load_state_dict(state, strict=False)
    assert isinstance(model.layer.weight, comfy.ops.QuantizedTensor)
    return Base(model, weight.float() * 0.004, FP8)


BASES = {"fp32": cast(torch.float32), "fp16": cast(torch.float16), "bf16": cast(torch.bfloat16), "fp8": cast(FP8)}
if hasattr(comfy.ops, "scaled_fp8_ops"):
    BASES["scaled-fp8"] = scaled_fp8
if hasattr(comfy.ops, "mixed_precision_ops"):
    BASES["quantised-fp8"] = quantised_fp8
SHAPES = {"linear": (OUT, INP), "conv": (OUT, 8, 3, 3)}
CASES = [(base, shape) for base in BASES for shape in SHAPES if shape == "linear" or "-fp8" not in base]  # the host scales linear layers only


@pytest.fixture(scope="module")
def ops(pack_module):
    return {"registry": pack_module("trilora_ops.registry")}


def full(patcher, patch):
    """Merged into the weight, which is stored again in its own dtype."""
    patcher.add_patches({"layer.weight": patch}, STRENGTH)
    patcher.patch_model(CPU)


def low_vram(patcher, patch):
    """The weight as it was; patched in every forward pass."""
    patcher.add_patches({"layer.weight": patch}, STRENGTH)
    patcher.patch_model(CPU, lowvram_model_memory=1)
    assert isinstance(patcher.model.layer.weight_function[0], comfy.model_patcher.LowVramPatch)


def prefetched(patcher, patch):
    """0.33.0: low-VRAM, the adapter's tensors copied beforehand into one buffer of bytes."""
    low_vram(patcher, patch)
    (function,) = patcher.model.layer.weight_function
    size = function.memory_required()
    assert size >= sum(tensor.nbytes for part in patch.weights for _, tensor in part)
    function.prepare(torch.zeros(size, dtype=torch.uint8), None)
    rebuilt = function.prepared_patches[0][1]
    assert type(rebuilt) is type(patch) and rebuilt is not patch and rebuilt.weights[0][0][1].data_ptr() != patch.weights[0][0][1].data_ptr()


def bypass(patcher, patch):
    """0.33.0: the weight as it was; the adapter acts on the activations."""
    manager = comfy.weight_adapter.BypassInjectionManager()
    manager.add_adapter("layer.weight", patch, strength=STRENGTH)
    patcher.set_injections("bypass", manager.create_injections(patcher.model))
    patcher.patch_model(CPU)
    assert manager.get_hook_count() == 1


WAYS = {"full": full, "low-vram": low_vram}
if hasattr(comfy.lora, "prefetch_prepared_value"):
    WAYS["prefetched"] = prefetched
if hasattr(comfy.weight_adapter, "BypassInjectionManager"):
    WAYS["bypass"] = bypass


def apply_layer(layer, x):
    with torch.inference_mode():
        return layer(x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("base", "shape"), CASES)
def test_the_patched_layer_computes_the_dense_formula(ops, base, shape, way):
    """f(x; W0 + s (W0 (T - I) + R)) for every pair, up to one rounding of the weight where the host stores it; then all is undone."""
    names = []
    for name, method in kinds(ops):
        found = BASES[base](SHAPES[shape])
        layer, bias = found.model.layer, found.model.layer.bias.float()
        adapter, tensors = trained(ops, method, found.weight)
        (patch,) = comfy.lora.load_lora(tensors, {"x": "layer.weight"}, log_missing=False).values()
        x = torch.randn((5, INP) if shape == "linear" else (2, 8, 6, 7), generator=generator(3))
        before = apply_layer(layer, x)
        patcher = comfy.model_patcher.ModelPatcher(found.model, CPU, CPU)
        WAYS[way](patcher, patch)
        weight = found.weight + STRENGTH * adapter.delta(found.weight).detach().view(found.weight.shape)
        wanted = F.linear(x, weight, bias) if shape == "linear" else F.conv2d(x, weight, bias, stride=2, padding=1)
        rounded = way == "full" or (found.rounds_low_vram and way == "low-vram")
        limit = ROUNDING[found.stored if rounded else torch.float32]
        assert distance(wanted, before) > 2 * limit, name
        assert distance(apply_layer(layer, x), wanted) <= limit, name
        patcher.unpatch_model(CPU)
        assert torch.equal(apply_layer(layer, x), before), name
        names.append(name)
    assert len(names) >= 12


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_activations_round_no_more_than_their_dtype(ops, way):
    """A bf16 base with bf16 activations: products in fp32 inside, so that the error is the dtype's own."""
    for name, method in kinds(ops):
        found = BASES["bf16"]((OUT, INP))
        adapter, tensors = trained(ops, method, found.weight)
        (patch,) = comfy.lora.load_lora(tensors, {"x": "layer.weight"}, log_missing=False).values()
        patcher = comfy.model_patcher.ModelPatcher(found.model, CPU, CPU)
        WAYS[way](patcher, patch)
        x = torch.randn((7, INP), generator=generator(3)).bfloat16()
        wanted = F.linear(x.float(), found.weight + STRENGTH * adapter.delta(found.weight).detach(), found.model.layer.bias.float())
        y = apply_layer(found.model.layer, x)
        assert y.dtype == torch.bfloat16 and distance(y, wanted) <= 2 * ROUNDING[torch.bfloat16], name
        patcher.unpatch_model(CPU)


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
def test_a_model_of_which_half_is_offloaded(ops, monkeypatch, dtype):
    """A U-Net with some layers merged and some patched on the fly, by core's loader: the output of dense patches on fp32 weights."""
    tiny = tiny_models.eps_prediction_model()
    registry = ops["registry"]
    method = registry.Method(registry.RESIDUALS["tensor_ring"](rank=2), registry.TRANSFORMS["tensor_ring"](2))
    with torch.inference_mode():
        config = tiny.patcher.model.model_config
        config.set_inference_dtype(dtype, torch.float32)
        small = type(tiny.patcher.model)(config, model_type=tiny.patcher.model.model_type, device=CPU)
        small.diffusion_model.load_state_dict(tiny.patcher.model.diffusion_model.state_dict())
        tiny.patcher.model.diffusion_model.load_state_dict({k: v.float() for k, v in small.diffusion_model.state_dict().items()})
    tensors, deltas = {}, {}
    for name in (LINEAR, CONV):
        weight = comfy.utils.get_attr(tiny.patcher.model, f"{name}.weight").float().clone()
        adapter, found = trained(ops, method, weight)
        deltas[f"{name}.weight"] = ("diff", (adapter.delta(weight).detach().view(weight.shape),))
        tensors |= {name + key[1:]: tensor for key, tensor in found.items()}
    latent = torch.randn(tiny.latent_shape, generator=generator(8))
    dense = tiny.patcher.clone()
    dense.add_patches(deltas, STRENGTH)

    with torch.inference_mode():
        wanted = tiny_models.predict(tiny._replace(patcher=dense), latent, 0.9)
        plain = tiny_models.predict(tiny, latent, 0.9)
        patcher = comfy.sd.load_lora_for_models(tiny_models.as_patcher(small), None, tensors, STRENGTH, 0)[0]
        monkeypatch.setattr(comfy.model_management, "load_models_gpu",
                            lambda models: [model.patch_model(CPU, lowvram_model_memory=patcher.model_size() // 2) for model in models])
        found = tiny_models.predict(tiny._replace(patcher=patcher), latent, 0.9)
        offloaded = [m for m in patcher.model.modules() if getattr(m, "weight_function", None)]
        patcher.unpatch_model(CPU)
    assert len(offloaded) == 1, "one of the two layers merged, the other patched on the fly"
    assert distance(plain, wanted) > 1e-2
    assert distance(found, wanted) <= (1e-4 if dtype == torch.float32 else 0.1 * distance(plain, wanted) + 0.02)
