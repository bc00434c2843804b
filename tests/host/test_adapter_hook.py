"""Adapter Hook against separate runs: what a hook does at every step is what the loader does with the strengths of that step."""

import pytest
from comfy.patcher_extension import CallbacksMP
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.hook_run import (
    PatchCounter,
    joined,
    layers_of,
    low_rank_file,
    other_prompt,
    sample,
    with_hooks,
    with_keyframes,
)  # fmt: skip
from comfyui_trilora.tests.host.tiny_run import distance, run_node, weights_hash

MODELS = {"unet": tiny_models.eps_prediction_model, "sd3": tiny_models.flow_model, "flux": tiny_models.flux_model}
# two texts for each model: strengths of its blocks, and the selector of some of them
WEIGHTS = {"unet": "default=0.5, IN=-0.6, OUT01=0, .cross=1.2", "sd3": "default=0.4, J01.img=-0.7, FINAL=0", "flux": "default=0.5, D01=-0.5, S00=1.3, .txt=0"}
SOME = {"unet": "OUT", "sd3": "J01", "flux": "S00-S01"}
PART = {"unet": ("output_blocks.",), "sd3": ("joint_blocks.1.",), "flux": ("single_blocks.",)}


@pytest.fixture(scope="module", params=MODELS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tiny(host_nodes, kind):
    return MODELS[kind]()


@pytest.fixture(scope="module")
def adapter(saved, tiny):
    return saved(low_rank_file(layers_of(tiny.patcher)))


@pytest.fixture(scope="module")
def prompts(tiny):
    return tiny.conditioning, other_prompt(tiny)


@pytest.fixture
def load(host_nodes, tiny):
    """Function: inputs of the loader -> MODEL."""
    return lambda lora_name, strength_model=1.0, model=None, **inputs: run_node(
        host_nodes, "TriLoRALoader", model=model or tiny.patcher, lora_name=lora_name, strength_model=strength_model, **inputs)[0]  # fmt: skip


@pytest.fixture
def hooked(host_nodes, tiny, prompts):
    """Function: HOOKS -> latents of KSampler with them on both prompts."""
    return lambda hooks, **inputs: sample(host_nodes, tiny, *(with_hooks(host_nodes, cond, hooks) for cond in prompts), **inputs)


def test_constant_strengths_are_the_loaders(host_nodes, tiny, kind, adapter, prompts, hook, load, hooked):
    before = weights_hash(tiny.patcher)
    found = hooked(hook(adapter, strength_model=0.8, block_weights=WEIGHTS[kind]))
    expected = sample(host_nodes, tiny, *prompts, model=load(adapter, 0.8, block_weights=WEIGHTS[kind]))
    assert distance(found, expected) <= 1e-5
    assert distance(found, sample(host_nodes, tiny, *prompts, model=load(adapter, 0.8))) > 1e-2
    assert weights_hash(tiny.patcher) == before, "the model is left as it was"


def test_a_switch_at_half_is_two_runs_joined(host_nodes, tiny, kind, adapter, prompts, hook, load, hooked):
    """Six steps of an even schedule: the first three are before the switch, the fourth begins at it."""
    early, late = (load(adapter, block_weights=f"default=0.3, {SOME[kind]}={strength}") for strength in (1, -0.5))
    found = hooked(hook(adapter, schedule=f"default: 0.3\n{SOME[kind]}: 0:1, .5:-.5 step"))
    assert distance(found, joined(host_nodes, tiny, [early] * 3 + [late] * 3, *prompts)) <= 1e-5
    assert distance(found, joined(host_nodes, tiny, [early] * 4 + [late] * 2, *prompts)) > 1e-3
    assert distance(found, joined(host_nodes, tiny, [early] * 2 + [late] * 4, *prompts)) > 1e-3


def test_a_schedule_multiplies_block_weights_and_strength(host_nodes, tiny, kind, adapter, prompts, hook, load, hooked):
    """Two kinds of blocks with curves of their own, two with constants, over weights that differ."""
    some = SOME[kind]
    found = hooked(hook(adapter, strength_model=0.5, block_weights=f"default=0.8, {some}=2", schedule=f"start=3/6; {some}: stop=4/6; FINAL: .4"))
    models = [load(adapter, 0.5, block_weights=f"default={rest}, {some}={blocks}, FINAL=0.32") for rest, blocks in ((0, 2), (0.8, 2), (0.8, 0))]
    assert distance(found, joined(host_nodes, tiny, [models[0]] * 3 + [models[1]] + [models[2]] * 2, *prompts)) <= 1e-5


def test_a_curve_follows_its_steps(host_nodes, tiny, kind, adapter, prompts, hook, load, hooked):
    """A ramp over six steps with five switches is six levels, each the ramp's value in the middle of a step."""
    found = hooked(hook(adapter, schedule="1 -> 0", switches=5))
    models = [load(adapter, 1 - (i + 0.5) / 6) for i in range(6)]
    assert distance(found, joined(host_nodes, tiny, models, *prompts)) <= 1e-5


def test_keyframes_of_the_host_multiply_the_schedule(host_nodes, tiny, kind, adapter, prompts, hook, load, hooked):
    hooks = with_keyframes(host_nodes, hook(adapter, schedule=f"{SOME[kind]}: 0:1, .5:-.5 step"), (0, 1), (0.3, 0.4))
    models = [load(adapter, keyframe, block_weights=f"{SOME[kind]}={own}") for keyframe, own in ((1, 1), (0.4, 1), (0.4, -0.5))]
    expected = joined(host_nodes, tiny, [models[0]] * 2 + [models[1]] + [models[2]] * 3, *prompts)
    assert distance(hooked(hooks), expected) <= 1e-5
    again = with_keyframes(host_nodes, with_keyframes(host_nodes, hooks, (0, 0.1)).clone(), (0, 1), (0.3, 0.4))
    assert distance(hooked(again), expected) <= 1e-5, "new keyframes replace the host's old ones and nothing else"
    assert distance(hooked(hooks), expected) <= 1e-5, "a second run with the same hooks"


def test_sampling_that_begins_late_begins_in_the_schedule(host_nodes, tiny, kind, adapter, prompts, hook, load, hooked):
    """denoise 0.5: the schedule's first half never happens."""
    found = hooked(hook(adapter, schedule="0:5, .45:.5 step"), denoise=0.5, steps=3)
    assert distance(found, sample(host_nodes, tiny, *prompts, model=load(adapter, 0.5), denoise=0.5, steps=3)) <= 1e-5


def test_beside_the_loader_on_the_same_model(host_nodes, tiny, kind, adapter, prompts, hook, load, hooked, saved):
    other = saved(low_rank_file(layers_of(tiny.patcher), seed=1))
    found = hooked(hook(adapter, schedule=f"{SOME[kind]}: stop=.5"), model=load(other, 0.7))
    early, late = (load(adapter, block_weights=text, model=load(other, 0.7)) for text in ("", f"{SOME[kind]}=0"))
    assert distance(found, joined(host_nodes, tiny, [early] * 3 + [late] * 3, *prompts)) <= 1e-5


def test_only_weights_whose_strength_changes_are_patched_anew(tiny, kind, adapter, hook, hooked):
    """All once at the start; then, once a switch that sampling meets, those of the curve that switches there."""
    everything, some = (len(layers_of(tiny.patcher, words)) for words in ((), PART[kind]))
    assert 0 < some < everything
    for schedule, switches, patches in (("", 10, everything), ("default: .5; .mlp: .2", 10, everything), (f"{SOME[kind]}: stop=.5", 10, everything + some),
                                        ("1 -> 0", 3, 4 * everything), (f"1 -> 0; {SOME[kind]}: .4", 3, 4 * everything - 3 * some),
                                        (f"stop=.3; {SOME[kind]}: 1 -> 0", 3, 2 * everything + 2 * some), (f"{SOME[kind]}: 0:1, .01:2, .02:3 step", 10, everything + some)):  # fmt: skip
        with PatchCounter(tiny.patcher) as patched:
            hooked(hook(adapter, schedule=schedule, switches=switches), steps=12)
        assert patched.count == patches, schedule


def test_where_others_wait_for_the_host_it_patches_all(host_nodes, tiny, kind, adapter, prompts, hook, hooked):
    """The host keeps the weights of each of several groups and drops them at a switch, and calls back whoever wants to know."""
    everything, hooks = len(layers_of(tiny.patcher)), hook(adapter, schedule=f"default: .5; {SOME[kind]}: 0:1, .5:.2 step")
    with PatchCounter(tiny.patcher) as patched:
        sample(host_nodes, tiny, with_hooks(host_nodes, prompts[0], hooks), prompts[1])
    assert patched.count == 2 * everything, "hooks on one of two prompts"
    model, calls = tiny.patcher.clone(), []
    model.add_callback(CallbacksMP.ON_APPLY_HOOKS, lambda patcher, group: calls.append(group))
    with PatchCounter(tiny.patcher) as patched:
        found = hooked(hooks, model=model)
    assert patched.count == 2 * everything and len(calls) == 2
    assert distance(found, hooked(hooks)) <= 1e-6, "either way patches the same"


def test_a_curve_that_is_zero_at_first_costs_no_switch_of_the_host(host_nodes, tiny, adapter, hook, hooked):
    """0 times any keyframe is 0: nothing is patched anew for it."""
    hooks = with_keyframes(host_nodes, hook(adapter, schedule="start=.5"), (0, 1), (0.2, 0.5), (0.4, 1))
    with PatchCounter(tiny.patcher) as patched:
        hooked(hooks, steps=12)
    assert patched.count == 2 * len(layers_of(tiny.patcher))
