"""The model that is trained is the model itself: what nodes add for sampling is left out and named, what defines it stays."""

import functools

import comfy.model_management
import comfy.patcher_extension
import comfy.sd
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import distance, random_dataset, run_node


@pytest.fixture(scope="module")
def model(host_nodes):
    return tiny_models.eps_prediction_model()


@pytest.fixture(scope="module")
def train(host_nodes, pack_module, model):
    """Function: a MODEL -> (adapter, report) of two steps on it."""

    def run(patcher, tiny=model):
        dataset = random_dataset(pack_module("nodes.types"), tiny)
        settings = run_node(host_nodes, "TriLoRATrainingSettings", steps=2, learning_rate=1e-3, warmup=0.0, precision="model")[0]
        method = run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)[0]
        return run_node(host_nodes, "TriLoRATrainAdapter", model=patcher, dataset=dataset, method=method, settings=settings)[1::2]

    return run


@pytest.fixture(scope="module")
def plain(train, model):
    """The adapter of the model as it is, and its report."""
    adapter, report = train(model.patcher)
    assert "notice" not in report
    return adapter


def same(adapter, plain) -> bool:
    return adapter.keys() == plain.keys() and all(torch.equal(adapter[key], plain[key]) for key in plain)


class Kernel(torch.autograd.Function):
    """Attention as of a package that has written no backward pass."""

    @staticmethod
    def forward(ctx, function, *args):
        return function(*args)


def no_gradient(function, *args, **kwargs):
    with torch.no_grad():
        return function(*args, **kwargs)


def detached(function, *args, **kwargs):
    return function(*args, **kwargs).detach()


def no_backward(function, *args, **kwargs):
    return Kernel.apply(functools.partial(function, **kwargs), *args)


@pytest.mark.parametrize("override", [no_gradient, detached, no_backward, functools.partial(no_gradient)])
def test_attention_without_a_backward_pass_is_replaced(train, plain, model, texts, override):
    patcher = model.patcher.clone()
    patcher.model_options["transformer_options"]["optimized_attention_override"] = override
    adapter, report = train(patcher)
    assert same(adapter, plain)
    assert "attention is computed by torch" in texts[-1] and "attention is computed by torch" in report
    assert "never moved" not in report
    assert patcher.model_options["transformer_options"]["optimized_attention_override"] is override  # the MODEL is as it came


NODES = {  # nodes of ComfyUI that act in sampling: class, inputs, words of the notice
    "FreeU": ({"b1": 1.4, "b2": 1.6, "s1": 0.5, "s2": 0.2}, "FreeU"),
    "FreeU_V2": ({"b1": 1.4, "b2": 1.6, "s1": 0.5, "s2": 0.2}, "FreeU_V2"),
    "HyperTile": ({"tile_size": 1, "swap_size": 2, "max_depth": 0, "scale_depth": False}, "HyperTile"),
    "TomePatchModel": ({"ratio": 0.5}, "TomePatchModel"),
    "PatchModelAddDownscale": (
        {"block_number": 1, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 1.0, "downscale_after_skip": True,
         "downscale_method": "bicubic", "upscale_method": "bicubic"},
        "PatchModelAddDownscale",
    ),
    "SelfAttentionGuidance": ({"scale": 0.5, "blur_sigma": 2.0}, "SelfAttentionGuidance"),
    "PerturbedAttentionGuidance": ({"scale": 3.0}, "PerturbedAttentionGuidance"),
    "RescaleCFG": ({"multiplier": 0.7}, "RescaleCFG"),
    "EasyCache": ({"reuse_threshold": 0.2, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}, "easycache"),
}


@pytest.mark.parametrize("node", NODES)
def test_what_a_node_adds_for_sampling_is_left_out_and_named(host_nodes, train, plain, model, texts, node):
    if node not in host_nodes.NODE_CLASS_MAPPINGS:
        pytest.skip(f"this host has no {node}")
    inputs, words = NODES[node]
    patched = run_node(host_nodes, node, model=model.patcher, **inputs)[0]
    adapter, report = train(patched)
    assert same(adapter, plain)
    assert f"without what nodes hook into it for sampling: {words}" in texts[-1]
    assert f"without what nodes hook into it for sampling: {words}" in report


def wrapper(executor, *args, **kwargs):
    return executor(*args, **kwargs) * 2


class Replacement:
    """A patch that is an object."""

    def __call__(self, *args, **kwargs):
        raise AssertionError("called in training")


def add_block_replacement(patcher):
    patcher.set_model_attn1_replace(Replacement(), "output", 3, 0)


def add_wrappers(patcher):
    comfy.patcher_extension.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapper, patcher.model_options, is_model_options=True)
    comfy.patcher_extension.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, wrapper, patcher.model_options, is_model_options=True)


def add_own_wrapper(patcher):
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "cache", wrapper)


def add_function_wrapper(patcher):
    patcher.set_model_unet_function_wrapper(lambda apply, options: apply(options["input"], options["timestep"], **options["c"]) * 2)


def add_forward(patcher):
    """As nodes do that replace the attention, or a whole block, by a method of theirs."""
    module = patcher.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1
    patcher.add_object_patch("diffusion_model.middle_block.1.transformer_blocks.0.attn1.forward", functools.partial(detached, module.forward))


