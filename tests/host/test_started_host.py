"""A server process with the stock nodes: starting, running a saved workflow, and reporting errors."""

import io
import json
from pathlib import Path

import pytest
from comfyui_trilora.benchmarks.workflow import to_prompt
from comfyui_trilora.tests.host.server import HostError
from PIL import Image

STOCK = json.loads((Path(__file__).parent / "stock_workflow.json").read_text(encoding="utf-8"))


@pytest.fixture
def prompt(started_host) -> dict:
    return to_prompt(STOCK, started_host.object_info)


def test_a_saved_workflow_becomes_the_prompt_the_front_end_would_send(prompt):
    assert {node["class_type"] for node in prompt.values()} == {
        "CheckpointLoaderSimple", "CLIPTextEncode", "EmptyLatentImage", "KSampler", "VAEDecode", "SaveImage",
    }  # fmt: skip
    (sampler,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "KSampler")
    assert sampler["steps"] == 2 and sampler["sampler_name"] == "euler" and sampler["denoise"] == 1.0
    assert sampler["model"] == ["4", 0], "the bypassed LoRA loader hands its model on"


def test_the_stock_workflow_gives_a_picture(started_host, prompt):
    entry = started_host.post_prompt(prompt)
    (picture,) = entry["outputs"]["9"]["images"]
    image = Image.open(io.BytesIO(started_host.view(picture)))
    assert image.size == (64, 64)
    assert max(high - low for low, high in image.getextrema()) > 10


def test_a_refused_prompt_names_the_reason(started_host, prompt):
    prompt["3"]["inputs"]["steps"] = -5
    with pytest.raises(HostError, match="steps"):
        started_host.post_prompt(prompt)


def test_a_failing_node_is_named(started_host, prompt, models_dir):
    broken = models_dir / "checkpoints" / "broken.safetensors"
    broken.write_bytes(b"not a safetensors file")
    prompt["4"]["inputs"]["ckpt_name"] = broken.name
    try:
        with pytest.raises(HostError, match=r"node 4 \(CheckpointLoaderSimple\) failed"):
            started_host.post_prompt(prompt)
    finally:
        broken.unlink()


def test_the_log_is_at_hand(started_host):
    assert "Starting server" in started_host.log
