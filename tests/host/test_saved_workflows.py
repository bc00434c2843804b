"""Workflows that front ends saved after a run (tests/golden/workflows): every value and every link is where it was."""

import json

import pytest
from comfyui_trilora.benchmarks.installation import ROOT
from comfyui_trilora.benchmarks.workflow import NOTES, widget_values
from comfyui_trilora.tests.browser.save_workflows import SMALL, other_nodes

SAVED = sorted((ROOT / "tests" / "golden" / "workflows").glob("*/*.json"))
EXAMPLES = {path.stem: path for path in (ROOT / "workflows").glob("*.json")}


@pytest.fixture(params=SAVED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def saved(request):
    """(name of the example, the saved workflow)"""
    return request.param.stem, json.loads(request.param.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def infos(host_nodes, pack) -> dict:
    classes = host_nodes.NODE_CLASS_MAPPINGS
    ours = {name: node for name, node in classes.items() if node.__module__.startswith(pack.__name__)}
    return json.loads(json.dumps({name: node.GET_NODE_INFO_V1() for name, node in ours.items()}))


def ours(workflow: dict, infos: dict) -> dict[int, dict]:
    return {node["id"]: node for node in workflow["nodes"] if node["type"] in infos}


def ends(workflow: dict) -> set[tuple]:
    """(node, output slot, node, name of the input) of every link."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    return {(origin, slot, target, nodes[target]["inputs"][into]["name"]) for _, origin, slot, target, into, _ in workflow["links"]}


def test_every_example_was_saved_by_both_front_ends():
    front_ends = {path.parent.name for path in SAVED}
    assert len(front_ends) == 2 and {(path.parent.name, path.stem) for path in SAVED} == {
        (front_end, name) for front_end in front_ends for name in (*EXAMPLES, "other_nodes")
    }


def test_every_node_is_in_one_of_them(infos):
    for front_end in {path.parent for path in SAVED}:
        found = {node["type"] for path in front_end.glob("*.json") for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
        assert set(infos) <= found, front_end.name


def test_every_value_is_where_it_was(saved, infos):
    """What was given before the run: the example's values, smaller where SMALL says so."""
    name, workflow = saved
    if name == "other_nodes":
        given = {int(i): {k: v for k, v in node["inputs"].items() if not isinstance(v, list)} for i, node in other_nodes().items()}
    else:
        example = json.loads(EXAMPLES[name].read_text(encoding="utf-8"))
        given = {i: widget_values(node, infos[node["type"]]) | SMALL.get(node["type"], {}) for i, node in ours(example, infos).items()}
    for i, node in ours(workflow, infos).items():
        values = widget_values(node, infos[node["type"]])
        assert {key: values[key] for key in given[i]} == given[i], node["type"]


def test_values_that_nobody_gave_are_the_defaults(saved, infos):
    name, workflow = saved
    for i, node in ours(workflow, infos).items() if name == "other_nodes" else ():
        given = other_nodes()[str(i)]["inputs"]
        described = {**infos[node["type"]]["input"].get("required", {}), **infos[node["type"]]["input"].get("optional", {})}
        for key, value in widget_values(node, infos[node["type"]]).items():
            assert key in given or value == described[key][1]["default"], f"{node['type']}: {key}"


def test_every_link_is_where_it_was(saved, infos):
    name, workflow = saved
    if name == "other_nodes":
        links = {(int(v[0]), v[1], int(i), key) for i, node in other_nodes().items() for key, v in node["inputs"].items() if isinstance(v, list)}
    else:
        links = ends(json.loads(EXAMPLES[name].read_text(encoding="utf-8")))
    assert ends(workflow) == links


def test_every_slot_is_where_the_node_has_it(saved, infos):
    _, workflow = saved
    for node in workflow["nodes"]:
        if node["type"] in NOTES or node["type"] not in infos:
            continue
        info = infos[node["type"]]
        names = [*info["input_order"].get("required", ()), *info["input_order"].get("optional", ())]
        found = [entry["name"] for entry in node["inputs"]]
        plain = [entry["name"] for entry in node["inputs"] if "widget" not in entry]
        # front ends put slots with a widget behind those without
        assert set(found) <= set(names) and plain == [name for name in names if name in plain], node["type"]
        outputs = [(entry["name"], entry["type"]) for entry in node.get("outputs", [])]
        assert outputs == list(zip(info["output_name"], info["output"], strict=True))[: len(outputs)], node["type"]
