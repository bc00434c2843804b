"""A stack in a graph of a server of its own: order, caching, and a changed file, as a person meets them."""

import copy
import io

import pytest
from comfyui_trilora.tests.host.adapter_files import low_rank, normal
from comfyui_trilora.tests.host.tiny_run import CHECKPOINT
from PIL import Image
from safetensors.torch import save_file

BLOCK = "diffusion_model.middle_block.1.transformer_blocks.0"
TEXT = "lora_te_text_model_encoder_layers_3_mlp_fc1"


def write_files(folder, seed: int = 0) -> None:
    """stack_lora: low-rank on U-Net and text encoder; stack_oft: an OFT on one of the same weights."""
    lora = low_rank(f"{BLOCK}.attn1.to_q", 320, 320, seed=seed) | low_rank(f"{BLOCK}.attn2.to_k", 320, 768, seed=seed) | low_rank(TEXT, 3072, 768, seed=seed)
    save_file({key: tensor * 3 if tensor.ndim else tensor for key, tensor in lora.items()}, folder / "stack_lora.safetensors")
    save_file({f"{BLOCK}.{name}.oft_blocks": normal(40, 8, 8, seed=seed) for name in ("attn1.to_q", "attn2.to_k")}, folder / "stack_oft.safetensors")


@pytest.fixture(scope="module")
def folder(models_dir):
    write_files(models_dir / "loras")
    yield models_dir / "loras"
    for name in ("lora", "oft"):
        (models_dir / "loras" / f"stack_{name}.safetensors").unlink()


def entry(name: str, **inputs) -> dict:
    return {"class_type": "TriLoRAAdapterStack", "inputs": {"lora_name": f"stack_{name}.safetensors", "strength_clip": 0.5, "keep_rank": 0, **inputs}}


def graph(stacked: bool = True) -> dict[str, dict]:
    """Checkpoint -> stack of two files (or not) -> two steps of sampling -> picture."""
    prompt = {
        "load": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 1], "text": "a cat"}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "sample": {"class_type": "KSampler", "inputs": {
            "model": ["load", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["latent", 0], "seed": 1, "steps": 2, "cfg": 1.0,
            "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["load", 2]}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
    }  # fmt: skip
    if stacked:
        prompt["first"] = entry("lora", strength_model=0.8)
        prompt["second"] = entry("oft", strength_model=0.6, stack=["first", 0])
        prompt["apply"] = {"class_type": "TriLoRAApplyStack", "inputs": {"model": ["load", 0], "clip": ["load", 1], "stack": ["second", 0]}}
        prompt["sample"]["inputs"]["model"], prompt["text"]["inputs"]["clip"] = ["apply", 0], ["apply", 1]
    return prompt


def run(started_host, prompt: dict) -> tuple[list[int], set[str]]:
    """(bytes of the picture, ids of the nodes that were not run again)."""
    done = started_host.post_prompt(copy.deepcopy(prompt))
    with Image.open(io.BytesIO(started_host.view(done["outputs"]["show"]["images"][0]))) as picture:
        pixels = list(picture.tobytes())
    return pixels, {name for kind, message in done["status"]["messages"] if kind == "execution_cached" for name in message["nodes"]}


def apart(one: list[int], other: list[int]) -> int:
    """Largest difference of two pictures in steps of 1/255."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_a_stack_in_a_graph(started_host, folder):
    """Either order gives one picture, another than without the files; then one changed file changes it again."""
    before = len(started_host.log)  # other tests have used this server
    plain, _ = run(started_host, graph(stacked=False))
    prompt = graph()
    picture, _ = run(started_host, prompt)
    prompt["first"], prompt["second"] = entry("oft", strength_model=0.6), entry("lora", strength_model=0.8, stack=["first", 0])
    swapped, _ = run(started_host, prompt)
    assert apart(picture, swapped) <= 1 and apart(picture, plain) > 10

    prompt = graph()
    assert apart(run(started_host, prompt)[0], picture) <= 1
    prompt["sample"]["inputs"]["seed"] = 2
    _, cached = run(started_host, prompt)
    assert {"first", "second", "apply"} <= cached and "sample" not in cached
    write_files(folder, seed=9)
    changed, cached = run(started_host, graph())
    assert "load" in cached and not {"first", "second", "apply", "sample"} & cached
    assert apart(changed, picture) > 10
    assert not [line for line in started_host.log[before:].splitlines() if "trilora" in line.lower() and "error" in line.lower()]


def test_block_weights_in_a_graph(started_host, folder):
    """Typed, and over a link: all zeros is the plain picture, all ones that of the whole files, a part neither; nothing is read again."""
    plain, _ = run(started_host, graph(stacked=False))
    prompt = graph()
    whole, _ = run(started_host, prompt)
    prompt["line"] = {"class_type": "PrimitiveString", "inputs": {"value": "default=0"}}
    for name in ("first", "second"):
        prompt[name]["inputs"]["block_weights"] = ["line", 0]
    assert apart(run(started_host, prompt)[0], plain) <= 1
    prompt["line"]["inputs"]["value"] = "default=1"
    assert apart(run(started_host, prompt)[0], whole) <= 1
    prompt["first"]["inputs"]["block_weights"] = "default=0"  # the OFT alone
    part, cached = run(started_host, prompt)
    assert apart(part, whole) > 2 and apart(part, plain) > 2 and {"load", "line"} <= cached
    assert "apply" in run(started_host, prompt)[1]

    loader = {"class_type": "TriLoRALoader", "inputs": {"model": ["load", 0], "clip": ["load", 1], "lora_name": "stack_oft.safetensors", "strength_model": 0.6,
                                                      "strength_clip": 0.5, "keep_rank": 0, "block_weights": "MID1=1, IN=0, OUT=0"}}  # fmt: skip
    alone = graph()
    alone["apply"] = loader
    assert apart(run(started_host, alone)[0], part) <= 1
