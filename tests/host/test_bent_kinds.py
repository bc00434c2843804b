"""Kinds that core bends by their strength (OFT, BOFT, whole weights, kinds nobody knows): a straight line from every loader of ours.

Each is a patch of ours, which must do all that the host asks of a patch, on weights of every form. At strength 1 core's own
result is the measure, to fp32's rounding: ours is computed by the table of kinds, not by core.
"""

import comfy.hooks
import comfy.lora
import comfy.model_patcher
import comfy.utils
import pytest
import torch
import torch.nn.functional as F
from comfy.weight_adapter import WeightAdapterBase
from comfyui_trilora.tests.host import adapter_files, tiny_models
from comfyui_trilora.tests.host.adapter_files import CONV, KEYS, LINEAR, normal
from comfyui_trilora.tests.host.foreign_writers import weight_of
from comfyui_trilora.tests.host.tiny_run import distance, run_node

KINDS = ("oft", "boft", "set")


@pytest.fixture(scope="module")
def tensors(host_nodes, tiny):
    """Kind -> a file's tensors for one linear layer and one convolution."""
    pytest.importorskip("lycoris")
    whole = {f"{name}.set_weight": 0.1 * normal(*weight_of(tiny.patcher, f"{name}.weight").shape) for name in (LINEAR, CONV)}
    return {"oft": adapter_files.lycoris(tiny.patcher, "oft"), "boft": adapter_files.lycoris(tiny.patcher, "boft"), "set": whole}


@pytest.fixture(scope="module")
def patches(tiny, tensors, pack_module):
    """Kind -> patches by target key, as our loaders make them."""
    read, state = pack_module("nodes.comfy_patches").patches_from_state, pack_module("trilora_ops.checkpoint").AdapterState
    return {kind: read(state(file), tiny.patcher, None, "file") for kind, file in tensors.items()}


@pytest.fixture(scope="module")
def cores(tiny, tensors):
    """The same as the host's own reader makes them."""
    names = comfy.lora.model_lora_keys_unet(tiny.patcher.model, {})
    return {kind: comfy.lora.load_lora(file, names) for kind, file in tensors.items()}


