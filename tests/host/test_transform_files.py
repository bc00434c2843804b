"""Files with transforms in the host: every loader loads them, and the merged weight is W + strength (W0 (T - I) + R)."""

import comfy.lora
import comfy.sd
import comfy.utils
import comfy.weight_adapter
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import distance

LINEAR = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
CONV = "diffusion_model.middle_block.0.in_layers.2"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def ops(pack_module):
    return {name: pack_module(f"trilora_ops.{name}") for name in ("registry", "adapter", "errors", "checkpoint")}


@pytest.fixture(scope="module")
def own(pack_module):
    return pack_module("nodes.comfy_transforms")


def kinds(ops):
    """Name -> method, every registered transform beside every registered residual, with default options but small ranks."""
    registry = ops["registry"]
    for t, transform in registry.TRANSFORMS.items():
        for r, residual in registry.RESIDUALS.items():
            if t != "none":
                yield f"{t}+{r}", registry.Method(residual(rank=3) if r != "none" else residual(), transform())


def trained(ops, method, weight, seed=1):
    """(adapter, its file tensors for the layer `x`) on a weight's shape, every parameter moved."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0]) if weight.ndim == 2 else torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:])
    adapter = method.build(module, weight.float(), generator(seed))
    for p in adapter.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator(seed + 1))
    parts = {"transform": adapter.transform.tensors(), "residual": adapter.residual.tensors()}
    return adapter, {f"x.{part}.{name}": t for part, found in parts.items() for name, t in found.items()}


def loaded(tensors):
    """What the host's own `load_lora` makes of the file's layer."""
    patches = comfy.lora.load_lora(tensors, {"x": "key"}, log_missing=False)
    assert list(patches) == ["key"]
    return patches["key"]


def merged(patch, weight, strength=1.0, strength_model=1.0, offset=None, function=None, **options):
    return comfy.lora.calculate_weight([(strength, patch, strength_model, offset, function)], weight, "key", **options)


@pytest.mark.parametrize("shape", [(10, 24), (24, 10), (6, 8, 3, 3)], ids=str)
@pytest.mark.parametrize("strength", [-0.7, 0.0, 0.5, 1.0])
def test_the_hosts_merge_is_the_dense_formula(ops, own, shape, strength):
    """Linear in the strength, for every kind; the host's own reader finds the class in its list."""
    weight = torch.randn(shape, generator=generator(3))
    names = []
    for name, method in kinds(ops):
        adapter, tensors = trained(ops, method, weight)
        patch = loaded(tensors)
        assert isinstance(patch, own.TransformPatch)
        wanted = weight + strength * adapter.delta(weight).detach().view(shape)
        assert distance(merged(patch, weight.clone(), strength), wanted) <= 1e-5, name
        names.append(name)
    assert len(names) >= 9


def test_the_class_is_in_the_hosts_list_once(pack_module, own):
    pack_module("nodes.compat").register_adapter(own.TransformPatch)
    assert [a.name for a in comfy.weight_adapter.adapters].count(own.TransformPatch.name) == 1


