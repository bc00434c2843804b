"""A file that was just saved is the file that its name leads to, whatever other folders hold and whatever it is called."""

import os
from pathlib import Path

import folder_paths
import pytest
import torch
from comfyui_trilora.tests.host.adapter_files import low_rank
from comfyui_trilora.tests.host.tiny_run import list_saved_adapters, run_node
from safetensors.torch import load_file, save_file

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def root(host_nodes):
    """output/loras; what a test writes there is gone afterwards."""
    folder = list_saved_adapters()
    before = set(folder.rglob("*"))
    yield folder
    for path in sorted(set(folder.rglob("*")) - before, reverse=True):
        path.unlink() if not path.is_dir() else path.rmdir()


@pytest.fixture
def other(tmp_path):
    """Another folder of LoRA files, which comes before output/loras."""
    folders = folder_paths.folder_names_and_paths["loras"][0]
    folders.insert(0, str(tmp_path))
    yield tmp_path
    folders.remove(str(tmp_path))


@pytest.fixture
def save(host_nodes):
    return lambda name, seed=1, **inputs: run_node(host_nodes, "TriLoRASaveAdapter", adapter=low_rank(LAYER, 128, 128, seed=seed), name=name, dtype="fp32", **inputs)[0]


def holds(lora_name: str, seed: int) -> bool:
    """Whether the file that loaders open under this name has the layer of the seed."""
    found = load_file(folder_paths.get_full_path_or_raise("loras", lora_name))
    expected = low_rank(LAYER, 128, 128, seed=seed)
    ratio = found[f"{LAYER}.alpha"] / found[f"{LAYER}.lora_down.weight"].shape[0]
    delta = found[f"{LAYER}.lora_up.weight"] @ found[f"{LAYER}.lora_down.weight"] * ratio
    return torch.allclose(delta, 0.5 * expected[f"{LAYER}.lora_up.weight"] @ expected[f"{LAYER}.lora_down.weight"], atol=1e-5)


def put(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_file(low_rank(LAYER, 128, 128, seed=99), folder / name)


@pytest.mark.parametrize("name", ["fresh", "sub/folder/fresh"])
def test_the_name_leads_to_the_file_whatever_other_folders_hold(save, root, other, name):
    for number in (1, 2, 4):
        put(other, f"{name}_{number:05}_.safetensors")
    saved = [save(name, seed) for seed in (1, 2, 3)]
    assert [Path(one).stem[-6:-1] for one in saved] == ["00003", "00005", "00006"]
    assert all(holds(one, seed) for one, seed in zip(saved, (1, 2, 3), strict=True))


def test_a_link_that_leads_nowhere_takes_a_name_too(save, root, other):
    (other / "fresh_00001_.safetensors").symlink_to(other / "gone")
    assert holds(save("fresh"), 1)


def test_another_program_takes_the_name_in_the_meantime(save, root, pack_module, monkeypatch):
    files = pack_module("nodes.files")
    write, taken = files.write_adapter, []

    def late(path, *others):
        if not taken:
            taken.append(path)
            Path(path).write_bytes(b"theirs")
        return write(path, *others)

    monkeypatch.setattr(files, "write_adapter", late)
    name = save("fresh")
    assert Path(taken[0]).read_bytes() == b"theirs" and holds(name, 1) and Path(taken[0]).name != name


@pytest.mark.parametrize(("name", "expected"), [
    ("x.safetensors", "x_00001_.safetensors"), ("sub/x.SAFETENSORS", "sub/x_00001_.safetensors"), ("a" * 300, "a" * 200 + "_00001_.safetensors"),
    ("漢" * 300, "漢" * 66 + "_00001_.safetensors"), ("a\0b", "a_b_00001_.safetensors"), ("a\udcff", "a__00001_.safetensors"), ("nul", "nul__00001_.safetensors"),
    ("dots. . ", "dots_00001_.safetensors"), ("con/<b>x", "con_/_b_x_00001_.safetensors"),
])  # fmt: skip
def test_any_name_becomes_a_good_one(save, root, name, expected):
    found = save(name)
    assert found == expected.replace("/", os.sep) and holds(found, 1)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", ".safetensors", "...", None, 7, "a/" * 5000 + "x"])
def test_what_is_no_name_is_refused_in_one_sentence(save, root, error, name):
    before = set(root.rglob("*"))
    with pytest.raises(error, match="^name") as said:
        save(name)
    assert len(str(said.value)) < 500 and set(root.rglob("*")) == before


def test_a_file_in_the_place_of_the_folder_is_said(save, root, error):
    (root / "taken").write_bytes(b"")
    with pytest.raises(error, match="cannot be written to .*taken .*a file lies where the folder should be; rename it"):
        save("taken/x")


def test_the_node_says_that_the_name_is_another(save, root, pack_module, caplog):
    save("a:b")
    assert "name: saved as a_b" in caplog.text


@pytest.mark.parametrize("name", [None, "", 7, "a\0b.safetensors", "\ud800.safetensors", "a" * 100_000, "gone.safetensors"])
def test_a_file_that_nobody_has_is_said_in_one_sentence(host_nodes, tiny, error, name):
    with pytest.raises(error, match="^lora_name") as said:
        run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name)
    assert len(str(said.value)) < 500


def test_pages_are_told_of_every_file(save, root, monkeypatch):
    import server

    told = []
    monkeypatch.setattr(server.PromptServer.instance, "send_sync", lambda event, data, sid=None: told.append((event, data)))
    name = save("fresh")
    assert told == [("trilora.saved", {"file": name})]


def test_a_page_that_cannot_be_told_costs_no_file(save, root, monkeypatch):
    import server

    def broken(*_):
        raise RuntimeError("Event loop is closed")

    monkeypatch.setattr(server.PromptServer.instance, "send_sync", broken)
    assert holds(save("fresh"), 1)


def test_names_that_are_html_are_not_listed(host_nodes, other, pack_module, caplog):
    put(other, "<img src=x onerror=alert(1)>.safetensors")
    put(other, "a <b.safetensors")
    put(other, "a < b.safetensors")
    listed = pack_module("nodes.file_inputs").lora_files()
    assert "a < b.safetensors" in listed and not any("<i" in name or "<b" in name for name in listed)
    assert "is not listed" in caplog.text
