"""Block Weights: canonical text from any notation, for every family; presets from files, read at each run."""

import copy
import io
import json
import os
import re
from pathlib import Path

import folder_paths
import pytest
import torch
from comfyui_trilora.benchmarks.installation import ROOT
from comfyui_trilora.benchmarks.workflow import to_prompt
from comfyui_trilora.tests.host.adapter_files import low_rank
from comfyui_trilora.tests.host.server import PACK_FOLDER
from comfyui_trilora.tests.host.tiny_run import CHECKPOINT, load_checkpoint, run_node
from comfyui_trilora.trilora_ops.block_layouts import LAYOUTS
from PIL import Image
from safetensors.torch import save_file

NODE = "TriLoRABlockWeights"
LIST_17 = "1,0,0,0.5,1,1,1,0.25,0,0,0,0,-0.5,0,0,0,2"


@pytest.fixture
def run(host_nodes):
    """Function: inputs of the node -> the texts it gives."""
    return lambda text, family="SD1.5", **inputs: run_node(host_nodes, NODE, weights=text, model_family=family, **inputs)[0]


@pytest.fixture
def presets():
    """The user's folder of presets, empty before and after."""
    folder = Path(folder_paths.get_user_directory()) / "default" / "trilora" / "presets"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.fixture
def refused(run):
    """Function: inputs -> the message with which the node refuses them."""
    def message(*args, **inputs) -> str:
        with pytest.raises(Exception) as raised:  # noqa: B017  the host's own copy of TriLoRAError
            run(*args, **inputs)
        assert type(raised.value).__name__ == "TriLoRAError"
        return str(raised.value)

    return message


def test_the_menu_of_dialects_is_that_of_the_readers(host_nodes, pack_module):
    (dialect,) = [entry for entry in host_nodes.NODE_CLASS_MAPPINGS[NODE].GET_SCHEMA().inputs if entry.id == "dialect"]
    assert dialect.options == list(pack_module("trilora_ops.block_dialects").DIALECTS)


@pytest.mark.parametrize("family", LAYOUTS)
def test_R4_one_node_serves_every_family(run, family, pack_module):
    """R4: each group of each family can be addressed, and the text that comes out says the same again."""
    blocks = pack_module("trilora_ops.blocks").Blocks.layout(family)
    for number, group in enumerate(blocks.groups, 1):
        (text,) = run(f"{group}={number / 8}", family)
        assert text == f"default=1, {group}={number / 8:g}" and run(text, family) == [text]


def test_a_list_and_what_the_panel_writes_mean_the_same(run):
    (text,) = run(LIST_17)
    assert run(text) == [text] and "IN04=0.5" in text and "OUT07=-0.5" in text and run("") == ["default=1"]


def test_random_numbers_come_from_the_seed_and_stand_in_the_text(run):
    """L2: the same seed, the same numbers; torch's own stream is left alone; the text that comes out holds no chance."""
    drawn, state = "1,R,U,0,0,0,0,0,0,0,0,0,R,R,R,R,R", torch.get_rng_state()
    (text,) = run(drawn, dialect="inspire", random_seed=7)
    assert run(drawn, dialect="inspire", random_seed=7) == [text] != run(drawn, dialect="inspire", random_seed=8)
    assert run(text) == [text] and run(text, random_seed=8) == [text]
    assert torch.equal(torch.get_rng_state(), state)


def test_placeholders_are_the_inputs_a_and_b(run):
    words = "A,a,B,b" + ",0" * 13
    assert run(words, dialect="inspire", A=0.8, B=-0.6) == run("0.8,0.4,-0.6,-0.3" + ",0" * 13, dialect="inspire")


def test_an_unknown_preset_is_an_error(refused):
    """L1: never full strength without a word."""
    assert "FACEE" in refused("FACEE") and "FACE" in refused("FACEE").split("near", 1)[1]
    assert "has 2 meanings" in refused("1,R,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0")
    assert "11 numbers" in refused("1,0,0,0,0,0,0,0,0,0,0")


