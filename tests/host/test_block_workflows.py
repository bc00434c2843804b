"""The examples of block-wise training in a started ComfyUI: every training, every file and every picture of one run."""

import io
import json
from itertools import combinations
from pathlib import Path

import pytest
from comfyui_trilora.benchmarks.workflow import to_prompt
from comfyui_trilora.tests.host.tiny_run import CHECKPOINT, write_photographs
from PIL import Image
from safetensors import safe_open

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
SIDE = 64
# the tiny SD1.5 has one residual block a level: its input blocks are 0 to 7, its output blocks 0 to 7
LEVELS = {"upper": "IN01-IN02=1, OUT06-OUT07=1", "middle": "IN03-IN04=1, OUT04-OUT05=1", "bottom": "IN05-IN06=1, OUT02-OUT03=1"}


def small(name: str, object_info: dict) -> dict[str, dict]:
    """An example as it is, but two steps at 64 pixels, at a learning rate that shows, and levels of the tiny model for the presets."""
    prompt = to_prompt(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), object_info)
    changes = {
        "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT}, "TriLoRATrainingDataset": {"resolution": SIDE, "folder": "my_images"}, "TriLoRAImageDataset": {"resolution": SIDE},
        "TriLoRATrainingSettings": {"steps": 2, "learning_rate": 0.02}, "EmptyLatentImage": {"width": SIDE, "height": SIDE}, "KSampler": {"steps": 2},
    }  # fmt: skip
    for node in prompt.values():
        node["inputs"] |= changes.get(node["class_type"], {})
        if node["inputs"].get("batch_size") == 8:
            node["inputs"]["batch_size"] = 2
        for field in ("rank", "block_weights"):
            level = str(node["inputs"].get(field)).removeprefix("Block-wise ").removesuffix(" (SD1.x)")
            if level in LEVELS:
                node["inputs"][field] = f"default=0, {LEVELS[level]}"
            elif level == "full":
                node["inputs"][field] = ""
    return prompt


@pytest.fixture(scope="module")
def run(started_host):
    """Function: name of an example -> (its outputs by node title, ids of the nodes that were not run again)."""
    write_photographs(started_host.base / "input" / "my_images", side=96)

    def of(name: str):
        prompt = small(name, started_host.object_info)
        done = started_host.post_prompt(prompt)
        cached = {node for kind, message in done["status"]["messages"] if kind == "execution_cached" for node in message["nodes"]}
        return {prompt[node]["_meta"]["title"]: found for node, found in done["outputs"].items()}, {prompt[node]["_meta"]["title"] for node in cached}

    return of


def cells(started_host, outputs: dict, columns: int, count: int) -> list[Image.Image]:
    """The pictures of a Picture Grid, from where they stand in it."""
    (saved,) = outputs["images"]
    whole = Image.open(io.BytesIO(started_host.view(saved))).convert("RGB")
    rows, gap = -(-count // columns), (whole.width - columns * SIDE) // (columns + 1)
    bottoms = [whole.height - gap - row * (whole.height - gap) // rows for row in reversed(range(rows))]
    return [whole.crop((left, bottoms[n // columns] - SIDE, left + SIDE, bottoms[n // columns])) for n in range(count) for left in [gap + n % columns * (SIDE + gap)]]


def layers(file: Path) -> tuple[set[str], dict[str, str]]:
    with safe_open(file, "pt") as opened:
        return {key.split(".")[0] for key in opened.keys()}, opened.metadata()


def test_a_character_and_a_style_in_one_run(started_host, run):
    outputs, _ = run("character_plus_style")
    files = {part: layers(Path(outputs[f"Save the {part}"]["text"][0].splitlines()[0])) for part in ("character", "style")}
    (character, about), (style, plan) = files["character"], files["style"]
    assert style < character and all("down_blocks_0" in name or "up_blocks_3" in name for name in style)
    assert "trilora.block_plan" in plan and "trilora.block_plan" not in about
    assert "backward pass" in outputs["Report of the style"]["text"][0] and "regularisation" in outputs["Report of the character"]["text"][0]
    shown = cells(started_host, outputs["All three, picture"], 3, 3)
    assert all(one.tobytes() != other.tobytes() for one, other in combinations(shown, 2))
    _, cached = run("character_plus_style")
    assert {"Train the character", "Train the style", "Character and style"} <= cached


def test_the_ablation_in_one_run(started_host, run):
    """Eight pictures, no two alike: what is trained in some blocks is not what is left of the whole in the same blocks."""
    outputs, _ = run("block_ablation")
    files = {level: layers(Path(outputs[f"Save: {level}"]["text"][0].splitlines()[0]))[0] for level in ("full", *LEVELS)}
    parts = [files[level] for level in LEVELS]
    assert all(part and part < files["full"] for part in parts) and not any(one & other for one, other in combinations(parts, 2))
    shown = cells(started_host, outputs["Both rows, picture"], 4, 8)
    assert all(one.tobytes() != other.tobytes() for one, other in combinations(shown, 2))
