"""Adapter Hook on text encoders: Set CLIP Hooks alone, with a schedule, and together with the denoiser."""

import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.adapter_files import low_rank
from comfyui_trilora.tests.host.hook_run import (
    layers_of,
    low_rank_file,
    other_prompt,
    sample,
    with_hooks,
    with_keyframes,
)
from comfyui_trilora.tests.host.tiny_run import distance, load_checkpoint, run_node


@pytest.fixture(scope="module")
def clip(host_nodes, models_dir):
    return load_checkpoint(host_nodes)[1]


@pytest.fixture(scope="module")
def prompts(tiny):
    return tiny.conditioning, other_prompt(tiny)


def encoder_file(clip, denoiser: dict | None = None) -> dict[str, torch.Tensor]:
    """A LoRA under kohya's names for the text encoder's attention, and layers of a denoiser."""
    tensors = dict(denoiser or {})
    for n in range(12):
        for part in ("self_attn_q_proj", "self_attn_out_proj"):
            tensors |= {key: tensor * 3 for key, tensor in low_rank(f"lora_te_text_model_encoder_layers_{n}_{part}", 768, 768, seed=n).items()}
    return tensors


def encode(nodes, clip, text: str = "a red cube") -> list:
    return run_node(nodes, "CLIPTextEncode", clip=clip, text=text)[0]


def set_clip_hooks(nodes, clip, hooks, schedule_clip: bool = False):
    return run_node(nodes, "SetClipHooks", clip=clip, hooks=hooks, apply_to_conds=True, schedule_clip=schedule_clip)[0]


@pytest.fixture
def loaded_clip(host_nodes, clip, tiny):
    """Function: inputs of the loader -> the text encoder's answer."""

    def answer(lora_name, **inputs):
        tiny_model = load_checkpoint(host_nodes)[0]
        return encode(host_nodes, run_node(host_nodes, "TriLoRALoader", model=tiny_model, clip=clip, lora_name=lora_name, **inputs)[1])[0][0]

    return answer


@pytest.fixture(scope="module")
def encoder_name(saved, clip, models_dir, host_nodes):
    denoiser = layers_of(load_checkpoint(host_nodes)[0], ("attn2.to_q",))
    return saved(encoder_file(clip, low_rank_file(denoiser)))


def test_a_text_encoder_has_no_time(host_nodes, clip, hook, loaded_clip, encoder_name):
    """Its blocks have strength_clip times their weight; constants of the schedule hold, curves and keyframes do not."""
    hooks = hook(encoder_name, strength_clip=0.7, block_weights="default=0.5, TE1.03=-1, OUT=3, .cross=0", schedule="0 -> 1; TE1.05: .3; OUT: stop=.5")
    (found, options), = encode(host_nodes, set_clip_hooks(host_nodes, clip, with_keyframes(host_nodes, hooks, (0, 0.2), (0.5, 0.4))))
    expected = loaded_clip(encoder_name, strength_clip=0.7, block_weights="default=0.5, TE1.03=-1, TE1.05=0.15")
    assert distance(found, expected) <= 2e-3, "the text encoder is in fp16"
    assert distance(found, encode(host_nodes, clip)[0][0]) > 0.05 and len(options["hooks"]) == 3


@pytest.mark.parametrize("text", ["0.4,1,1,0,0,0,0,0,0,0,0,0,1,1,1,1,1", "%default=0.4, in1=1", "layers.03=2, TE=0.4, nowhere=1", "default=0.4, D07=0, S20-S37=1"])
def test_other_models_words_on_a_text_encoder(host_nodes, clip, hook, loaded_clip, encoder_name, text):
    """The denoiser is not known yet: lists are read as SD1.5's, whose text encoder this is, and blocks are left to the sampler."""
    (found, _), = encode(host_nodes, set_clip_hooks(host_nodes, clip, hook(encoder_name, block_weights=text)))
    assert distance(found, loaded_clip(encoder_name, block_weights="TE=0.4")) <= 2e-3


def test_a_list_that_no_model_reads_is_refused_on_a_text_encoder(host_nodes, clip, hook, encoder_name):
    with pytest.raises(ValueError, match=rf"block_weights for {encoder_name}: .*nothing was applied"):
        set_clip_hooks(host_nodes, clip, hook(encoder_name, block_weights="0.4,1,1"))


def test_a_text_encoder_with_schedule_clip(host_nodes, clip, hook, loaded_clip, encoder_name):
    """Encoded once for each step of the curve times the keyframes; other blocks of it stay as they are."""
    hooks = with_keyframes(host_nodes, hook(encoder_name, schedule="TE: 0:1, .5:-.4 step; TE1.02: .6; IN: stop=.2"), (0, 1), (0.75, 0.5))
    found = encode(host_nodes, set_clip_hooks(host_nodes, clip, hooks, schedule_clip=True))
    assert [(options["clip_start_percent"], options["clip_end_percent"]) for _, options in found] == [(0, 0.5), (0.5, 0.75), (0.75, 1)]
    for (cond, _), keyframe, strength in zip(found, (1, 1, 0.5), (1, -0.4, -0.4), strict=True):
        expected = loaded_clip(encoder_name, strength_clip=keyframe, block_weights=f"TE={strength}, TE1.02=0.6")
        assert distance(cond, expected) <= 2e-3


