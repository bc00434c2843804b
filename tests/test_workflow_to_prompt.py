"""The converter from saved workflows to prompts, on hand-written node descriptions; needs no ComfyUI."""

import pytest
from comfyui_trilora.benchmarks.workflow import WorkflowError, to_prompt

OBJECT_INFO = {
    "Load": {"input": {"required": {"name": [["a", "b"], {}]}}, "input_order": {"required": ["name"]}},
    "Image": {"input": {"required": {"image": [["x.png"], {"image_upload": True}]}, "optional": {"n": ["INT", {}]}}},
    "Sample": {
        "input": {
            "required": {"model": ["MODEL"], "seed": ["INT", {}], "steps": ["INT", {}], "mode": ["COMBO", {}]},
            "optional": {
                "text": ["STRING", {"forceInput": True}],
                "blocks": ["TRILORA_BLOCKS", {}],
                "cfg": ["FLOAT", {}],
            },
        },
        "input_order": {"required": ["model", "seed", "steps", "mode"], "optional": ["text", "blocks", "cfg"]},
    },
    "Change": {"input": {"required": {"clip": ["CLIP"], "model": ["MODEL"], "by": ["FLOAT", {}]}}},
}


def node(node_id, kind, values=None, inputs=(), outputs=(), mode=0):
    return {
        "id": node_id, "type": kind, "mode": mode, "widgets_values": values or [],
        "inputs": [dict(zip(("name", "type", "link"), entry, strict=True)) for entry in inputs],
        "outputs": [{"name": kind, "type": kind} for kind in outputs],
    }  # fmt: skip


def workflow(*nodes, links=()):
    return {"nodes": list(nodes), "links": [list(link) for link in links], "version": 0.4}


def load():
    return node(1, "Load", ["b"], outputs=["MODEL"])


def sample(values, link=10, mode=0):
    return node(2, "Sample", values, [("model", "MODEL", link)], mode=mode)


def test_values_take_their_places_behind_the_seed():
    prompt = to_prompt(
        workflow(load(), sample([5, "randomize", 20, "fast"]), links=[(10, 1, 0, 2, 0, "MODEL")]), OBJECT_INFO
    )
    assert prompt["1"]["inputs"] == {"name": "b"} and prompt["1"]["class_type"] == "Load"
    assert prompt["2"]["inputs"] == {"model": ["1", 0], "seed": 5, "steps": 20, "mode": "fast"}


def test_an_optional_input_without_widget_takes_no_value():
    prompt = to_prompt(workflow(sample([5, "fixed", 20, "fast", 4.5], None)), OBJECT_INFO)
    assert prompt["2"]["inputs"] == {"seed": 5, "steps": 20, "mode": "fast", "cfg": 4.5}


def test_a_widget_of_ones_own_is_known_from_the_saved_node():
    saved = sample([5, "fixed", 20, "fast", "IN04=0.5", 4.5], None)
    saved["inputs"].append({"name": "blocks", "type": "TRILORA_BLOCKS", "widget": {"name": "blocks"}, "link": None})
    inputs = to_prompt(workflow(saved), OBJECT_INFO)["2"]["inputs"]
    assert inputs["blocks"] == "IN04=0.5" and inputs["cfg"] == 4.5


def test_a_linked_widget_keeps_its_place_and_the_link_wins():
    saved = sample([5, "fixed", 20, "fast"], None)
    saved["inputs"].append({"name": "steps", "type": "INT", "widget": {"name": "steps"}, "link": 11})
    primitive = node(3, "PrimitiveNode", [33, "fixed"], outputs=["INT"])
    inputs = to_prompt(workflow(saved, primitive, links=[(11, 3, 0, 2, 1, "INT")]), OBJECT_INFO)["2"]["inputs"]
    assert inputs == {"seed": 5, "steps": 33, "mode": "fast"}


def test_the_upload_button_takes_a_place():
    assert to_prompt(workflow(node(1, "Image", ["x.png", "image", 3])), OBJECT_INFO)["1"]["inputs"] == {
        "image": "x.png",
        "n": 3,
    }


def test_values_by_name():
    assert to_prompt(workflow(node(1, "Load", {"name": "a", "preview": 1})), OBJECT_INFO)["1"]["inputs"] == {
        "name": "a"
    }


def test_bypassed_nodes_hand_on_what_fits_and_muted_ones_nothing():
    between = node(3, "Change", [1.0], [("clip", "CLIP", None), ("model", "MODEL", 11)], ["MODEL"], mode=4)
    links = [(10, 3, 0, 2, 0, "MODEL"), (11, 1, 0, 3, 1, "MODEL")]
    prompt = to_prompt(workflow(load(), between, sample([1, "fixed"]), links=links), OBJECT_INFO)
    assert set(prompt) == {"1", "2"} and prompt["2"]["inputs"]["model"] == ["1", 0]
    between["mode"] = 2
    prompt = to_prompt(workflow(load(), between, sample([1, "fixed"]), links=links), OBJECT_INFO)
    assert set(prompt) == {"1", "2"} and "model" not in prompt["2"]["inputs"]


def test_links_as_objects_and_notes():
    note = node(9, "MarkdownNote", ["text"])
    saved = workflow(load(), sample([1, "fixed"]), note)
    saved["links"] = [{"id": 10, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "MODEL"}]
    prompt = to_prompt(saved, OBJECT_INFO)
    assert set(prompt) == {"1", "2"} and prompt["2"]["inputs"]["model"] == ["1", 0]


def test_an_unknown_class_is_an_error_that_names_it():
    with pytest.raises(WorkflowError, match="node 4 is of class 'Nowhere'"):
        to_prompt(workflow(node(4, "Nowhere")), OBJECT_INFO)
