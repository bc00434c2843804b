"""The page's own scripts: which saved values a node takes, and when the lists of files are read anew; needs Node.js."""

import copy
import json
from pathlib import Path

import pytest
from comfyui_trilora.tests.page_scripts import NODE_JS, run_script

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "object_info.json").read_text(encoding="utf-8"))
SAVED = sorted((ROOT / "tests" / "golden" / "workflows").glob("*/*.json"))
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NEW = {"name": "appended", "section": "optional", "type": "STRING", "default": ""}
pytestmark = pytest.mark.skipif(NODE_JS is None, reason="no Node.js to run the page's scripts with")

# A node class as both front ends have it: values go to its widgets one by one; those not given keep their default.
LOAD = """
await import("./saved_values.js");
class Node {
  constructor(inputs) { this.widgets = inputs.map(({ name, default: value, linked }) => [{ name, value, linkedWidgets: linked && [{}] }, ...(linked ? [{ name: linked, value: "fixed" }] : [])]).flat(); }
  configure(saved) {
    this.widgets.forEach((widget, n) => { if (n < (saved.widgets_values?.length ?? 0)) widget.value = saved.widgets_values[n]; });
  }
}
answer(given.map(({ type, inputs, saved }) => {
  const Kind = class extends Node {};
  app.extensions[0].beforeRegisterNodeDef(Kind, { name: type, input: { required: Object.fromEntries(inputs.map((input) => [input.name, input])) } });
  const node = new Kind(inputs);
  const before = JSON.stringify(saved);
  node.configure(saved);
  if (JSON.stringify(saved) !== before) throw new Error("the saved node was changed");
  return Object.fromEntries(node.widgets.map(({ name, value }) => [name, value]));
}));
"""


def widgets_of(kind: str) -> list[dict]:
    return [entry for entry in GOLDEN[kind]["inputs"] if entry["type"] in WIDGETS]


def nodes(path: Path) -> list[dict]:
    saved = json.loads(path.read_text(encoding="utf-8"))
    return [node for node in saved["nodes"] if node["type"] in GOLDEN]


def loaded(folder: Path, saved: list[dict], more: tuple[dict, ...] = ()) -> list[dict]:
    given = [{"type": node["type"], "inputs": [*widgets_of(node["type"]), *more], "saved": node} for node in saved]
    return run_script(folder, LOAD, given)


@pytest.mark.parametrize("path", SAVED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_input_that_was_added_since_keeps_its_default(path, tmp_path):
    saved = nodes(path)
    for node, values in zip(saved, loaded(tmp_path, saved, (NEW,)), strict=True):
        names = [entry["name"] for entry in widgets_of(node["type"])]
        assert values["appended"] == "", f"{node['type']} takes {values['appended']!r}"
        assert [values[name] for name in names] == (node.get("widgets_values") or [])[: len(names)], node["type"]


def test_the_saved_files_have_what_is_dropped():
    """Otherwise the test above would show nothing: front end 1.27 saves texts of nodes, and inputs of all widgets."""
    surplus = [len(node.get("widgets_values") or []) - len(widgets_of(node["type"])) for path in SAVED for node in nodes(path)]
    assert set(surplus) == {0, 1} and surplus.count(1) > 20
    for path in SAVED:
        for node in nodes(path):
            assert [entry["name"] for entry in node["inputs"] if "widget" in entry] == [entry["name"] for entry in widgets_of(node["type"])]


def test_selectors_after_generation_and_later_values_stay(tmp_path):
    inputs = [{"name": "seed", "default": 0, "linked": "control_after_generate"}, {"name": "steps", "default": 1}, NEW]
    listed = [{"name": name, "widget": {"name": name}} for name in ("seed", "steps", "appended")]
    saved = {"widgets_values": [7, "randomize", 20, "mine", "12 steps in 3 s"], "inputs": listed}
    given = [{"type": "TriLoRANew", "inputs": inputs, "saved": saved}, {"type": "TriLoRANew", "inputs": inputs, "saved": {**saved, "inputs": listed[:2]}}]
    both = run_script(tmp_path, LOAD, given)
    assert [list(values.values()) for values in both] == [[7, "randomize", 20, "mine"], [7, "randomize", 20, ""]]


def test_values_are_kept_where_the_inputs_with_widgets_are_not_listed(tmp_path):
    """So in files of other programs, and of older front ends, which list only inputs that a link replaced."""
    (node,) = [node for node in nodes(SAVED[0].parent / "apply_trilora.json") if node["type"] == "TriLoRALoader"]
    without, linked = copy.deepcopy(node), copy.deepcopy(node)
    without["inputs"] = [{"name": entry["name"], "type": entry["type"]} for entry in node["inputs"] if "widget" not in entry]
    linked["inputs"] = [*without["inputs"], {"name": "block_weights", "widget": {"name": "block_weights"}}]
    del without["widgets_values"][5:]
    for values in loaded(tmp_path, [without, linked]):
        assert list(values.values()) == node["widgets_values"]


def test_other_nodes_and_nodes_without_values_are_left_alone(tmp_path):
    saved = {"widgets_values": {"a": 1}, "inputs": []}
    assert run_script(tmp_path, LOAD, [{"type": "TriLoRANew", "inputs": [NEW], "saved": saved}, {"type": "TriLoRANew", "inputs": [NEW], "saved": {}}]) == [{"appended": ""}] * 2


REFRESH = """
await import("./refresh_lists.js");
const seen = [];
for (const events of given) {
  for (const [name, detail] of events) api.tell(name, detail);
  seen.push(app.refreshed);
}
answer(seen);
"""
IDLE, BUSY = ["status", {"exec_info": {"queue_remaining": 0}}], ["status", {"exec_info": {"queue_remaining": 1}}]


def test_the_lists_are_read_once_after_a_run_that_saved(tmp_path):
    saved, success = ["trilora.saved", {}], ["execution_success", {}]
    runs = [
        [BUSY, success, IDLE],
        [BUSY, saved, BUSY, saved, success, IDLE],
        [BUSY, success, IDLE],
        [BUSY, saved, ["execution_error", {}], IDLE],
        [BUSY, saved, ["execution_interrupted", {}], IDLE],
        [saved, BUSY, IDLE],
        [["status", None], IDLE],
    ]
    assert run_script(tmp_path, REFRESH, runs) == [0, 1, 1, 2, 3, 4, 4]