def test_a_curve_of_the_denoiser_does_not_encode_again(host_nodes, clip, hook, encoder_name):
    hooks = hook(encoder_name, schedule="IN, OUT: 1 -> 0")
    assert len(encode(host_nodes, set_clip_hooks(host_nodes, clip, hooks, schedule_clip=True))) == 1


def test_prompt_to_latents_with_both_parts(host_nodes, clip, hook, encoder_name, models_dir):
    """Set CLIP Hooks alone, which hands the hooks on to the conditioning: the loader's model with the loader's text encoder."""
    model = load_checkpoint(host_nodes)[0]
    tiny = tiny_models.TinyModel(model, (1, 4, 8, 8), [])
    hooks = hook(encoder_name, block_weights="default=0.5, IN=-1", schedule="OUT: .2")
    hooked_clip = set_clip_hooks(host_nodes, clip, hooks)
    found = sample(host_nodes, tiny, *(encode(host_nodes, hooked_clip, text) for text in ("a red cube", "")), steps=2)
    loaded, loaded_clip = run_node(host_nodes, "TriLoRALoader", model=model, clip=clip, lora_name=encoder_name, block_weights="default=0.5, IN=-1, OUT=0.1")
    expected = sample(host_nodes, tiny, *(encode(host_nodes, loaded_clip, text) for text in ("a red cube", "")), steps=2, model=loaded)
    assert distance(found, expected) <= 2e-3


def test_a_file_of_the_text_encoder_alone(host_nodes, tiny, prompts, clip, hook, saved):
    """Refused by the sampler where nothing gave it to a text encoder; with Set CLIP Hooks the sampler has nothing to do."""
    name = saved(encoder_file(clip))
    with pytest.raises(ValueError, match=rf"{name}: none of its layers is for the model, .* text encoder .*: connect CLIP"):
        sample(host_nodes, tiny, *(with_hooks(host_nodes, cond, hook(name)) for cond in prompts))
    hooks = hook(name)
    set_clip_hooks(host_nodes, clip, hooks)
    found = sample(host_nodes, tiny, *(with_hooks(host_nodes, cond, hooks) for cond in prompts))
    assert torch.equal(found, sample(host_nodes, tiny, *prompts))


def test_a_file_of_the_denoiser_alone_leaves_the_text_encoder(host_nodes, tiny, clip, hook, saved):
    name = saved(low_rank_file(layers_of(tiny.patcher)))
    (found, _), = encode(host_nodes, set_clip_hooks(host_nodes, clip, hook(name, block_weights="IN=0.5", schedule="OUT: 1 -> 0")))
    assert torch.equal(found, encode(host_nodes, clip)[0][0])


def test_keys_without_a_place_are_logged_once_and_those_of_the_text_encoder_never(host_nodes, clip, hook, saved, tiny, prompts, caplog):
    denoiser = low_rank_file(layers_of(tiny.patcher, ("attn2.to_q",)))
    name = saved(encoder_file(clip, denoiser) | low_rank("lora_unet_nowhere", 8, 8))
    hooks = hook(name)
    set_clip_hooks(host_nodes, clip, hooks)
    for _ in range(2):
        sample(host_nodes, tiny, *(with_hooks(host_nodes, cond, hooks) for cond in prompts), steps=1)
    messages = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert len(messages) == 1 and "lora_unet_nowhere" in messages[0] and "lora_te" not in messages[0]


def test_the_names_that_transformers_writes_today(host_nodes, clip, hook, loaded_clip, saved):
    """Without `text_model`, which the host's own map has in every name: by a hook as by the loader."""
    layers = {f"text_encoder.encoder.layers.{n}.self_attn.q_proj": low_rank("x", 768, 768, seed=n) for n in range(12)}
    name = saved({f"{layer}.{end}.weight": 3 * tensors[f"x.{kohya}.weight"] for layer, tensors in layers.items() for end, kohya in (("lora_A", "lora_down"), ("lora_B", "lora_up"))})
    (found, _), = encode(host_nodes, set_clip_hooks(host_nodes, clip, hook(name, block_weights="TE1.03=-1, TE1.05=0.5")))
    assert distance(found, loaded_clip(name, block_weights="TE1.03=-1, TE1.05=0.5")) <= 2e-3
    assert distance(found, encode(host_nodes, clip)[0][0]) > 0.02
