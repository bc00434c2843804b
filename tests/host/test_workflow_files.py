"""The example workflows, the list of nodes and the help pages against what a started ComfyUI says of itself."""

import copy
import io
import json
from pathlib import Path

import pytest
from comfyui_trilora.benchmarks.workflow import NOTES, to_prompt
from comfyui_trilora.tests.host.server import PACK_FOLDER
from comfyui_trilora.tests.host.tiny_run import CHECKPOINT, write_photographs
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "workflows").glob("*.json"))}
# What a person chooses; everything else must be legal as it stands in the file.
CHOSEN = {("CheckpointLoaderSimple", "ckpt_name"), ("TriLoRATrainingDataset", "folder"), ("TriLoRALoader", "lora_name"), ("TriLoRAAdapterHook", "lora_name")}
# What an example shows; a new node has it empty.
EXAMPLES = {"trigger", "schedule", "weights", ("TriLoRABlockPlan", "rank"), ("TriLoRALoader", "block_weights"), ("TriLoRASaveAdapter", "name"),
            ("TriLoRAPictureGrid", "labels"), ("TriLoRAPictureGrid", "columns")}


@pytest.fixture(scope="module")
def object_info(started_host) -> dict:
    return started_host.object_info


@pytest.fixture(params=FILES)
def saved(request) -> dict:
    return json.loads(FILES[request.param].read_text(encoding="utf-8"))


def entries(description: dict) -> dict[str, tuple]:
    """Input name -> (type or list of choices, options), required ones first."""
    found = {}
    for section in ("required", "optional"):
        for name, entry in description["input"].get(section, {}).items():
            found[name] = (entry[0], entry[1] if len(entry) > 1 else {})
    return found


def is_legal(value, kind, options: dict) -> bool:
    if isinstance(kind, list) or kind == "COMBO":
        return value in (kind if isinstance(kind, list) else options["options"])
    if kind in ("INT", "FLOAT"):
        number = isinstance(value, int if kind == "INT" else (int, float)) and not isinstance(value, bool)
        return number and options.get("min", value) <= value <= options.get("max", value)
    return isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind])


def test_every_node_exists_with_the_slots_of_the_file(saved, object_info):
    for node in saved["nodes"]:
        if node["type"] in NOTES:
            continue
        assert node["type"] in object_info
        description = object_info[node["type"]]
        known = entries(description)
        for entry in node["inputs"]:
            kind = known[entry["name"]][0]
            assert entry["type"] == ("COMBO" if isinstance(kind, list) else kind), f"{node['type']}: {entry['name']}"
        outputs = list(zip(description["output_name"], description["output"], strict=True))
        found = [(entry["name"], entry["type"]) for entry in node["outputs"]]
        # newer hosts hand some pictures and texts on; files saved with an older one lack these outputs
        assert found == outputs[: len(found)], node["type"]
        if node["type"].startswith("TriLoRA"):
            assert len(found) == len(outputs) and {entry["name"] for entry in node["inputs"]} == set(known)


def test_every_required_input_is_given_and_every_value_is_legal(saved, object_info):
    for node in to_prompt(saved, object_info).values():
        kind = node["class_type"]
        known = entries(object_info[kind])
        missing = set(object_info[kind]["input"].get("required", {})) - set(node["inputs"])
        assert not missing, f"{kind}: {missing}"
        for name, value in node["inputs"].items():
            if not isinstance(value, list) and (kind, name) not in CHOSEN:
                assert is_legal(value, *known[name]), f"{kind}: {name}={value!r}"


def test_the_files_hold_our_defaults(saved, object_info):
    """A person who opens an example meets the same values as one who adds the nodes; only what has to be chosen differs."""
    for node in to_prompt(saved, object_info).values():
        if node["class_type"].startswith("TriLoRA"):
            for name, (_, options) in entries(object_info[node["class_type"]]).items():
                value = node["inputs"].get(name)
                if "default" in options and not isinstance(value, list) and not {name, (node["class_type"], name)} & EXAMPLES:
                    assert value == options["default"], f"{node['class_type']}: {name}"


def test_the_list_for_the_manager_repeats_the_schemas(object_info):
    listed = json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))
    ours = {name: info["description"] for name, info in object_info.items() if info["python_module"].endswith(PACK_FOLDER)}
    assert listed == ours


def test_every_help_page_is_served_and_names_every_input_and_output(started_host, object_info):
    for name, info in object_info.items():
        if not info["python_module"].endswith(PACK_FOLDER):
            continue
        page = started_host.get(f"/extensions/{PACK_FOLDER}/docs/{name}.md").decode()
        assert page.startswith(f"# {info['display_name']}\n")
        named = [options.get("display_name") or field for field, (_, options) in entries(info).items()]
        assert [word for word in (*named, *info["output_name"]) if f"**{word}**" not in page] == [], name


def test_the_host_lists_the_examples_with_their_pictures(started_host):
    assert sorted(started_host.get_json("/workflow_templates")[PACK_FOLDER]) == sorted(FILES)
    for name in FILES:
        assert started_host.get_json(f"/api/workflow_templates/{PACK_FOLDER}/{name}.json")["nodes"]
        picture = Image.open(io.BytesIO(started_host.get(f"/api/workflow_templates/{PACK_FOLDER}/{name}.jpg")))
        assert picture.format == "JPEG" and min(picture.size) >= 256


def test_the_examples_run_once_their_files_are_chosen(started_host, object_info):
    """All as they are, but small: two steps at 64 pixels, and pictures of 64 pixels after one step. Both files apply."""
    write_photographs(started_host.base / "input" / "my_images", side=96)
    small = {
        "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT}, "TriLoRATrainingDataset": {"resolution": 64}, "TriLoRATrainingSettings": {"steps": 2},
        "EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 1},
    }  # fmt: skip

    def prompt(name: str) -> dict[str, dict]:
        nodes = to_prompt(json.loads(FILES[name].read_text(encoding="utf-8")), object_info)
        for node in nodes.values():
            node["inputs"] |= small.get(node["class_type"], {})
        return nodes

    applying = prompt("apply_trilora")
    (loader,) = [node for node in applying.values() if node["class_type"] == "TriLoRALoader"]
    for number, name in enumerate(("train_trilora", "train_tlora"), 1):
        trained = started_host.post_prompt(prompt(name))["outputs"]
        path = next(outputs["text"][0].splitlines()[0] for outputs in trained.values() if "my_adapter" in str(outputs.get("text")))
        assert sum("images" in outputs for outputs in trained.values()) == 3, "the loss curve and both pictures"
        if number == 1:
            assert loader["inputs"]["lora_name"] == Path(path).name, "the name in the example is the first that Save Adapter gives"
        loader["inputs"]["lora_name"] = Path(path).name
        applied = started_host.post_prompt(copy.deepcopy(applying))["outputs"]
        without, adapted = (Image.open(io.BytesIO(started_host.view(outputs["images"][0]))) for _, outputs in sorted(applied.items(), key=lambda item: int(item[0])))
        assert without.size == adapted.size == (64, 64) and without.tobytes() != adapted.tobytes()
