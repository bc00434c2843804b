"""What the front end of this host makes of our nodes, in a browser: saved values, texts of files, lists of files.

Needs Chromium and the package playwright-core, which NODE_PATH has to name; left out elsewhere. tests/browser has the scripts.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from comfyui_trilora.benchmarks.installation import ROOT
from comfyui_trilora.tests.host.adapter_files import low_rank
from comfyui_trilora.tests.host.server import StartedHost
from safetensors.torch import save_file

NODE_JS = shutil.which("node")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HAS_DRIVER = any((Path(folder) / "playwright-core").is_dir() for folder in os.environ.get("NODE_PATH", "").split(os.pathsep))
SAVED = sorted((ROOT / "tests" / "golden" / "workflows").glob("*/*.json"))
EVIL = "<img src=x onerror=window.hacked=1>"
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
# Gives every node one more input, as a later version may.
APPEND = """

def _with_one_more(node):
    schema = node.define_schema.__func__

    def define_schema(cls):
        made = schema(cls)
        made.inputs.append(io.String.Input("appended", default="new", optional=True))
        return made

    node.define_schema = classmethod(define_schema)


for _node in NODES:
    _with_one_more(_node)
"""
pytestmark = pytest.mark.skipif(not (NODE_JS and CHROMIUM and HAS_DRIVER), reason="no Chromium, or no playwright-core in NODE_PATH")


def ask(script: str, **given):
    """What a script of tests/browser answers."""
    done = subprocess.run([NODE_JS, ROOT / "tests" / "browser" / script], input=json.dumps(given), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def settings(base: Path, **chosen) -> None:
    file = base / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"Comfy.TutorialCompleted": True, **chosen}), encoding="utf-8")


@pytest.fixture(params=[False, True], ids=["canvas", "nodes 2.0"])
def base(request, tmp_path) -> Path:
    """A base directory for the classic canvas, and for Nodes 2.0 where the front end has them."""
    settings(tmp_path / "base", **{"Comfy.VueNodes.Enabled": request.param})
    return tmp_path / "base"


def test_saved_values_stay_where_they_were_when_an_input_is_added(host, base, tmp_path):
    later = tmp_path / "later"
    shutil.copytree(ROOT, later, ignore=shutil.ignore_patterns(".git", "__pycache__", "tests", "benchmarks"))
    with (later / "nodes" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write(APPEND)
    workflows = [(f"{path.parent.name}/{path.name}", json.loads(path.read_text(encoding="utf-8"))) for path in SAVED]
    with StartedHost(host.path, base, pack=later) as started:
        assert "appended" in started.object_info["TriLoRATrainAdapter"]["input"]["optional"]
        answers = ask("open_saved.mjs", url=started.url, workflows=workflows)
    for (name, saved), (_, shown) in zip(workflows, answers, strict=True):
        for node in saved["nodes"]:
            if not node["type"].startswith("TriLoRA"):
                continue
            values, names = shown[str(node["id"])]["values"], [entry["name"] for entry in node["inputs"] if "widget" in entry]
            assert values["appended"] == "new", f"{name}: {node['type']}"
            assert [values[key] for key in names] == (node.get("widgets_values") or [])[: len(names)], f"{name}: {node['type']}"


def adapter(file: Path, trigger: str = "") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(low_rank(LAYER, 320, 320), file, metadata={"modelspec.trigger_phrase": trigger, "ss_output_name": trigger})


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def test_texts_of_files_are_shown_as_texts(host, base):
    adapter(base / "models" / "loras" / "evil.safetensors", EVIL + " a<b &lt; *c* [d](e)\nnext")
    workflow = {
        "1": node("TriLoRALoadAdapter", lora_name="evil.safetensors"),
        "2": node("TriLoRAInspectAdapter", adapter=["1", 0]),
        "3": node("PreviewAny", source=["1", 1]),
        "4": node("TriLoRASaveAdapter", adapter=["1", 0], name=EVIL, dtype="fp16"),
    }
    with StartedHost(host.path, base, pack=ROOT) as started:
        answer = ask("show_texts.mjs", url=started.url, workflows=[("evil", workflow)])
    assert answer["evil"]["hacked"] is None and "evil error" not in answer
    shown = [text.replace("\u2060", "").split("\n") for text, _ in answer["evil"]["texts"]]
    assert any(f"trigger: {EVIL} a<b &lt; ∗c∗ [d](e)" in lines and "next" in lines for lines in shown), shown


def test_a_saved_file_is_listed_without_pressing_r(host, base):
    """Once for each run that saved something; a run whose nodes are all cached saves nothing."""
    adapter(base / "models" / "loras" / "old.safetensors")
    workflow = {
        "1": node("TriLoRALoadAdapter", lora_name="old.safetensors"),
        "2": node("TriLoRASaveAdapter", adapter=["1", 0], name="new", dtype="fp16"),
        "3": node("TriLoRASaveAdapter", adapter=["1", 0], name="more", dtype="fp16"),
        "4": node("PreviewAny", source=["1", 1]),
    }
    reading = {key: workflow[key] for key in "14"}
    with StartedHost(host.path, base, pack=ROOT) as started:
        first, cached, without = ask("refresh_lists.mjs", url=started.url, workflows=[("a", workflow), ("b", workflow), ("c", reading)])
    assert {"old.safetensors", "new_00001_.safetensors", "more_00001_.safetensors"} <= set(first["listed"])
    assert [run["refreshed"] for run in (first, cached, without)] == [1, 1, 1]


def test_the_menu_of_presets_loses_nothing(host, base):
    mine = f"# mine\rA:IN00=0\rB:default=0.5\r{EVIL}:default=0.25\rconstructor:default=0\rC:constructor\r"
    steps = [
        ["store", "mine.txt", mine], ["delete", "B"], ["import", "mine.txt", "Z:default=1\n", False], ["import", "mine.txt", "no preset\n", True],
        ["import", "mine.txt", "Z:default=1\n", True], ["store", "saved.txt", "  Own : default=0.5\nOther:default=1\n"], ["save", "Own", True], ["open"],
    ]  # fmt: skip
    with StartedHost(host.path, base, pack=ROOT) as started:
        answer = ask("preset_panel.mjs", url=started.url, steps=steps, picture=os.environ.get("TRILORA_PICTURES"))
    kept = mine.replace("B:default=0.5\r", "")
    files = [step["files"] for step in answer["steps"]]
    assert [one.get("mine.txt") for one in files[:5]] == [mine, kept, kept, kept, "Z:default=1\n"]
    assert files[6]["saved.txt"] == "Other:default=1\nOwn:default=1, IN=0\n"
    assert EVIL in answer["steps"][1]["menu"] and "constructor" in answer["steps"][1]["menu"] and {"Own", "Other", "Z"} <= set(answer["steps"][7]["menu"])
    assert any("cannot be used" in said for said in answer["steps"][3]["said"])
    assert {step["hacked"] for step in answer["steps"]} == {None}
