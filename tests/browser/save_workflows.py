"""Saves every example workflow, and one with the nodes that are in none, from ComfyUI's page after a run.

    COMFYUI_PATH=<ComfyUI> NODE_PATH=<node_modules with playwright-core> <its python> tests/browser/save_workflows.py

Writes tests/golden/workflows/<version of the front end>/*.json, and a picture of each beside the system's other temporary
files. For a new front end or a new workflow: a file that is there already is what people have, and stays.
"""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # as tests/conftest.py does
    spec = importlib.machinery.ModuleSpec("comfyui_trilora", loader=None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    sys.modules["comfyui_trilora"] = importlib.util.module_from_spec(spec)

from comfyui_trilora.benchmarks import installation  # noqa: E402
from comfyui_trilora.benchmarks.workflow import widget_slots  # noqa: E402

# The tiny checkpoint with the blocks of SD1.5 (12 IN, 3 MID, 12 OUT), which presets ask for.
BLOCKS = {"num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3}
SMALL = {
    "CheckpointLoaderSimple": {"ckpt_name": "tiny_sd15.safetensors"},
    "TriLoRATrainingDataset": {"folder": "my_images", "resolution": 64},
    "TriLoRAImageDataset": {"resolution": 64},
    "TriLoRATrainingSettings": {"steps": 2},
    "EmptyLatentImage": {"width": 64, "height": 64, "batch_size": 1},
    "KSampler": {"steps": 1},
}


def shrunk(workflow: dict, object_info: dict) -> dict:
    """The workflow with a small model, small pictures and few steps, so that it runs in seconds on a processor."""
    for node in workflow["nodes"]:
        if node["type"] in SMALL:
            slots = list(widget_slots(node, object_info[node["type"]]))
            for name, value in SMALL[node["type"]].items():
                node["widgets_values"][slots.index(name)] = value
    return workflow


def other_nodes() -> dict:
    """API format of a workflow with the nodes that no example has; it uses a file that an example writes."""

    def node(kind: str, **inputs) -> dict:
        return {"class_type": kind, "inputs": inputs}

    name = "my_style_00001_.safetensors"
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny_sd15.safetensors"),
        "2": node("TriLoRALoadAdapter", lora_name=name),
        "3": node("TriLoRAMergeAdapters", adapter_a=["2", 0], adapter_b=["2", 0], model=["1", 0]),
        "4": node("TriLoRAResizeAdapter", adapter=["3", 0], rank=2, gains="1, 0.5"),
        "5": node("TriLoRABakeAdapter", model=["1", 0], adapter=["4", 0], block_weights="default=1, OUT=0.5"),
        "6": node("TriLoRAAdapterStack", lora_name=name, block_weights="default=1, IN=0"),
        "7": node("TriLoRAApplyStack", model=["1", 0], stack=["6", 0]),
        "8": node("TriLoRAMethodLoRA", rank=2),
        "9": node("TriLoRAExtractAdapter", model_tuned=["7", 0], model_base=["1", 0], method=["8", 0]),
        "10": node("TriLoRAInspectAdapter", adapter=["5", 0]),
        "11": node("TriLoRAPlanFromAdapter", adapter=["2", 0], model=["1", 0]),
        "12": node("PreviewAny", source=["11", 1]),
        "13": node("PreviewAny", source=["4", 1]),
    }


def base_folder(base: Path, settings: dict | None = None) -> Path:
    """Fills a base directory: the small model, images to train on, and the settings of a page that asks nothing."""
    from comfyui_trilora.tests.host import tiny_checkpoint
    from comfyui_trilora.tests.host.tiny_run import write_photographs

    tiny_checkpoint.SD15_UNET = {**tiny_checkpoint.SD15_UNET, **BLOCKS}
    (base / "models" / "loras").mkdir(parents=True)
    tiny_checkpoint.write_sd15(base / "models" / "checkpoints" / "tiny_sd15.safetensors")
    write_photographs(base / "input" / "my_images", side=96)
    for name in ("my_character", "my_style"):
        (base / "input" / name).symlink_to(base / "input" / "my_images", target_is_directory=True)
    user = base / "user" / "default"
    user.mkdir(parents=True)
    quiet = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}
    (user / "comfy.settings.json").write_text(json.dumps({**quiet, **(settings or {})}), encoding="utf-8")
    return base


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        host = installation.import_host(installation.find_host(), ["--cpu", "--base-directory", str(base)])
        from comfyui_trilora.tests.host.server import StartedHost

        target = ROOT / "tests" / "golden" / "workflows" / metadata.version("comfyui-frontend-package")
        pictures = Path(tempfile.mkdtemp(prefix="trilora-saved-"))
        with StartedHost(host.path, base_folder(base), pack=ROOT) as started:
            files = sorted((ROOT / "workflows").glob("*.json"), key=lambda path: "train" not in path.stem)
            wanted = [(path.stem, shrunk(json.loads(path.read_text(encoding="utf-8")), started.object_info)) for path in files]
            wanted.append(("other_nodes", other_nodes()))
            request = {"url": started.url, "folder": str(pictures), "workflows": wanted}
            script = ROOT / "tests" / "browser" / "save_after_run.mjs"
            subprocess.run(["node", script], input=json.dumps(request), text=True, check=True)
        target.mkdir(parents=True, exist_ok=True)
        for saved in sorted(pictures.glob("*.json")):
            if not (target / saved.name).exists():
                (target / saved.name).write_text(saved.read_text(encoding="utf-8"), encoding="utf-8")
        sys.stdout.write(f"saved to {target}; pictures in {pictures}\n")


if __name__ == "__main__":
    main()
