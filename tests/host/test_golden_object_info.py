"""The descriptions of all nodes against the ones that people's saved workflows were made with (tests/golden/object_info.json).

A new input must be optional and last, a new output last. Such additions, and new nodes, are put into the golden file by

    TRILORA_WRITE_GOLDEN=1 python -m pytest tests/host/test_golden_object_info.py

which writes nothing while a change would break saved workflows.
"""

import copy
import json
import os

import pytest
from comfyui_trilora.benchmarks.installation import ROOT
from comfyui_trilora.tests.golden.schemas import differences, reduced

FILE = ROOT / "tests" / "golden" / "object_info.json"
COMMAND = "TRILORA_WRITE_GOLDEN=1 python -m pytest tests/host/test_golden_object_info.py"


@pytest.fixture
def now(host_nodes, pack) -> dict:
    classes = host_nodes.NODE_CLASS_MAPPINGS
    ours = {name: node for name, node in classes.items() if node.__module__.startswith(pack.__name__)}
    return json.loads(json.dumps({name: reduced(node.GET_NODE_INFO_V1()) for name, node in sorted(ours.items())}))


@pytest.fixture
def golden() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def test_saved_workflows_still_fit(golden, now):
    broken, added = differences(golden, now)
    assert not broken, "breaks saved workflows"
    if added and os.environ.get("TRILORA_WRITE_GOLDEN"):
        FILE.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        added = []
    assert not added, f"fits saved workflows; if it is meant: {COMMAND}"


def test_front_ends_list_every_input_in_a_saved_node(now):
    """By that the page knows which values are an input's own; inputs without a socket are not listed."""
    assert not [name for name, node in now.items() for slot in node["inputs"] if slot.get("socketless")]


NEW = {"name": "new", "section": "optional", "type": "INT", "default": 0}
# Each changes a node that has the inputs rank, alpha, core (a choice) and others, in this order.
BREAKING = {
    "another default": lambda inputs, outputs: inputs[0].update(default=99),
    "another type": lambda inputs, outputs: inputs[0].update(type="FLOAT"),
    "a narrower range": lambda inputs, outputs: inputs[0].update(min=5),
    "a choice is gone": lambda inputs, outputs: inputs[2]["options"].pop(),
    "another name": lambda inputs, outputs: inputs[0].update(name="ranks"),
    "another order": lambda inputs, outputs: inputs.reverse(),
    "an input is gone": lambda inputs, outputs: inputs.pop(),
    "a new required input": lambda inputs, outputs: inputs.append({**NEW, "section": "required"}),
    "a new input in the middle": lambda inputs, outputs: inputs.insert(1, NEW),
    "another output": lambda inputs, outputs: outputs[0].update(type="INT"),
    "an output is gone": lambda inputs, outputs: outputs.pop(),
    "a selector after generation": lambda inputs, outputs: inputs[0].update(control_after_generate=True),
}
HARMLESS = {
    "an optional input at the end": lambda inputs, outputs: inputs.append(NEW),
    "a wider range": lambda inputs, outputs: inputs[0].update(max=99999),
    "one more choice": lambda inputs, outputs: inputs[2]["options"].insert(0, "new"),
    "an output at the end": lambda inputs, outputs: outputs.append({"name": "new", "type": "INT", "is_list": False}),
}


@pytest.mark.parametrize("kind", [*BREAKING, *HARMLESS])
def test_a_change_is_told_from_an_addition(golden, kind):
    changed = copy.deepcopy(golden)
    node = changed["TriLoRAMethodTriLoRA"]
    {**BREAKING, **HARMLESS}[kind](node["inputs"], node["outputs"])
    broken, added = differences(golden, changed)
    assert bool(broken) is (kind in BREAKING), broken
    assert bool(added) is (kind in HARMLESS), added


def test_a_node_that_is_gone_or_new_is_seen(golden):
    fewer = {name: node for name, node in golden.items() if name != "TriLoRALoader"}
    assert differences(golden, fewer) == (["TriLoRALoader: is gone"], [])
    assert differences(fewer, golden) == ([], ["TriLoRALoader: is new"])
