"""Adapter Hook among other hooks: who is patched with what, every kind of file, and what is refused."""

import comfy.hooks
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.adapter_files import every_kind, low_rank
from comfyui_trilora.tests.host.hook_run import (
    PatchCounter,
    joined,
    layers_of,
    low_rank_file,
    other_prompt,
    sample,
    with_hooks,
    with_keyframes,
)
from comfyui_trilora.tests.host.tiny_run import distance, run_node, weights_hash


@pytest.fixture(scope="module")
def prompts(tiny):
    return tiny.conditioning, other_prompt(tiny), other_prompt(tiny, 10)


@pytest.fixture
def core_hook(host_nodes):
    """Function: inputs of core's Create Hook LoRA (MO) -> HOOKS."""
    return lambda name, strength, prev=None: run_node(host_nodes, "CreateHookLoraModelOnly", lora_name=name, strength_model=strength, prev_hooks=prev)[0]


@pytest.fixture
def files(saved, tiny):
    """Two LoRAs for the whole model, and each with the layers of some blocks only, for core's hooks."""
    one, two = (low_rank_file(layers_of(tiny.patcher), seed) for seed in (0, 1))

    def part(tensors, word):
        return saved({key: tensor for key, tensor in tensors.items() if word in key})

    return {"one": saved(one), "two": saved(two), "one, OUT": part(one, "output_blocks"), "two, IN": part(two, "input_blocks")}


@pytest.fixture
def halves():
    left = torch.zeros(1, 16, 16)
    left[:, :, :8] = 1
    return left, 1 - left


def test_two_regions_with_hooks_of_their_own(host_nodes, tiny, prompts, hook, core_hook, files, halves):
    """Core's own hooks of files that hold only the blocks in question are the judge, of the result and of the work."""
    before = weights_hash(tiny.patcher)

    def regions(first, second):
        positive = with_hooks(host_nodes, prompts[1], second, halves[1], with_hooks(host_nodes, prompts[0], first, halves[0]))
        with PatchCounter(tiny.patcher) as patched:
            return sample(host_nodes, tiny, positive, prompts[2], steps=8), patched.count

    found, ours = regions(hook(files["one"], block_weights="default=0, OUT=0.7", schedule="stop=.5"),
                          hook(files["two"], strength_model=0.5, schedule="default: 0; IN: 0:1, .25:-1 step"))  # fmt: skip
    expected, cores = regions(with_keyframes(host_nodes, core_hook(files["one, OUT"], 0.7), (0, 1), (0.499, 0)),
                              with_keyframes(host_nodes, core_hook(files["two, IN"], 0.5), (0, 1), (0.249, -1)))  # fmt: skip
    assert distance(found, expected) <= 1e-5 and ours == cores
    plain = sample(host_nodes, tiny, with_hooks(host_nodes, prompts[1], None, halves[1], with_hooks(host_nodes, prompts[0], None, halves[0])), prompts[2], steps=8)
    assert distance(found, plain) > 1e-2
    assert weights_hash(tiny.patcher) == before


def test_groups_that_share_a_hook(host_nodes, tiny, prompts, hook, core_hook, files):
    """Positive has one hook, negative the same and another: when the shared one switches, both groups do."""

    def run(shared, both):
        return sample(host_nodes, tiny, with_hooks(host_nodes, prompts[0], shared), with_hooks(host_nodes, prompts[1], both), steps=8)

    ours = hook(files["one"], block_weights="default=0, OUT=0.7", schedule="start=.5")
    cores = with_keyframes(host_nodes, core_hook(files["one, OUT"], 0.7), (0, 0), (0.499, 1))
    found = run(ours, hook(files["two"], block_weights="default=0, IN=1", prev_hooks=ours))
    assert distance(found, run(cores, core_hook(files["two, IN"], 1.0, cores))) <= 1e-5


def test_several_hooks_in_one_group_add_up(host_nodes, tiny, prompts, hook, core_hook, files):
    """Ours with two curves, ours without, and core's on the same weights, with keyframes of the host on all of them."""
    hooks = hook(files["one"], schedule="OUT: stop=.5; IN: 2", strength_model=0.5)
    hooks = hook(files["two"], strength_model=-0.4, prev_hooks=hooks)
    hooks = with_keyframes(host_nodes, core_hook(files["two, IN"], 0.3, hooks), (0, 0.8), (0.249, 1.5))
    found = sample(host_nodes, tiny, *(with_hooks(host_nodes, cond, hooks) for cond in prompts[:2]), steps=8)

    def model(keyframe: float, out: float):
        patched = tiny.patcher
        for name, strength, text in (("one", 0.5, f"OUT={out}, IN=2"), ("two", -0.4, ""), ("two, IN", 0.3, "")):
            patched = run_node(host_nodes, "TriLoRALoader", model=patched, lora_name=files[name], strength_model=strength * keyframe, block_weights=text)[0]
        return patched

    parts = [model(0.8, 1)] * 2 + [model(1.5, 1)] * 2 + [model(1.5, 0)] * 4
    assert distance(found, joined(host_nodes, tiny, parts, *prompts[:2])) <= 1e-5