def test_presets_are_read_at_each_run(run, refused, presets, host_nodes):
    """I7: a file that was written or changed while the host runs counts at once; the node runs again for it."""
    def fingerprint():
        return host_nodes.NODE_CLASS_MAPPINGS[NODE].fingerprint_inputs(weights="Mine")

    assert "Mine" in refused("Mine")
    none = fingerprint()
    (presets / "own.txt").write_text("# my presets\n\nMine: IN04-IN08=0.5\nList:" + LIST_17, encoding="utf-8")
    assert run("Mine") == ["default=1, IN04-IN08=0.5"] and run("List") == run(LIST_17)
    first = fingerprint()
    (presets / "own.txt").write_text("\ufeffMine:OUT=0.25\n3\tOf the remerger\t" + ",".join(["0.5"] * 57), encoding="utf-8")
    assert run("Mine") == ["default=1, OUT=0.25"] and run("Of the remerger", "Flux.1") == run(",".join(["0.5"] * 57), "Flux.1")
    assert len({none, first, fingerprint()}) == 3


def test_a_broken_line_names_its_file_and_itself(run, refused, presets):
    (presets / "a.txt").write_text("Fine:IN=0\n# note\nno preset at all\n", encoding="utf-8")
    assert "a.txt" in refused("Fine") and "line 3" in refused("Fine")
    (presets / "a.txt").write_text("Fine:IN=0\n", encoding="utf-8")
    (presets / "b.txt").write_text("\nFine:IN=0\nOther:IN=1\n", encoding="utf-8")
    assert run("Fine") == ["default=1, IN=0"], "the same meaning twice is no matter"
    (presets / "b.txt").write_text("\nFine:IN=1\nOther:IN=1\n", encoding="utf-8")
    assert "presets/b.txt line 2" in refused("Fine") and "presets/a.txt line 1" in refused("Fine")
    assert run("Other") == ["default=1, IN=1"]
    (presets / "b.txt").write_bytes(b"X:\xff=1")
    assert "presets/b.txt" in refused("X") and "UTF-8" in refused("X")


@pytest.mark.parametrize("broken", [b"Bad:IN=0\nFACE:1,1,1\nno preset at all\n", "Bad:IN=0\nFACE:1,1,1 \u00e4".encode("latin-1"), b"1\tBad\t1,1\n2\tFACE\t1,1\n"])
def test_a_broken_file_stops_only_what_names_its_presets(run, refused, presets, pack_module, caplog, broken):
    """Canonical text, lists, built-in presets and those of other files are read as ever; the log tells it once for each change."""
    face, middle = run("FACE"), run("MIDD")
    (presets / "good.txt").write_text("Good:IN=0.5\n", encoding="utf-8")
    (presets / "broken.txt").write_bytes(broken)
    for text, wanted in (("IN=0", ["default=1, IN=0"]), (LIST_17, run(LIST_17)), ("MIDD", middle), ("Good", ["default=1, IN=0.5"])):
        assert run(text) == wanted
    fault = re.escape("presets/broken.txt") + "(?s:.*)correct or delete the file"
    for text in ("Bad", "FACE", "no preset at all", "IN99=0"):  # FACE is built in too, and the file may mean another one by it
        assert re.search(fault, refused(text)), text
    strengths = pack_module("nodes.block_strengths")
    assert strengths.presets_in("Good and IN=0, FACE, Bad") == (("Good", "IN=0.5"),)
    blocks = pack_module("trilora_ops.blocks").Blocks.layout("SD1.5")
    assert strengths.block_strengths("Good", blocks).text() == "default=1, IN=0.5"
    with pytest.raises(Exception, match=f"^block_weights for my_file: .*{fault}.*; nothing was applied$"):
        strengths.block_strengths("Bad", blocks, "my_file")
    tables = pack_module("nodes.block_tables").tables()
    shown = [preset["name"] for preset in tables["presets"]]
    assert "presets/broken.txt" in tables["presets_error"] and shown[-1] == "Good" and "MIDD" in shown and "FACE" not in shown

    def warnings() -> int:
        return sum("presets/broken.txt" in record.getMessage() for record in caplog.records)

    assert warnings() == 1
    (presets / "broken.txt").write_bytes(broken + b"\nand more\n")
    assert run("IN=0") == run("IN=0") and warnings() == 2
    (presets / "broken.txt").unlink()
    (presets / "notes.md").write_text("only .txt files count", encoding="utf-8")
    assert run("FACE") == face and run("Good") == ["default=1, IN=0.5"] and warnings() == 2
    (presets / "broken.txt").write_bytes(broken)
    assert run("IN=0") and warnings() == 3


