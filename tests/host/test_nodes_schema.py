"""The pack in the host's own loader, and what its nodes tell a person before anything runs."""

import ast
import asyncio
import builtins
import logging
import re
import sys

import comfy.weight_adapter
import pytest
from comfyui_trilora.benchmarks.installation import ROOT

# Beside the standard library and the host, nothing may be imported before a node runs.
AT_HAND = {"torch", "numpy", "PIL", "safetensors", "typing_extensions"}
HOSTS_OWN = {"comfy", "comfy_api", "folder_paths"}


@pytest.fixture
def fresh_load(stock_nodes, tmp_path, monkeypatch, caplog):
    """What happened while the host loaded the pack for the first time from another place: (answer, imports, new modules)."""
    place = tmp_path / "custom_nodes" / "ComfyUI-TriLoRA"
    place.parent.mkdir()
    place.symlink_to(ROOT, target_is_directory=True)
    for name in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "EXTENSION_WEB_DIRS", "LOADED_MODULE_DIRS"):
        monkeypatch.setattr(stock_nodes, name, dict(getattr(stock_nodes, name)))
    monkeypatch.setattr(comfy.weight_adapter, "adapters", list(comfy.weight_adapter.adapters))
    package, imported, real_import, before = str(place).replace(".", "_x_"), set(), builtins.__import__, set(sys.modules)

    def recording(name, globals=None, locals=None, fromlist=(), level=0):
        if level == 0 and globals and str(globals.get("__name__", "")).startswith(package):
            imported.add(name.split(".")[0])
        return real_import(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", recording)
    caplog.set_level(logging.INFO)
    answer = asyncio.run(stock_nodes.load_custom_node(str(place)))
    monkeypatch.setattr(builtins, "__import__", real_import)
    new = {name for name in set(sys.modules) - before if not name.startswith(package)}
    yield answer, imported, new
    for name in [name for name in sys.modules if name.startswith(package)]:
        del sys.modules[name]


@pytest.fixture
def classes(host_nodes, pack):
    """Node id -> class, of every node that came from the pack."""
    return {name: c for name, c in host_nodes.NODE_CLASS_MAPPINGS.items() if c.__module__.startswith(pack.__name__)}


def test_the_host_loads_the_pack_without_a_warning(fresh_load, caplog):
    assert fresh_load[0] is True
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_loading_the_pack_imports_nothing_the_host_has_not(fresh_load):
    _, imported, new = fresh_load
    assert imported - set(sys.stdlib_module_names) <= AT_HAND | HOSTS_OWN
    assert {name.split(".")[0] for name in new} - set(sys.stdlib_module_names) <= AT_HAND | HOSTS_OWN


def test_every_node_is_registered_under_its_own_prefix(pack_module, classes):
    listed = {node.GET_SCHEMA().node_id for node in pack_module("nodes").NODES}
    assert listed == set(classes) and len(listed) >= 7
    assert all(re.fullmatch(r"TriLoRA[A-Za-z0-9]+", name) for name in listed)


def test_node_ids_are_literal_so_that_scanners_find_them(classes):
    """The Manager reads the source: a literal ``node_id=`` in a call of Schema, in a direct subclass of io.ComfyNode."""
    found = set()
    for file in sorted((ROOT / "nodes").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or "io.ComfyNode" not in map(ast.unparse, node.bases):
                continue
            calls = [c for c in ast.walk(node) if isinstance(c, ast.Call) and ast.unparse(c.func).endswith("Schema")]
            ids = [k.value for call in calls for k in call.keywords if k.arg == "node_id"]
            assert ids and all(isinstance(i, ast.Constant) for i in ids), f"{file.name}: {node.name}"
            found |= {i.value for i in ids}
    assert found == set(classes)


def test_every_node_explains_itself(classes):
    for name, node in classes.items():
        info = node.GET_NODE_INFO_V1()
        assert info["display_name"] and info["description"].endswith("."), name
        assert info["category"].startswith("TriLoRA/"), name
        assert len(info["output_tooltips"]) == len(info["output"])
        for output, tooltip in zip(info["output_name"], info["output_tooltips"], strict=True):
            assert output and tooltip and tooltip.endswith("."), f"{name}: output {output}"
        for section in ("required", "optional"):
            for field, (_, options) in info["input"].get(section, {}).items():
                tooltip = options.get("tooltip")
                assert tooltip and tooltip.endswith("."), f"{name}: input {field}"


def test_defaults_lie_within_their_limits(classes):
    for name, node in classes.items():
        for entry in node.GET_SCHEMA().inputs:
            if getattr(entry, "min", None) is not None:
                assert entry.min <= entry.default <= entry.max, f"{name}: {entry.id}"
            if getattr(entry, "options", None) and entry.default is not None:
                assert entry.default in entry.options, f"{name}: {entry.id}"


def test_settings_node_starts_from_the_engines_defaults(host_nodes, pack_module):
    """The node and the engine describe the same default run."""
    from comfyui_trilora.tests.host.tiny_run import run_node

    assert run_node(host_nodes, "TriLoRATrainingSettings") == (pack_module("training.config").TrainingConfig(),)


def test_linked_inputs_are_looked_at_when_they_arrive(pack_module):
    """Before a run the host knows no value of a linked input and says None: neither an error nor a reason to train again."""
    dataset, loader = pack_module("nodes.dataset").TrainingDatasetNode, pack_module("nodes.load").TriLoRALoader
    assert dataset.validate_inputs(folder=None) is True
    answer = loader.fingerprint_inputs(lora_name=None, model=None)
    assert answer == loader.fingerprint_inputs(lora_name=None, model=None)
    files = dataset.fingerprint_inputs(folder=None, vae=None)
    assert files != files, "what a linked folder holds cannot be known: the node must run"