def test_keyframes_that_a_hook_of_cores_shares_with_ours(host_nodes, tiny, prompts, hook, core_hook, files):
    """The host gives all hooks of a group one object, which says only once that it has changed; no weight is in both files."""
    ours, cores = hook(files["one"], block_weights="default=0, OUT=0.7"), core_hook(files["one, OUT"], 0.7)
    found, expected = (with_keyframes(host_nodes, core_hook(files["two, IN"], 0.5, prev), (0, 1), (0.249, -0.5), (0.7, 0.3)) for prev in (ours, cores))
    found, expected = (sample(host_nodes, tiny, *(with_hooks(host_nodes, cond, hooks) for cond in prompts[:2]), steps=8) for hooks in (found, expected))
    assert distance(found, expected) <= 1e-5


def test_clones_are_equal_and_lose_nothing(host_nodes, hook, files):
    hooks = hook(files["one"], schedule="OUT: 1 -> 0; IN: 0 -> 1", strength_model=0.3, strength_clip=0.4)
    assert len(hooks) == 3 and len(set(hooks.hooks)) == 3, "one for what stays, one for each curve"
    clones = hooks.clone().clone_and_combine(hooks)
    assert clones.hooks == hooks.hooks and len(clones) == 3, "clones stand for the same hook"
    for clone, original in zip(clones.hooks, hooks.hooks, strict=True):
        assert vars(clone) == vars(original) and clone is not original and hash(clone) == hash(original)
    other = hook(files["one"], schedule="OUT: 1 -> 0; IN: 0 -> 1", strength_model=0.3, strength_clip=0.4)
    assert not set(other.hooks) & set(hooks.hooks) and len(hooks.clone_and_combine(other)) == 6
    copied = hooks.hooks[1].hook_keyframe.clone()
    copied.add(comfy.hooks.HookKeyframe(0.5))
    hooks.hooks[2].hook_keyframe = copied
    assert hooks.hooks[2].hook_keyframe.steps == hooks.hooks[2].steps != hooks.hooks[1].steps, "a schedule is its hook's own"
    assert hooks.hooks[2].strength == 0.5 and hooks.hooks[1].strength == 1


def test_the_same_hooks_on_several_models(host_nodes, hook, files, prompts, tiny):
    """What was found for one model does not reach another; and what time it is in a sampling is forgotten after it."""
    second, flow = tiny_models.unet_model(tiny_models.comfy.model_base.ModelType.EPS, seed=8), tiny_models.flow_model()
    hooks = hook(files["one"], block_weights="IN=0.5", schedule="OUT: 0:1, .001:.2 step")
    for model in (tiny, second, tiny):
        found = sample(host_nodes, model, *(with_hooks(host_nodes, cond, hooks) for cond in prompts[:2]), steps=2, denoise=0.5)
        loaded = run_node(host_nodes, "TriLoRALoader", model=model.patcher, lora_name=files["one"], block_weights="IN=0.5, OUT=0.2")[0]
        assert distance(found, sample(host_nodes, model, *prompts[:2], steps=2, model=loaded, denoise=0.5)) <= 1e-5
        assert [one.strength for one in hooks.hooks] == [1, 0.2]
        hooks.reset()
        assert [one.strength for one in hooks.hooks] == [1, 1]
    with pytest.raises(ValueError, match=rf"{files['one']}: none of its .* found a place in this model"):
        sample(host_nodes, flow, *(with_hooks(host_nodes, cond, hooks) for cond in (flow.conditioning, other_prompt(flow))))


