"""The example workflows through a server of its own: what a person sees after pressing Run, Run again, and Cancel."""

import copy
import io
import json
import re
import time

import pytest
from comfyui_trilora.benchmarks.installation import ROOT
from comfyui_trilora.benchmarks.workflow import to_prompt
from comfyui_trilora.tests.host.server import HostError
from comfyui_trilora.tests.host.tiny_run import CHECKPOINT, PHOTOGRAPHS, write_photographs
from PIL import Image

SMALL = {
    "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT},
    "TriLoRATrainingDataset": {"folder": "prompt_photographs", "resolution": 64},
    "TriLoRAMethodTriLoRA": {"rank": 2, "sigma_init": "ones"},
    "TriLoRATrainingSettings": {"steps": 3, "learning_rate": 0.01, "schedule": "constant", "warmup": 0.0},
    "TriLoRASaveAdapter": {"name": "from a prompt/photographs"},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
}  # fmt: skip
SAVED = "from a prompt/photographs_00001_.safetensors"
STEPS = 100  # of the run that is cancelled; the log names every fifth
WAIT_SECONDS = 300


def small_prompt(started_host, name: str) -> dict[str, dict]:
    """One of the example workflows in API format, cut down to seconds."""
    prompt = to_prompt(json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")), started_host.object_info)
    for node in prompt.values():
        node["inputs"] |= SMALL.get(node["class_type"], {})
    return prompt


def node_id(prompt: dict, class_name: str) -> str:
    (found,) = [name for name, node in prompt.items() if node["class_type"] == class_name]
    return found


def pictures(started_host, entry: dict, prompt: dict, class_name: str) -> list[bytes]:
    """Pixels of what the nodes of a class show, in the order of their ids."""
    names = sorted((name for name, node in prompt.items() if node["class_type"] == class_name), key=int)
    images = [Image.open(io.BytesIO(started_host.view(entry["outputs"][name]["images"][0]))) for name in names]
    assert all(image.size == (64, 64) for image in images)
    return [image.tobytes() for image in images]


def cached(entry: dict) -> set[str]:
    """Ids of the nodes that were not run again."""
    return {name for kind, message in entry["status"]["messages"] if kind == "execution_cached" for name in message["nodes"]}


@pytest.fixture(scope="module")
def trained(started_host):
    """(prompt, history entry, the server's log meanwhile) of the training workflow."""
    write_photographs(started_host.base / "input" / "prompt_photographs", side=96)
    prompt, before = small_prompt(started_host, "train_trilora"), len(started_host.log)
    entry = started_host.post_prompt(prompt)
    return prompt, entry, started_host.log[before:]


def test_training_shows_the_loss_and_both_pictures(started_host, trained):
    prompt, entry, _ = trained
    curve = entry["outputs"][node_id(prompt, "TriLoRATrainAdapter")]["images"][0]
    assert Image.open(io.BytesIO(started_host.view(curve))).size == (960, 540)
    without, adapted = pictures(started_host, entry, prompt, "PreviewImage")
    assert without != adapted
    (report,) = entry["outputs"][node_id(prompt, "PreviewAny")]["text"]
    assert f"{len(PHOTOGRAPHS)} images, {len(PHOTOGRAPHS)} with captions" in report and "loss on fixed noise" in report


def test_the_file_is_saved_and_listed_by_every_loader(started_host, trained):
    prompt, entry, _ = trained
    assert (started_host.base / "output" / "loras" / SAVED).is_file()
    (text,) = entry["outputs"][node_id(prompt, "TriLoRASaveAdapter")]["text"]
    assert text.splitlines()[0].endswith(SAVED)
    for loader in ("TriLoRALoader", "LoraLoader", "LoraLoaderModelOnly"):
        choices = started_host.get_json(f"/object_info/{loader}")[loader]["input"]["required"]["lora_name"]
        assert SAVED in (choices[0] if isinstance(choices[0], list) else choices[1]["options"])


def test_the_log_says_what_happens_and_warns_of_nothing(started_host, trained):
    """Nothing that names the pack in the whole log is a warning or an error, not even a slow start."""
    *_, log = trained
    assert "training trilora on " in log and "training done" in log and "Traceback" not in log
    for line in started_host.log.splitlines():
        # other tests give the same host a broken preset file, of which it shall warn
        if "trilora" in line.lower() and "your presets" not in line:
            assert not [word for word in ("warning", "error", "failed", "exception") if word in line.lower()], line


def test_running_again_with_another_picture_seed_does_not_train_again(started_host, trained):
    prompt = copy.deepcopy(trained[0])
    prompt[node_id(prompt, "PrimitiveInt")]["inputs"]["value"] += 1
    entry = started_host.post_prompt(prompt)
    assert {node_id(prompt, "TriLoRATrainingDataset"), node_id(prompt, "TriLoRATrainAdapter")} <= cached(entry)
    assert pictures(started_host, entry, prompt, "PreviewImage") != pictures(started_host, trained[1], trained[0], "PreviewImage")


def test_the_loader_applies_the_file(started_host, trained):
    """Strength 1 changes the picture, strength 0 is the picture without an adapter, to the last bit."""
    prompt = small_prompt(started_host, "apply_trilora")
    loader = prompt[node_id(prompt, "TriLoRALoader")]["inputs"]
    loader["lora_name"] = SAVED
    without, adapted = pictures(started_host, started_host.post_prompt(prompt), prompt, "SaveImage")
    loader["strength_model"] = 0.0
    again, nothing = pictures(started_host, started_host.post_prompt(prompt), prompt, "SaveImage")
    assert without != adapted and without == again == nothing


def dataset_prompt(trained, **changes) -> tuple[dict, str]:
    """(prompt that only reads the folder and shows the summary, id of its dataset node)."""
    wanted = ("CheckpointLoaderSimple", "TriLoRATrainingDataset")
    prompt = {name: copy.deepcopy(node) for name, node in trained[0].items() if node["class_type"] in wanted}
    dataset = node_id(prompt, "TriLoRATrainingDataset")
    prompt[dataset]["inputs"] |= changes
    prompt["show"] = {"class_type": "PreviewAny", "inputs": {"source": [dataset, 1]}}
    return prompt, dataset


def test_a_caption_that_changed_is_read_again(started_host, trained):
    """The dataset node notices a changed file, and only then runs again."""
    prompt, dataset = dataset_prompt(trained)
    started_host.post_prompt(copy.deepcopy(prompt))
    assert dataset in cached(started_host.post_prompt(copy.deepcopy(prompt)))
    (started_host.base / "input" / "prompt_photographs" / "coffee.txt").write_text("", encoding="utf-8")
    entry = started_host.post_prompt(prompt)
    assert dataset not in cached(entry)
    assert f"{len(PHOTOGRAPHS)} images, {len(PHOTOGRAPHS) - 1} with captions" in entry["outputs"]["show"]["text"][0]


@pytest.mark.parametrize("folder", ["no_such_folder", "../models"])
def test_a_wrong_folder_is_refused_before_anything_runs(started_host, trained, folder):
    prompt, _ = dataset_prompt(trained, folder=folder)
    with pytest.raises(HostError, match="refused the prompt") as refused:
        started_host.post_prompt(prompt)
    assert f"folder='{folder}'" in str(refused.value) and "ComfyUI's input folder" in str(refused.value)


def test_cancelling_keeps_what_was_learned_and_the_server_goes_on(started_host, trained):
    """POST /interrupt in the middle of a run: a file in output/loras, no failure, and the next prompt works."""
    prompt, before = copy.deepcopy(trained[0]), len(started_host.log)
    prompt[node_id(prompt, "TriLoRATrainingSettings")]["inputs"].update(steps=STEPS, training_seed=7)
    queued, deadline = started_host.queue_prompt(prompt), time.monotonic() + WAIT_SECONDS
    while not re.search(rf"step \d+/{STEPS} ", started_host.log[before:]):
        assert time.monotonic() < deadline, started_host.log[-2000:]
        time.sleep(0.1)
    started_host.post_json("/interrupt", {})
    with pytest.raises(HostError, match="interrupt"):
        started_host.wait_for(queued)
    assert "Traceback" not in started_host.log[before:]
    (file,) = (started_host.base / "output" / "loras").glob("trilora_stopped_at_*.safetensors")
    done = int(re.match(r"trilora_stopped_at_(\d+)_", file.name)[1])
    assert 0 < done < STEPS and file.stat().st_size > 10_000
    assert f"stopped after {done} of {STEPS} steps; saved as {file}" in started_host.log
    started_host.post_prompt(dataset_prompt(trained)[0])