def test_the_model_that_is_connected_counts(host_nodes, models_dir, pack_module, run, refused):
    model = load_checkpoint(host_nodes)[0]  # a U-Net with IN00 to IN07
    assert run("OUT07=0.5, TE1.05=0", "Flux.1", model=model) == ["default=1, OUT07=0.5, TE1.05=0"]
    message = refused("D07=0.5", "Flux.1", model=model)
    assert "'D07'" in message and "MODEL has EMB, IN00-IN07, MID0-MID2" in message and "model_family says Flux.1" in message
    layout, other_model = pack_module("trilora_ops.blocks").Blocks.layout, pack_module("nodes.block_summary").other_model
    assert other_model(layout("Wan 1.3B"), layout("Wan 2.2 5B"), "Wan 2.2 5B") == "", "the same blocks"
    assert "MODEL has the blocks of SDXL; model_family says SD1.5" in other_model(layout("SDXL"), layout("SD1.5"), "SD1.5")
    assert "choose SDXL to see" in other_model(layout("SDXL"), layout("SD1.5"), "SD1.5")


def test_the_summary_counts_blocks_and_names_the_others(pack_module):
    blocks = pack_module("trilora_ops.blocks").Blocks.layout("SD1.5")

    def summary(text):
        return pack_module("nodes.block_summary").summary(pack_module("trilora_ops.block_syntax").parse(text, blocks), blocks, "SD1.5")

    assert summary("OUT03-OUT05=0.5, TE1=0") == "SD1.5: 26 of 29 blocks at 1, TE1 at 0, OUT03-OUT05 at 0.5"
    assert summary("default=0, IN=0.25, .mlp=1, IN07=2") == "SD1.5: 17 of 29 blocks at 0, IN00-IN06 at 0.25, IN07 at 2, IN08-IN11 at 0.25; and 1 rule for parts of blocks"
    assert summary(", ".join(f"OUT{n:02d}=0.{n + 1}" for n in range(9))).endswith("OUT05 at 0.6, 3 more ranges")


def test_the_tables_of_the_panel_say_what_the_lists_mean(pack_module):
    """Numbers of every list, put into the slots that the panel knows, are those of the parser at every block."""
    syntax, blocks_of, place = pack_module("trilora_ops.block_syntax"), pack_module("trilora_ops.blocks").Blocks, pack_module("trilora_ops.blocks").Place
    seen = 0
    for name, layout in pack_module("nodes.block_tables").tables()["layouts"].items():
        blocks = blocks_of.layout(name)
        assert [id for members in layout["groups"].values() for id in members] == list(layout["ids"]) == list(blocks.ids)
        for vector in layout["vectors"]:
            numbers = [round(0.1 + n / 7, 3) for n in range(len(vector["slots"]))]
            weights = syntax.parse(",".join(map(str, numbers)), blocks, vector["dialect"])
            expected = {id: numbers[slot] for slot, ids in enumerate(vector["slots"]) for id in ids}
            for group, members in blocks.groups.items():
                for block in members:
                    assert weights.at(place(block, group, frozenset(), "")) == expected.get(block, vector["rest"]), f"{name} {vector['dialect']} {block}"
            seen += 1
    assert seen > 40


def test_a_test_line_runs_what_follows_once_for_each_of_its_texts(started_host):
    graph = {"weights": {"class_type": NODE, "inputs": {"model_family": "SD1.5", "dialect": "auto", "weights": "@TEST:17", "A": 0.5}},
             "show": {"class_type": "PreviewAny", "inputs": {"source": ["weights", 0]}}}  # fmt: skip
    outputs = started_host.post_prompt(graph)["outputs"]
    assert len(outputs["show"]["text"]) == 17 == len(set(outputs["show"]["text"]))
    assert outputs["weights"]["block_weights"] == outputs["show"]["text"] and "IN01=0.5" in outputs["show"]["text"][1]
    graph["weights"]["inputs"]["weights"] = "IN=0.5"
    assert started_host.post_prompt(graph)["outputs"]["show"]["text"] == ["default=1, IN=0.5"]


def test_the_panels_files_are_served(started_host):
    """Every script is listed for the page to load, and each file that a script names is there."""
    served = [path for path in started_host.get_json("/extensions") if f"/{PACK_FOLDER}/js/" in path]
    assert {Path(path).name for path in served} == {path.name for path in (ROOT / "web" / "js").glob("*.js")} and len(served) >= 5
    for path in served:
        script = started_host.get(path).decode()
        for name in re.findall(r'"(\./[^"]+)"', script):
            assert started_host.get(f"/extensions/{PACK_FOLDER}/js/{name[2:]}"), f"{path}: {name}"