def test_every_kind_of_file_is_linear_in_time(host_nodes, tiny, prompts, hook, saved, pack_module):
    """Strength 2 times 0.25 is the loader at 0.5, also where the host itself squares or ignores a strength."""
    kinds = every_kind(tiny.patcher, pack_module("trilora_ops.registry"), pack_module("trilora_ops.checkpoint"))
    assert len(kinds) > 10
    for kind, (tensors, metadata) in kinds.items():
        name = saved(tensors, metadata)
        hooks = hook(name, strength_model=2, schedule="0:0, .01:.25 step")
        found = sample(host_nodes, tiny, *(with_hooks(host_nodes, cond, hooks) for cond in prompts[:2]), steps=2, denoise=0.5)
        loaded = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name, strength_model=0.5)[0]
        assert distance(found, sample(host_nodes, tiny, *prompts[:2], steps=2, model=loaded, denoise=0.5)) <= 1e-5, kind


def test_slices_of_fused_weights_stay_apart(host_nodes, hook, saved):
    """q, k and v of a Flux in three layers for one weight: each has a place of its own, and none is lost."""
    flux = tiny_models.flux_model()
    names = [f"transformer.single_transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    name = saved({key: tensor for i, layer in enumerate(names) for key, tensor in low_rank(layer, 64, 64, seed=i).items()})
    prompts = flux.conditioning, other_prompt(flux)
    for text in ("", "S00.attn=-0.5, S00.mlp=3"):
        found = sample(host_nodes, flux, *(with_hooks(host_nodes, cond, hook(name, block_weights=text, strength_model=5)) for cond in prompts))
        loaded = run_node(host_nodes, "TriLoRALoader", model=flux.patcher, lora_name=name, block_weights=text, strength_model=5)[0]
        expected = sample(host_nodes, flux, *prompts, model=loaded)
        assert distance(found, expected) <= 1e-5 and distance(expected, sample(host_nodes, flux, *prompts)) > 1e-4


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"schedule": "IN: 1 >> 0"}, r"schedule, in the line 'IN: 1 >> 0'.* is no curve"),
        ({"schedule": "OUT: 1\nIN: start=4 stop=12"}, r"in the line 'IN: start=4 stop=12'.*5 of 20 is 5/20"),
        ({"schedule": "0:1, .2:.5, .4:0", "switches": 1}, r"changes at 2 times .*raise it to 2"),
        ({"lora_name": "missing.safetensors"}, r"missing\.safetensors"),
    ],
)
def test_what_the_text_alone_shows_is_refused_by_the_node(hook, files, inputs, message):
    with pytest.raises(ValueError, match=message):
        hook(**{"lora_name": files["one"], **inputs})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"schedule": "IN99: 1 -> 0"}, r"\.safetensors: schedule, in the line 'IN99: 0:1, 1:0': .*no block of this model.*nothing was applied"),
        ({"block_weights": "D07=0.5"}, r"block_weights for .*\.safetensors: .*D07.*nothing was applied"),
        ({"other": "family"}, r"\.safetensors: none of its .* found a place in this model"),
        ({"other": "shape"}, r"\.safetensors: .* its layer for .*; nothing was applied"),
        ({"other": "larger"}, r"\.safetensors: .* gives it the shape \(8, .*use TriLoRA Loader"),
    ],
)
def test_what_the_model_shows_is_refused_before_anything_is_patched(host_nodes, tiny, prompts, hook, files, saved, inputs, message):
    """By the sampler, since only it knows the model; the model and the hooks of others are as before."""
    layer = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
    other = {"family": low_rank("lora_unet_double_blocks_0_img_attn_qkv", 8, 8), "shape": low_rank(layer, 64, 128),
             "larger": {"diffusion_model.input_blocks.0.0.diff": torch.ones(8, 4, 3, 3)}}  # fmt: skip
    if "other" in inputs:
        tensors = other[inputs["other"]]
        if inputs["other"] == "larger":
            tensors = low_rank("diffusion_model.out.2", 8, 64, kernel=(3, 3)) | {"diffusion_model.out.2.reshape_weight": torch.tensor([8, 64, 3, 3])}
        inputs = {"lora_name": saved(tensors)}
    before = weights_hash(tiny.patcher)
    hooks = hook(**{"lora_name": files["one"], **inputs}, prev_hooks=hook(files["two"]))
    with PatchCounter(tiny.patcher) as patched, pytest.raises(ValueError, match=message):
        sample(host_nodes, tiny, *(with_hooks(host_nodes, cond, hooks) for cond in prompts[:2]))
    assert patched.count == 0 and not tiny.patcher.hook_patches and weights_hash(tiny.patcher) == before


def test_an_unlinked_block_weights_is_an_empty_one(host_nodes, tiny, prompts, hook, files):
    found, whole = (sample(host_nodes, tiny, *(with_hooks(host_nodes, cond, hook(files["one"], block_weights=text)) for cond in prompts[:2]), steps=1) for text in (None, ""))
    assert torch.equal(found, whole)
