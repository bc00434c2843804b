"""The example of scheduled blocks in a started ComfyUI: both pictures of one run, and what makes them differ."""

import io
import json
from pathlib import Path

import pytest
from comfyui_trilora.benchmarks.workflow import to_prompt
from comfyui_trilora.tests.host.hook_run import layers_of, low_rank_file
from comfyui_trilora.tests.host.server import HostError
from comfyui_trilora.tests.host.tiny_run import CHECKPOINT, load_checkpoint
from PIL import Image
from safetensors.torch import save_file

FILE = Path(__file__).resolve().parents[2] / "workflows" / "scheduled_blocks.json"


@pytest.fixture(scope="module")
def adapter(started_host, host_nodes, models_dir) -> str:
    """A LoRA of the tiny SD1.5 where Save Adapter writes; the server lists it without a restart."""
    folder = started_host.base / "output" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    layers = layers_of(load_checkpoint(host_nodes)[0], ("attn1.to_q", "attn2.to_v", "in_layers.2"))
    save_file(low_rank_file(layers, size=1.5), folder / "hooked.safetensors")
    return "hooked.safetensors"


@pytest.fixture
def pictures(started_host, adapter):
    """Function: schedule, None for the example's own -> both pictures, all the time and scheduled."""

    def run(schedule: str | None = None) -> list[Image.Image]:
        prompt = to_prompt(json.loads(FILE.read_text(encoding="utf-8")), started_host.object_info)
        small = {"CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT}, "EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 4},
                 "TriLoRAAdapterHook": {"lora_name": adapter}}  # fmt: skip
        for node in prompt.values():
            node["inputs"] |= small.get(node["class_type"], {})
            if node["inputs"].get("schedule") and schedule is not None:
                node["inputs"]["schedule"] = schedule
        outputs = started_host.post_prompt(prompt)["outputs"]
        files = sorted((file for node in outputs.values() for file in node.get("images", ())), key=lambda file: file["filename"])
        return [Image.open(io.BytesIO(started_host.view(file))) for file in files]

    return run


def test_the_example_runs_and_its_schedule_shows(pictures):
    always, scheduled = pictures()
    assert always.size == scheduled.size == (64, 64) and always.tobytes() != scheduled.tobytes()


def test_a_schedule_of_ones_changes_nothing(pictures):
    always, scheduled = pictures("default: 1; IN: 0:1, 1:1")
    assert always.tobytes() == scheduled.tobytes()


def test_a_block_of_another_model_is_named_where_the_model_is_known(pictures, started_host):
    with pytest.raises(HostError, match=r"KSampler.*failed.*hooked\.safetensors: schedule, in the line 'D07: 0:1, 1:0': .*names no block of this model"):
        pictures("D07: 1 -> 0")
