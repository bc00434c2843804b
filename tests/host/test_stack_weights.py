"""A stack's patch on weights of every form: slices of fused ones, half and one-byte precision, low VRAM, padded shapes."""

import comfy.lora
import comfy.model_patcher
import comfy.utils
import pytest
import torch
import torch.nn.functional as F
from comfy.weight_adapter import LoRAAdapter
from comfyui_trilora.tests.host import adapter_files, tiny_models
from comfyui_trilora.tests.host.adapter_files import CONV, KEYS, LINEAR, low_rank, normal
from comfyui_trilora.tests.host.tiny_run import distance

STRENGTHS = (1.0, 0.4, -0.7, 1.6, 0.25, -0.3, 0.8, 0.5, 0.9, 1.2, -0.15, 0.7, 0.6, 0.35)
FUSED = "diffusion_model.double_blocks.0.img_attn.qkv.weight"


@pytest.fixture(scope="module")
def own(pack_module):
    """The pack's modules by name."""
    return {name.rpartition(".")[2]: pack_module(name) for name in
            ("nodes.comfy_patches", "nodes.comfy_stack", "trilora_ops.checkpoint", "trilora_ops.registry", "trilora_ops.files.kinds")}  # fmt: skip


@pytest.fixture(scope="module")
def files(tiny, own):
    """[(patches by target key, strength)] of files of every kind."""
    pytest.importorskip("lycoris")
    kinds = adapter_files.every_kind(tiny.patcher, own["registry"], own["checkpoint"])
    states = [own["checkpoint"].AdapterState(*file) for file in kinds.values()]
    return [(own["comfy_patches"].patches_from_state(state, tiny.patcher, None, "file"), s) for state, s in zip(states, STRENGTHS, strict=True)]


@pytest.fixture(scope="module")
def stacks(own, files):
    """Weight key -> StackPatch of all files."""
    return own["comfy_stack"].stack_patches(files)


def weight_of(tiny, key: str) -> torch.Tensor:
    return comfy.utils.get_attr(tiny.patcher.model, key).detach().float().clone()


def merged(patch, weight: torch.Tensor, strength: float = 1.0, strength_model: float = 1.0, **options) -> torch.Tensor:
    return comfy.lora.calculate_weight([(strength, patch, strength_model, None, None)], weight, "key", **options)


def formula(parts, weight: torch.Tensor) -> torch.Tensor:
    """W + sum of strength * (W_i - W) for (target, patch, strength), W_i by the host at strength 1; fp32 on an own copy."""
    total = torch.zeros_like(weight, dtype=torch.float64)
    for target, patch, strength in parts:
        offset, function = (None, None) if isinstance(target, str) else (*target[1:], None, None)[:2]
        total += strength * (comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, function)], weight.clone(), "key") - weight)
    return weight.double() + total