def merged(patch, weight: torch.Tensor, strength: float = 1.0, offset=None, **options) -> torch.Tensor:
    return comfy.lora.calculate_weight([(strength, patch, 1.0, offset, None)], weight.clone(memory_format=torch.preserve_format), "key", **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_a_straight_line_through_w_and_what_core_makes_of_it(tiny, patches, cores, kind, key, memory):
    """At 1 what core makes, at 0 W's own bits; in place."""
    weight = weight_of(tiny.patcher, key)
    once = merged(cores[kind][key], weight)
    if weight.ndim == 4:
        weight = weight.contiguous(memory_format=memory)
    assert distance(once, weight) > 0.05
    for strength in (0.5, -1.0, 1.7, 0.01):
        found = merged(patches[kind][key], weight, strength)
        assert distance(found - weight, strength * (once - weight)) <= 2e-5 and found.stride() == weight.stride()
    assert distance(merged(patches[kind][key], weight) - weight, once - weight) <= 1e-6 and torch.equal(merged(patches[kind][key], weight, 0.0), weight)
    mine = weight.clone(memory_format=torch.preserve_format)
    assert comfy.lora.calculate_weight([(0.3, patches[kind][key], 1.0, None, None)], mine, key).data_ptr() == mine.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_half_precision_weights_get_the_fp32_line_rounded_once(tiny, patches, cores, kind, dtype, key):
    weight = weight_of(tiny.patcher, key).to(dtype)
    for strength in (1.0, -0.7):
        wanted = torch.lerp(weight.float(), merged(cores[kind][key], weight.float()), strength)
        line = merged(patches[kind][key], weight.float(), strength)
        found = merged(patches[kind][key], weight, strength, intermediate_dtype=dtype)
        assert distance(line - weight, wanted - weight) <= 1e-5
        assert found.dtype == dtype and torch.equal(found, line.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_one_byte_weights(tiny, patches, cores, kind):
    """The host's whole path: to fp32, the patch, stochastic rounding back, and the first weight again afterwards."""
    for key in KEYS:
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(weight_of(tiny.patcher, key).to(torch.float8_e4m3fn), requires_grad=False)
        model = torch.nn.Module()
        model.layer = layer
        before = layer.weight.float()
        patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
        patcher.add_patches({"layer.weight": patches[kind][key]}, 0.5)
        patcher.patch_weight_to_device("layer.weight", torch.device("cpu"))
        wanted = torch.lerp(before, merged(cores[kind][key], before), 0.5)
        assert model.layer.weight.dtype == torch.float8_e4m3fn and distance(model.layer.weight.float(), wanted) < 0.05
        assert distance(model.layer.weight.float() - before, wanted - before) < 0.5
        patcher.unpatch_model()
        assert torch.equal(model.layer.weight.float(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_low_vram_patches_the_weight_as_it_is_used(tiny, patches, cores, kind):
    patcher = tiny.patcher.clone()
    patcher.add_patches(patches[kind], -0.5)
    patcher.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    try:
        for key, x in zip(KEYS, (normal(3, 128), normal(2, 128, 6, 5)), strict=True):
            layer = comfy.utils.get_attr(patcher.model, key.removesuffix(".weight"))
            assert any(isinstance(f, comfy.model_patcher.LowVramPatch) for f in layer.weight_function)
            with torch.inference_mode():
                found = layer(x)
            weight = layer.weight.detach().float()
            weight = torch.lerp(weight, merged(cores[kind][key], weight), -0.5)
            bias = None if layer.bias is None else layer.bias.detach().float()
            assert distance(found, F.linear(x, weight, bias) if x.ndim == 2 else F.conv2d(x, weight, bias, padding=1)) <= 1e-5
    finally:
        patcher.unpatch_model(torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_rebuilds_the_patch_and_what_is_in_it(tiny, patches, kind):
    """0.33.0 moves patches to the device by rebuilding them from keys and weights, through every tuple."""
    if not hasattr(comfy.lora, "prefetch_prepared_value"):
        pytest.skip("this host does not move patches")
    patch, size = patches[kind][KEYS[0]], [0]
    comfy.lora.prefetch_prepared_value(patch, size, None, None, False)
    again = comfy.lora.prefetch_prepared_value(patch, [0], None, None, False)
    assert size[0] > 1000 and again is not patch and [ending for ending, _ in again.weights] == [ending for ending, _ in patch.weights]
    weight = weight_of(tiny.patcher, KEYS[0])
    assert torch.equal(merged(again, weight, 0.6), merged(patch, weight, 0.6))


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_hook_with_a_strength_of_its_own(tiny, patches, cores, kind):
    """The host multiplies the patch's strength by the hook's, whose keyframes change it over time."""
    patcher, hook, group = tiny.patcher.clone(), comfy.hooks.WeightHook(), comfy.hooks.HookGroup()
    group.add(hook)
    hook.hook_keyframe.add(comfy.hooks.HookKeyframe(strength=0.25))
    patcher.add_hook_patches(hook, patches[kind], -2.0)
    combined = patcher.get_combined_hook_patches(group)
    for key in KEYS:
        weight = weight_of(tiny.patcher, key)
        wanted = -0.5 * (merged(cores[kind][key], weight) - weight)
        assert distance(comfy.lora.calculate_weight(combined[key], weight.clone(), key) - weight, wanted) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_tools_see_the_weight_that_sampling_uses(host_nodes, tiny, patches, cores, pack_module, kind):
    """Effective weights, and core's merge of two models, which nests one model's patches in the other's."""
    patcher = tiny.patcher.clone()
    patcher.add_patches(patches[kind], 0.5)
    (half,) = run_node(host_nodes, "ModelMergeSimple", model1=tiny.patcher, model2=patcher, ratio=0.5)
    for key in KEYS:
        weight = weight_of(tiny.patcher, key)
        wanted = 0.5 * (merged(cores[kind][key], weight) - weight)
        effective = pack_module("nodes.effective_weights").EffectiveWeights(patcher)
        assert distance(effective.weight(key) - weight, wanted) <= 1e-5
        with torch.inference_mode():
            assert distance(weight_of(half, key) - weight, 0.5 * wanted) <= 1e-5


def test_a_slice_of_a_fused_weight(host_nodes, pack_module):
    """Flux' q, k and v from files that split them: rotated and replaced on the slice alone."""
    tiny, key = tiny_models.flux_model(), "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    split = [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    file = {f"{split[0]}.oft_blocks": 0.1 * normal(16, 4, 4), f"{split[2]}.set_weight": 0.1 * normal(64, 64)}
    mine = pack_module("nodes.comfy_patches").patches_from_state(pack_module("trilora_ops.checkpoint").AdapterState(file), tiny.patcher, None, "file")
    core = comfy.lora.load_lora(file, comfy.lora.model_lora_keys_unet(tiny.patcher.model, {}))
    weight = weight_of(tiny.patcher, key)
    assert mine.keys() == core.keys() == {(key, (0, 0, 64)), (key, (0, 128, 64))}
    for (_, offset), patch in mine.items():
        once = merged(core[(key, offset)], weight, 1.0, offset)
        found = merged(patch, weight, -0.6, offset)
        assert distance(found - weight, -0.6 * (once - weight)) <= 1e-5
        outside = torch.ones(192, dtype=torch.bool)
        outside[offset[1]:offset[1] + 64] = False
        assert torch.equal(found[outside], weight[outside]) and not torch.equal(found[~outside], weight[~outside])


class Squared(WeightAdapterBase):
    """A kind of another extension: adds strength² times its tensor, and gives the weight two more columns."""

    name = "squared"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_shape(self, key):
        return self.weights[0].shape

    def calculate_weight(self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32, original_weight=None):
        return comfy.lora.pad_tensor_to_shape(weight, self.weights[0].shape) + function(strength**2 * self.weights[0])


def test_a_kind_that_nobody_knows(pack_module):
    """It may do anything with its strength, a new shape and the host's function: what it makes at 1 is taken, on a line from W."""
    weight, wide = normal(6, 5), F.pad(normal(6, 5), (0, 2))
    patch = pack_module("nodes.comfy_stack").linear(("key", None, torch.neg), Squared(set(), (normal(6, 7, seed=1),)))
    found = comfy.lora.calculate_weight([(0.25, patch, 1.0, None, torch.neg)], weight.clone(), "key")
    torch.testing.assert_close(found, wide - 0.25 * normal(6, 7, seed=1))
    if hasattr(WeightAdapterBase, "calculate_shape"):
        assert comfy.lora.calculate_shape([(0.25, patch, 1.0, None, None)], weight, "key") == (6, 7)


def test_nothing_is_put_around_a_patch_of_ours(host_nodes, tiny, pack_module):
    """Every kind of the table is a straight line by itself."""
    pytest.importorskip("lycoris")
    stack = pack_module("nodes.comfy_stack").StackPatch
    kinds = adapter_files.every_kind(tiny.patcher, pack_module("trilora_ops.registry"), pack_module("trilora_ops.checkpoint"))
    for kind, file in kinds.items():
        state = pack_module("trilora_ops.checkpoint").AdapterState(*file)
        found = pack_module("nodes.comfy_patches").patches_from_state(state, tiny.patcher, None, kind)
        assert found and not any(isinstance(patch, stack) for patch in found.values()), kind