def test_the_panel_gets_what_its_own_saving_has_written(started_host):
    """By the host's own routes alone: a preset that is stored as user data comes back with the node's description."""
    def tables() -> dict:
        return started_host.get_json(f"/object_info/{NODE}")[NODE]["input"]["required"]["weights"][1]["trilora_blocks"]

    def store(text: str) -> None:
        path = "/userdata/trilora%2Fpresets%2Fsaved.txt?overwrite=true"
        started_host._opener.open(started_host.url + path, data=text.encode())

    assert tables()["layouts"].keys() == LAYOUTS.keys() and tables()["presets_error"] == ""
    built_in = {preset["name"] for preset in tables()["presets"]}
    assert built_in and not any("file" in preset for preset in tables()["presets"])
    store("Mine:IN=0.5\n")
    assert tables()["presets"][-1] == {"name": "Mine", "text": "IN=0.5", "file": "saved.txt", "line": 1}
    store("Mine\n")
    assert "presets/saved.txt" in tables()["presets_error"] and {preset["name"] for preset in tables()["presets"]} == built_in
    (started_host.base / "user" / "default" / "trilora" / "presets" / "saved.txt").unlink()
    assert json.dumps(tables()["presets"])


def test_the_example_runs_and_its_blocks_make_the_difference(started_host, models_dir):
    """workflows/block_weights.json, small, with a file whose layers lie in IN05, MID1 and OUT04: the picture by blocks is the
    whole one where every block is on, another with the example's own blocks, and that without a file where none is on."""
    names = [f"diffusion_model.{block}.1.transformer_blocks.0.attn1.to_q" for block in ("input_blocks.5", "middle_block", "output_blocks.4")]
    file = models_dir / "loras" / "blocks.safetensors"
    save_file({key: tensor * 3 if tensor.ndim else tensor for name in names for key, tensor in low_rank(name, 320, 320).items()}, file)
    graph = to_prompt(json.loads((ROOT / "workflows" / "block_weights.json").read_text(encoding="utf-8")), started_host.object_info)
    small = {"CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT}, "EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 2},
             "TriLoRALoader": {"lora_name": file.name}}  # fmt: skip
    for node in graph.values():
        node["inputs"] |= small.get(node["class_type"], {})
    (weights,) = [node for node in graph.values() if node["class_type"] == NODE]
    whole, partly = [number for number, node in sorted(graph.items(), key=lambda item: int(item[0])) if node["class_type"] == "SaveImage"]

    def pictures(**changes) -> list[bytes]:
        weights["inputs"] |= changes
        outputs = started_host.post_prompt(copy.deepcopy(graph))["outputs"]
        return [Image.open(io.BytesIO(started_host.view(outputs[number]["images"][0]))).tobytes() for number in (whole, partly)]

    full, example = pictures()
    assert full != example
    assert pictures(weights="default=1") == [full, full]
    off = pictures(weights="default=0")[1]
    assert off not in (full, example) and pictures(weights="IN05=0, OUT04=0, MID1=0") == [full, off]
    file.unlink()



@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_files_of_presets_that_are_no_files_or_too_large_are_named(run, refused, presets):
    """A pipe without a writer would stop the whole server."""
    os.mkfifo(presets / "pipe.txt")
    (presets / "huge.txt").write_bytes(b"A:IN=0\n" * 300_000)
    (presets / "many.txt").write_text("".join(f"A{n}:IN=0\n" for n in range(6000)), encoding="utf-8")
    message = refused("Bad")
    assert "presets/pipe.txt: not a file" in message and "presets/huge.txt: larger than 1 MiB" in message and "presets/many.txt: names: there are 6,000" in message
    assert len(message) < 2000 and run("IN=0")
    (presets / "pipe.txt").unlink()


def test_names_with_two_meanings_are_named_up_to_a_bound(refused, presets):
    for file in "ab":
        (presets / f"{file}.txt").write_text("".join(f"Name {n}:IN={n}{file == 'b' and '.5' or ''}\n" for n in range(2000)), encoding="utf-8")
    message = refused("Name 7")
    assert "presets/b.txt line 1: 'Name 0' has another meaning in presets/a.txt line 1" in message and len(message) < 2000