def test_the_host_rebuilds_it_from_keys_and_weights(ops, own):
    """0.33.0 moves an adapter by `type(value)(value.loaded_keys, tuple of moved tensors)`, tuple within tuple."""
    weight = torch.randn(10, 24, generator=generator(3))
    _, tensors = trained(ops, next(iter(kinds(ops)))[1], weight)
    patch = loaded(tensors)
    if hasattr(comfy.lora, "prefetch_prepared_value"):
        again = comfy.lora.prefetch_prepared_value(patch, [0], None, None, False)
    else:
        again = type(patch)(patch.loaded_keys, tuple(tuple(part) for part in patch.weights))
    assert again is not patch and torch.equal(merged(again, weight.clone()), merged(patch, weight.clone()))
    assert patch.loaded_keys >= set(tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_weights_and_half_intermediates(ops, dtype):
    """Products run in fp32 whatever the intermediate dtype: the result is the fp32 one, rounded once."""
    weight = torch.randn(10, 24, generator=generator(3)).to(dtype)
    for name, method in kinds(ops):
        adapter, tensors = trained(ops, method, weight)
        exact = weight.float() + 0.8 * adapter.delta(weight).detach()
        found = merged(loaded(tensors), weight.clone(), 0.8, intermediate_dtype=dtype)
        half_a_step = exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
        assert found.dtype == dtype and torch.all((found.float() - exact).abs() <= 1.001 * half_a_step), name


def test_slices_functions_model_strength_and_memory_order(ops):
    """Split q/k/v targets are written through, `function` patches turn R, channels_last weights stay so."""
    for name, method in kinds(ops):
        fused = torch.randn(30, 24, generator=generator(4))
        adapter, tensors = trained(ops, method, fused[10:20])
        found = merged(loaded(tensors), fused.clone(), offset=(0, 10, 10))
        wanted = fused.clone()
        wanted[10:20] += adapter.delta(fused[10:20]).detach()
        assert distance(found, wanted) <= 1e-5 and torch.equal(found[:10], fused[:10]) and torch.equal(found[20:], fused[20:]), name

        weight = torch.randn(10, 24, generator=generator(5))
        adapter, tensors = trained(ops, method, weight)
        # the file's rows stand the other way round: so does R; T only mixes columns
        R = adapter.residual.delta().detach()
        wanted = weight + adapter.transform.delta(weight).detach() + (comfy.utils.swap_scale_shift(R) if R.ndim else R)
        assert distance(merged(loaded(tensors), weight.clone(), function=comfy.utils.swap_scale_shift), wanted) <= 1e-5
        assert distance(merged(loaded(tensors), weight.clone(), strength_model=0.6), 0.6 * weight + adapter.delta(0.6 * weight).detach()) <= 1e-5

        kernel = torch.randn(6, 8, 3, 3, generator=generator(6))
        adapter, tensors = trained(ops, method, kernel)
        last = kernel.clone(memory_format=torch.channels_last)
        found = merged(loaded(tensors), last)
        assert distance(found, kernel + adapter.delta(kernel).detach().view(kernel.shape)) <= 1e-5
        assert found.is_contiguous(memory_format=torch.channels_last), name


@pytest.fixture(scope="module")
def file(ops, tiny):
    """(file tensors, {key: dense delta}) of a TLoRA on a linear layer and a convolution of a real model of the host."""
    registry = ops["registry"]
    method = registry.Method(registry.RESIDUALS["tensor_ring"](rank=2), registry.TRANSFORMS["tensor_ring"](2))
    tensors, deltas = {}, {}
    for name in (LINEAR, CONV):
        weight = comfy.utils.get_attr(tiny.patcher.model, f"{name}.weight").float().clone()
        adapter, found = trained(ops, method, weight)
        deltas[f"{name}.weight"] = ("diff", (adapter.delta(weight).detach().view(weight.shape),))
        tensors |= {name + key[1:]: tensor for key, tensor in found.items()}
    return tensors, deltas


def outputs(tiny, patcher):
    latent = torch.randn(tiny.latent_shape, generator=generator(8))
    with torch.inference_mode():
        return tiny_models.predict(tiny._replace(patcher=patcher), latent, 0.9)


@pytest.mark.parametrize("inference", [False, True], ids=["normal", "inference"])
def test_bypass_has_a_gradient(ops, inference):
    """A model with a bypassed file on it can be trained: dL/dx is that of the merged layer (0.33.0 sets the attributes)."""
    weight = torch.randn(10, 24, generator=generator(3))
    for name, method in kinds(ops):
        adapter, tensors = trained(ops, method, weight)
        with torch.inference_mode(inference):
            patch = loaded({key: tensor.clone() for key, tensor in tensors.items()})
        patch.is_conv, patch.multiplier = False, 0.5
        x = torch.randn(5, 24, generator=generator(4)).requires_grad_()
        (found,) = torch.autograd.grad(patch.bypass_forward(lambda x: x @ weight.t(), x).sum(), x)
        wanted = (weight + 0.5 * adapter.delta(weight).detach()).sum(0).expand(5, -1)
        assert distance(found, wanted) <= 1e-5, name



def test_core_and_our_loader_and_bypass_give_one_output(ops, pack_module, tiny, file):
    """The file in core's loader, in TriLoRA Loader, by hand, and (0.33.0) in core's bypass mode, which leaves weights alone."""
    tensors, deltas = file
    base = outputs(tiny, tiny.patcher)
    by_core = outputs(tiny, comfy.sd.load_lora_for_models(tiny.patcher, None, dict(tensors), 0.9, 0)[0])
    state = ops["checkpoint"].AdapterState(tensors)
    by_ours = outputs(tiny, pack_module("nodes.applying").apply_state(state, pack_module("nodes.types").StackEntry("file", 0.9, 0.0), tiny.patcher, None)[0])
    dense = tiny.patcher.clone()
    dense.add_patches(deltas, 0.9)
    wanted = outputs(tiny, dense)
    assert distance(base, wanted) > 1e-3
    assert distance(by_core, wanted) <= 1e-5 and distance(by_ours, wanted) <= 1e-5
    if hasattr(comfy.sd, "load_bypass_lora_for_models"):
        bypassed = comfy.sd.load_bypass_lora_for_models(tiny.patcher, None, dict(tensors), 0.9, 0)[0]
        assert not bypassed.patches and distance(outputs(tiny, bypassed), wanted) <= 1e-5


def test_a_layer_of_another_size_is_refused_before_anything_is_applied(ops, pack_module, tiny, file):
    tensors = {key.replace(LINEAR, LINEAR.replace("attn1.to_q", "attn2.to_k")): t for key, t in file[0].items()}
    tensors = {key: (t[:5, :5] if key.endswith("transform.core0") else t) for key, t in tensors.items()}
    with pytest.raises(ops["errors"].TriLoRAError, match="multiply to|expected"):
        pack_module("nodes.applying").apply_state(ops["checkpoint"].AdapterState(tensors), pack_module("nodes.types").StackEntry("file", 1.0, 0.0), tiny.patcher, None)


def test_without_the_class_a_file_loads_nothing_rather_than_half(own, file, monkeypatch):
    monkeypatch.setattr(comfy.weight_adapter, "adapters", [a for a in comfy.weight_adapter.adapters if a is not own.TransformPatch])
    names = {name: f"{name}.weight" for name in (LINEAR, CONV)}
    assert comfy.lora.load_lora(dict(file[0]), names, log_missing=False) == {}