def of_key(files, key: str) -> list[tuple]:
    """(target, patch, strength) of everything in the files that changes a weight."""
    return [(target, patch, s) for patches, s in files for target, patch in patches.items() if key == (target if isinstance(target, str) else target[0])]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_it_is_written_in_place_and_obeys_the_hosts_strengths(tiny, files, stacks, key, memory):
    """The strength that the host gives multiplies all parts; strength_model scales W before any of them sees it."""
    weight = weight_of(tiny, key)
    if weight.ndim == 4:
        weight = weight.contiguous(memory_format=memory)
    for strength, scale in ((1.0, 1.0), (-0.5, 1.0), (0.3, 0.6)):
        mine = weight.clone(memory_format=torch.preserve_format)
        found = merged(stacks[key], mine, strength, scale)
        wanted = formula([(target, patch, s * strength) for target, patch, s in of_key(files, key)], (scale * weight).contiguous())
        assert found.data_ptr() == mine.data_ptr() and found.stride() == weight.stride()
        assert distance(found - scale * weight, wanted - scale * weight.double()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_less_precise_weights_get_the_fp32_sum_rounded_once(tiny, files, stacks, own, key, dtype):
    weight = weight_of(tiny, key).to(dtype)
    wanted = formula(of_key(files, key), weight.float())
    found = merged(stacks[key], weight.clone(), intermediate_dtype=torch.float32 if dtype.itemsize == 1 else dtype)
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps * wanted.abs().clamp_min(2 * torch.finfo(dtype).smallest_normal)
    assert ((found.double() - wanted).abs() <= 0.5 * step + 1e-6 * wanted.abs().max()).all()

    low_rank_alone = [(patches, s) for patches, s in files if isinstance(patches.get(key), LoRAAdapter) and patches[key].weights[3:5] == (None, None)]
    assert len(low_rank_alone) >= 2
    found = merged(own["comfy_stack"].stack_patches(low_rank_alone)[key], weight.clone(), intermediate_dtype=dtype)
    wanted = formula(of_key(low_rank_alone, key), weight.float())
    assert found.dtype == dtype and distance(found.float(), wanted) <= 0.5 * torch.finfo(dtype).eps
    assert distance(wanted, weight.float()) > 0.1


def test_a_model_of_one_byte_weights(tiny, files, stacks):
    """The host's whole path: to fp32, the stack, stochastic rounding back; as one dense difference makes it, but for its rounding."""
    for key in KEYS:
        results = []
        dense = formula(of_key(files, key), weight_of(tiny, key).to(torch.float8_e4m3fn).float())
        for patch in (stacks[key], ("diff", ((dense - weight_of(tiny, key).to(torch.float8_e4m3fn).double()).float(),))):
            layer = torch.nn.Module()
            layer.weight = torch.nn.Parameter(weight_of(tiny, key).to(torch.float8_e4m3fn), requires_grad=False)
            model = torch.nn.Module()
            model.layer = layer
            patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
            assert patcher.add_patches({"layer.weight": patch}) == ["layer.weight"]
            patcher.patch_weight_to_device("layer.weight", torch.device("cpu"))
            assert model.layer.weight.dtype == torch.float8_e4m3fn
            results.append(model.layer.weight.float())
            patcher.unpatch_model()
            assert torch.equal(model.layer.weight.float(), weight_of(tiny, key).to(torch.float8_e4m3fn).float())
        assert (results[0] != results[1]).float().mean() < 1e-3 and distance(results[0], dense) < 0.1


def test_slices_of_a_fused_weight(host_nodes, own):
    """Flux' q, k and v from files that split them, of several kinds, beside one on the whole weight: on one patch, in any order."""
    tiny = tiny_models.flux_model()
    split = [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    loha = {f"{split[0]}.hada_w1_a": normal(64, 2), f"{split[0]}.hada_w1_b": normal(2, 64), f"{split[0]}.hada_w2_a": 0.1 * normal(64, 2, seed=1),
            f"{split[0]}.hada_w2_b": 0.1 * normal(2, 64, seed=1)}  # fmt: skip
    oft = {f"{split[1]}.oft_blocks": 0.1 * normal(16, 4, 4)}
    ring = own["registry"].Method(transform=own["registry"].TRANSFORMS["tensor_ring"](1))
    adapter = ring.build(torch.nn.Linear(64, 64), weight_of(tiny, FUSED)[128:], torch.Generator().manual_seed(1))
    transform = {f"{split[2]}.transform.{key}": t.detach() + 0.1 * normal(*t.shape) for key, t in adapter.transform.tensors().items()}
    tensors = [
        {k: v for name in split for k, v in low_rank(name, 64, 64, seed=1).items()}, low_rank(split[0], 64, 64, seed=2) | low_rank(split[2], 64, 64, seed=3),
        low_rank(FUSED.removesuffix(".weight"), 192, 64, seed=4), loha, oft, transform, {f"{split[1]}.diff": 0.1 * normal(64, 64)},
    ]  # fmt: skip
    files = [(own["comfy_patches"].patches_from_state(own["checkpoint"].AdapterState(t), tiny.patcher, None, "file"), 0.5 + 0.3 * i) for i, t in enumerate(tensors)]
    weight, parts = weight_of(tiny, FUSED), of_key(files, FUSED)
    assert len(parts) == 10 and {patch.name for _, patch, _ in parts if hasattr(patch, "name")} == {"lora", "trilora_layer", "trilora_transform"}
    wanted = formula(parts, weight)
    for order in (files, files[::-1], files[3:] + files[:3]):
        patcher = tiny.patcher.clone()
        patcher.add_patches(own["comfy_stack"].stack_patches(order))
        ((strength, patch, *_),) = patcher.patches[FUSED]
        found = merged(patch, weight.clone(), strength)
        assert distance(found - weight, wanted - weight) <= 1e-5


def test_a_function_patch_gets_each_delta_by_itself(own):
    """The host turns halves of some weights round as it adds: for low-rank layers, transforms and the host's own kinds."""
    weight, function = normal(32, 24), comfy.utils.swap_scale_shift
    target, patches = ("key", None, function), own["comfy_patches"]
    files = [({target: patches.LowRankPatch(set(), (normal(32, 3), normal(3, 24), 1.5, None, None, None))}, 0.5), ({target: ("diff", (normal(32, 24, seed=3),))}, -0.8),
             ({"key": patches.LowRankPatch(set(), (normal(32, 2), normal(2, 24), None, None, None, None))}, 0.3)]  # fmt: skip
    found = merged(own["comfy_stack"].stack_patches(files)["key"], weight.clone())
    assert distance(found, formula(of_key(files, "key"), weight)) <= 1e-6
    change = 0.5 * 0.5 * normal(32, 3) @ normal(3, 24) - 0.8 * normal(32, 24, seed=3)
    assert distance(found, weight + function(change) + 0.3 * normal(32, 2) @ normal(2, 24)) <= 1e-6


@pytest.mark.parametrize("key", KEYS)
def test_the_host_rebuilds_it_and_the_adapters_in_it(tiny, stacks, key):
    """0.33.0 moves patches to the device by rebuilding them from keys and weights, through every tuple."""
    if not hasattr(comfy.lora, "prefetch_prepared_value"):
        pytest.skip("this host does not move patches")
    size = [0]
    comfy.lora.prefetch_prepared_value(stacks[key], size, None, None, False)
    again = comfy.lora.prefetch_prepared_value(stacks[key], [0], None, None, False)
    assert size[0] > 20_000 and again is not stacks[key]
    for (_, new, *rest), (_, old, *others) in zip(again.weights, stacks[key].weights, strict=True):
        assert type(new) is type(old) and new is not old and rest == others
    weight = weight_of(tiny, key)
    assert torch.equal(merged(again, weight.clone()), merged(stacks[key], weight.clone()))


def test_low_vram_patches_the_weight_as_it_is_used(host_nodes, tiny, files, stacks):
    """The model is loaded without room for its weights; its layers then compute with W' and keep W."""
    patcher = tiny.patcher.clone()
    patcher.add_patches(stacks)
    patcher.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    try:
        for key, x in zip(KEYS, (normal(3, 128), normal(2, 128, 6, 5)), strict=True):
            layer = comfy.utils.get_attr(patcher.model, key.removesuffix(".weight"))
            assert any(isinstance(f, comfy.model_patcher.LowVramPatch) for f in layer.weight_function)
            with torch.inference_mode():
                found = layer(x)
            wanted = formula(of_key(files, key), layer.weight.detach().float().clone()).float()
            bias = None if layer.bias is None else layer.bias.detach().float() + stack_bias(stacks, key)
            assert torch.equal(layer.weight.float(), weight_of(tiny, key))
            expected = F.linear(x, wanted, bias) if x.ndim == 2 else F.conv2d(x, wanted, bias, padding=1)
            assert distance(found, expected) <= 1e-5
    finally:
        patcher.unpatch_model(torch.device("cpu"))


def stack_bias(stacks, key: str):
    """What the stack adds to the bias beside a weight."""
    patch = stacks.get(key.removesuffix("weight") + "bias")
    return 0 if patch is None else sum(s * values[0] for s, (_, values), *_ in patch.weights)


def test_parts_that_give_the_weight_a_larger_shape(own):
    """Control LoRAs of Flux widen the input layer: everything else acts on the weight that came in, in any order."""
    weight, patches = normal(20, 8), own["comfy_patches"].LowRankPatch
    file = {".lora_up.weight": normal(20, 3), ".lora_down.weight": normal(3, 14), ".alpha": torch.tensor(1.5), ".reshape_weight": torch.tensor([20, 14])}
    wide = own["comfy_patches"].LayerPatch.of(own["kinds"].read_layer("x", file).weight)
    parts = [({"key": wide}, 0.5), ({"key": patches(set(), (normal(20, 2), normal(2, 8), 1.0, None, None, None))}, 0.7),
             ({"key": ("diff", (normal(24, 8, seed=2), {"pad_weight": True}))}, 0.2), ({"key": ("diff", (normal(20, 8, seed=3),))}, -0.4)]  # fmt: skip
    wanted = torch.zeros(24, 14)
    wanted[:20, :14] += 0.5 * 0.5 * normal(20, 3) @ normal(3, 14)
    wanted[:20, :8] += weight + 0.7 * 0.5 * normal(20, 2) @ normal(2, 8) - 0.4 * normal(20, 8, seed=3)
    wanted[:, :8] += 0.2 * normal(24, 8, seed=2)
    for order in (parts, parts[::-1], parts[2:] + parts[:2]):
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
            patch = own["comfy_stack"].stack_patches(order)["key"]
            found = merged(patch, weight.to(dtype))
            assert found.shape == (24, 14) and found.dtype == dtype and distance(found.float(), wanted) <= tolerance
            if hasattr(LoRAAdapter, "calculate_shape"):
                assert comfy.lora.calculate_shape([(1.0, patch, 1.0, None, None)], weight, "key") == (24, 14)


def test_only_low_rank_parts_need_no_buffer(own, monkeypatch):
    """One addmm_ into the weight itself: nothing of the weight's size is made."""
    weight = normal(300, 200)
    parts = [({CONV: own["comfy_patches"].LowRankPatch(set(), (normal(300, 4, seed=i).half(), normal(4, 200, seed=i).half(), 2.0, None, None, None))}, 0.1 * i + 0.1) for i in range(5)]
    patch, largest = own["comfy_stack"].stack_patches(parts)[CONV], [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                largest[0] = max(largest[0], result.numel())
            return result

    wanted = formula([(CONV, p[CONV], s) for p, s in parts], weight)
    with Watch():
        found = merged(patch, weight)
    assert found.data_ptr() == weight.data_ptr() and distance(found, wanted) <= 1e-5
    assert 0 < largest[0] <= 300 * 20


def test_strength_zero_makes_no_patch(files, own):
    assert own["comfy_stack"].stack_patches([(patches, 0.0) for patches, _ in files]) == {}
    assert LINEAR + ".weight" in own["comfy_stack"].stack_patches(files)
