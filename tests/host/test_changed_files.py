"""Files and presets that inputs name over a link: the host does not know them before a run, and yet a change runs the node again."""

import os

import pytest
from comfyui_trilora.tests.host.adapter_files import low_rank
from comfyui_trilora.tests.host.tiny_run import list_saved_adapters, run_node
from safetensors.torch import save_file

QUERY = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
WIDTH = 64


@pytest.fixture
def name(host_nodes):
    file = list_saved_adapters() / "changing.safetensors"
    save_file(low_rank(QUERY, WIDTH, WIDTH), file)
    yield file.name
    file.unlink(missing_ok=True)


def replace(name: str) -> None:
    file = list_saved_adapters() / name
    save_file(low_rank(QUERY, WIDTH, WIDTH, seed=7), file)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))


RUNS = {
    "TriLoRAApplyStack": lambda nodes, model, name: {"model": model, "lora_stack": [(name, 1.0, 1.0)]},
    "TriLoRALoader": lambda nodes, model, name: {"model": model, "lora_name": name},
    "TriLoRAAdapterHook": lambda nodes, model, name: {"lora_name": name},
    "TriLoRALoadAdapter": lambda nodes, model, name: {"lora_name": name},
    "TriLoRABakeAdapter": lambda nodes, model, name: {"model": model, "stack": run_node(nodes, "TriLoRAAdapterStack", lora_name=name)[0]},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_replaced_file_runs_the_node_again_once(host_nodes, tiny, name, kind):
    node, inputs = host_nodes.NODE_CLASS_MAPPINGS[kind], RUNS[kind](host_nodes, tiny.patcher, name)
    linked = dict.fromkeys(inputs)  # the host says None of what comes over a link

    before = node.fingerprint_inputs(**linked)
    run_node(host_nodes, kind, **inputs)
    assert node.fingerprint_inputs(**linked) == before, "reading it is no change"
    replace(name)
    after = node.fingerprint_inputs(**linked)
    assert after != before and node.fingerprint_inputs(**linked) == after
    (list_saved_adapters() / name).unlink()
    assert node.fingerprint_inputs(**linked) == after, "what was read of it stays right"
    replace(name)
    os.utime(list_saved_adapters() / name, ns=(0, 0))
    assert node.fingerprint_inputs(**linked) != after


def test_a_file_that_was_never_read_runs_nothing_again(host_nodes, tiny, name):
    node = host_nodes.NODE_CLASS_MAPPINGS["TriLoRAApplyStack"]
    run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, lora_stack=[(name, 1.0, 1.0)])
    before = node.fingerprint_inputs(model=None, lora_stack=None)
    other = list_saved_adapters() / "other.safetensors"
    save_file(low_rank(QUERY, WIDTH, WIDTH), other)
    replace(other.name)
    try:
        assert node.fingerprint_inputs(model=None, lora_stack=None) == before
    finally:
        other.unlink()


def test_a_change_in_the_midst_of_reading_is_seen_later(host_nodes, name, pack_module, monkeypatch):
    files, node = pack_module("nodes.files"), host_nodes.NODE_CLASS_MAPPINGS["TriLoRALoadAdapter"]
    read = files.read_adapter
    monkeypatch.setattr(files, "read_adapter", lambda path: (read(path), replace(name))[0])
    before = node.fingerprint_inputs(lora_name=None)
    run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)
    assert node.fingerprint_inputs(lora_name=None) != before


@pytest.fixture
def presets(base_dir):
    file = base_dir / "user" / "default" / "trilora" / "presets" / "changing.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("Mine:IN01=0.5\nNever read:IN02=0.5\n", encoding="utf-8")
    yield file
    file.unlink()


@pytest.mark.parametrize("kind", ["TriLoRALoader", "TriLoRABlockPlan", "TriLoRABlockWeights"])
def test_a_changed_preset_of_a_linked_text_runs_the_node_again_once(host_nodes, tiny, name, presets, kind):
    given, linked = {
        "TriLoRALoader": ({"model": tiny.patcher, "lora_name": name, "block_weights": "Mine"}, {"lora_name": name, "block_weights": None}),
        "TriLoRABlockPlan": ({"rank": "Mine"}, {"rank": None, "alpha": "", "learning_rate": ""}),
        "TriLoRABlockWeights": ({"weights": "Mine"}, {"weights": None}),
    }[kind]
    node = host_nodes.NODE_CLASS_MAPPINGS[kind]
    run_node(host_nodes, kind, **given)
    before = node.fingerprint_inputs(**linked)
    presets.write_text("Mine:IN01=0.5\nNever read:IN02=1\n", encoding="utf-8")
    assert node.fingerprint_inputs(**linked) == before, "another preset"
    presets.write_text("Mine:IN01=0.7\n", encoding="utf-8")
    after = node.fingerprint_inputs(**linked)
    assert after != before and node.fingerprint_inputs(**linked) == after