def add_run_callback(patcher):
    """As nodes do that put their attention into ComfyUI's modules for the length of a run."""

    def enable(patcher, *args):
        raise AssertionError("called in training")

    patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, enable)


def add_function_object(patcher):
    patcher.set_model_unet_function_wrapper(Replacement())


def add_compiled(patcher):
    """As torch.compile leaves the denoiser."""
    compiled = torch.nn.Module()
    compiled._orig_mod = patcher.model.diffusion_model
    patcher.add_object_patch("diffusion_model", compiled)


def add_apply(patcher):
    """In the place of the model's own function around the denoiser."""
    apply = patcher.model.apply_model
    patcher.add_object_patch("apply_model", lambda *args, **kwargs: 2 * apply(*args, **kwargs))


def add_pair(patcher):
    """A handler beside the class of layers that it is for."""
    patcher.set_model_forward_timestep_embed_patch((torch.nn.Conv2d, wrapper))


HOOKS = {"a replaced block": (add_block_replacement, "Replacement"), "wrappers": (add_wrappers, "wrapper"), "the model's own wrapper": (add_own_wrapper, "wrapper"),
         "a function around the model": (add_function_wrapper, "add_function_wrapper"), "a forward pass": (add_forward, "detached"),
         "an object around the model": (add_function_object, "Replacement"), "a callback of runs": (add_run_callback, "add_run_callback"),
         "a compiled model": (add_compiled, "torch.compile"), "a pair": (add_pair, "wrapper"), "the model's own function": (add_apply, "add_apply")}


@pytest.mark.parametrize("hook", HOOKS)
def test_other_packs_hooks_are_left_out_and_named(train, plain, model, texts, hook):
    add, words = HOOKS[hook]
    patcher = model.patcher.clone()
    add(patcher)
    if hook != "a compiled model":  # which this test does not make whole
        comfy.model_management.load_models_gpu([patcher])  # it has been sampled with before
    adapter, report = train(patcher)
    assert same(adapter, plain)
    assert words in texts[-1] and f"for sampling: {words}" in report
    assert hook != "a forward pass" or "diffusion_model.middle_block.1.transformer_blocks.0.attn1.forward" in patcher.object_patches


def test_many_hooks_are_one_short_sentence(train, plain, model):
    patcher = model.patcher.clone()
    for number in range(50):
        kind = type(f"Node{number}" + "x" * 1000, (), {"__call__": lambda self, h, options: h * 2})
        patcher.set_model_input_block_patch(kind())
    adapter, report = train(patcher)
    assert same(adapter, plain)
    (line,) = [line for line in report.splitlines() if "sampling" in line]
    assert "and 38 more" in line and len(line) < 2000


def test_what_defines_the_model_stays(host_nodes, train, plain, model):
    """Weights with their patches, the noise schedule, and plain values such as a scale of the positions."""
    shifted = run_node(host_nodes, "ModelSamplingDiscrete", model=model.patcher, sampling="eps", zsnr=True)[0]
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    lora = model.patcher.clone()
    lora.add_patches({key: (0.5 * torch.ones(lora.model.state_dict()[key].shape),)}, 1.0)
    for changed in (shifted, lora):
        adapter, report = train(changed)
        assert "notice" not in report
        up = next(key for key in plain if key.endswith("lora_up.weight"))
        assert distance(adapter[up], plain[up]) > 1e-4


def test_what_a_lora_computes_beside_the_weight_is_part_of_the_model(host_nodes, pack_module, model, monkeypatch):
    """Gradients through a layer whose LoRA is computed beside it are those of the weight with this LoRA."""
    key = "diffusion_model.middle_block.1.proj_in"
    weight = model.patcher.model.diffusion_model.middle_block[1].proj_in.weight
    down, up = (torch.randn(shape, generator=torch.Generator().manual_seed(4)) for shape in ((3, weight.shape[1]), (weight.shape[0], 3)))
    file = {f"{key}.lora_down.weight": 0.1 * down, f"{key}.lora_up.weight": 0.1 * up}
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this host computes no LoRA beside the weight")
    found = []
    clip = torch.nn.utils.clip_grad_norm_

    def gradients(parameters, *args):
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return clip(parameters, *args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", gradients)
    method = run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)[0]
    settings = run_node(host_nodes, "TriLoRATrainingSettings", steps=1, precision="model")[0]
    dataset = random_dataset(pack_module("nodes.types"), model)
    with torch.inference_mode():
        models = [load(model.patcher, None, file, 1.0, 0.0)[0] for load in (comfy.sd.load_lora_for_models, comfy.sd.load_bypass_lora_for_models)]
    for patcher in (*models, model.patcher):
        run_node(host_nodes, "TriLoRATrainAdapter", model=patcher, dataset=dataset, method=method, settings=settings, target="attention")
    baked, beside, without = found
    assert distance(beside, baked) < 1e-4 < 1e-2 < distance(without, baked)


def test_plain_values_reach_the_model(pack_module, model):
    patcher = model.patcher.clone()
    options = {"rope_options": {"scale_x": 2.0}, "patches": {"output_block_patch": [wrapper]}, "custom": wrapper}
    patcher.model_options["transformer_options"].update(options)
    kept, (sentence,) = pack_module("nodes.sampling_patches").model_alone(patcher.clone())
    assert kept == {"rope_options": {"scale_x": 2.0}} and sentence.endswith("sampling: wrapper")
