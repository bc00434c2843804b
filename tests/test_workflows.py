"""The example workflows as files, and the list of nodes beside them; needs no ComfyUI."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from comfyui_trilora.trilora_ops.block_schedule import parse
from comfyui_trilora.trilora_ops.block_syntax import parse as parse_weights
from comfyui_trilora.trilora_ops.blocks import Blocks

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
OURS = json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))
# The front end's own widgets of a node: values that belong to no input.
CORE = {
    "CheckpointLoaderSimple": 0, "CLIPTextEncode": 0, "EmptyLatentImage": 0, "KSampler": 1, "VAEDecode": 0, "PreviewImage": 0,
    "SaveImage": 0, "SetClipHooks": 0, "PreviewAny": 0, "PrimitiveInt": 1, "PrimitiveStringMultiline": 0, "MarkdownNote": 1,
}  # fmt: skip
# All of these are looked for by the host, but it serves the pictures of one only.
EXAMPLE_FOLDERS = ("example_workflows", "example", "examples", "workflow", "workflows")
TITLE = 30  # height of a node's title, which stands above its position


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def saved(request) -> dict:
    return json.loads(request.param.read_text(encoding="utf-8"))


def by_id(saved: dict) -> dict[int, dict]:
    return {node["id"]: node for node in saved["nodes"]}


def titled(saved: dict, title: str) -> dict:
    (node,) = [node for node in saved["nodes"] if node.get("title") == title]
    return node


def source(saved: dict, node: dict, name: str) -> tuple[int, int] | None:
    """(node id, output slot) of what feeds an input."""
    (entry,) = [entry for entry in node["inputs"] if entry["name"] == name]
    return next(((link[1], link[2]) for link in saved["links"] if link[0] == entry["link"]), None)


def test_there_is_one_folder_of_examples_with_a_picture_for_each():
    assert [name for name in EXAMPLE_FOLDERS if (ROOT / name).is_dir()] == ["workflows"]
    assert {path.stem for path in FILES} == {"train_trilora", "train_tlora", "apply_trilora", "block_weights", "scheduled_blocks", "character_plus_style", "block_ablation"}
    pictures = {path.stem for path in FOLDER.glob("*.jpg")}
    assert pictures == {path.stem for path in FILES}
    assert {path.suffix for path in FOLDER.iterdir()} == {".json", ".jpg"}
    for path in FOLDER.glob("*.jpg"):
        assert path.read_bytes()[:3] == b"\xff\xd8\xff" and path.stat().st_size < 300_000, path.name


def test_every_node_is_ours_or_one_of_a_few_core_nodes(saved):
    assert {node["type"] for node in saved["nodes"]} <= set(OURS) | set(CORE)
    assert all(node["mode"] == 0 for node in saved["nodes"]), "nothing is muted or bypassed"
    for node in saved["nodes"]:
        if node["type"] != "MarkdownNote":
            assert node["properties"]["cnr_id"] == ("trilora" if node["type"] in OURS else "comfy-core")


def test_links_and_slots_tell_the_same(saved):
    nodes, links = by_id(saved), {link[0]: link for link in saved["links"]}
    assert len(nodes) == len(saved["nodes"]) and max(nodes) <= saved["last_node_id"]
    assert len(links) == len(saved["links"]) and max(links) <= saved["last_link_id"]
    for link, origin, out, target, into, kind in links.values():
        start, end = nodes[origin]["outputs"][out], nodes[target]["inputs"][into]
        assert link in start["links"] and end["link"] == link
        assert kind in (start["type"], end["type"]) and end["type"] in (*start["type"].split(","), "*")
        assert nodes[origin]["order"] < nodes[target]["order"]
    ends = [(entry["link"], node["id"], slot) for node in nodes.values() for slot, entry in enumerate(node["inputs"])]
    assert {end for end in ends if end[0] is not None} == {(link[0], link[3], link[4]) for link in links.values()}
    starts = [(link, n["id"], slot) for n in nodes.values() for slot, o in enumerate(n["outputs"]) for link in o["links"] or ()]
    assert sorted(starts) == sorted((link[0], link[1], link[2]) for link in links.values())


def test_every_widget_has_a_value(saved):
    for node in saved["nodes"]:
        widgets = [entry for entry in node["inputs"] if "widget" in entry]
        assert len(node.get("widgets_values", [])) == len(widgets) + CORE.get(node["type"], 0), node["type"]
        assert all(entry["widget"]["name"] == entry["name"] for entry in widgets)


def test_nodes_stand_apart_and_inside_titled_groups(saved):
    def box(node):
        (x, y), (width, height) = node["pos"], node["size"]
        return x, y - TITLE, x + width, y + height

    for one, other in combinations(saved["nodes"], 2):
        (a, b, c, d), (e, f, g, h) = box(one), box(other)
        assert c <= e or g <= a or d <= f or h <= b, f"{one['id']} and {other['id']} overlap"
    for node in saved["nodes"]:
        a, b, c, d = box(node)
        inside = [
            group for group in saved["groups"]
            for x, y, width, height in [group["bounding"]]
            if x <= a and y <= b and c <= x + width and d <= y + height
        ]  # fmt: skip
        assert (len(inside) == 1 and inside[0]["title"]) if node["type"] != "MarkdownNote" else not inside, node["id"]


def test_links_run_from_left_to_right_or_downwards(saved):
    nodes = by_id(saved)
    for _, origin, _, target, _, _ in saved["links"]:
        (x, y), (u, v) = nodes[origin]["pos"], nodes[target]["pos"]
        assert x < u or (x == u and y < v), f"{origin} -> {target}"


@pytest.mark.parametrize("saved", [FOLDER / f"{name}.json" for name in ("train_trilora", "train_tlora", "apply_trilora")], indirect=True, ids=lambda path: path.stem)
def test_both_pictures_differ_by_the_adapter_alone(saved):
    plain, adapted = titled(saved, "Sample without the adapter"), titled(saved, "Sample with the adapter")
    assert plain["widgets_values"] == adapted["widgets_values"]
    for name in ("seed", "latent_image"):
        assert source(saved, plain, name) == source(saved, adapted, name) is not None
    nodes = by_id(saved)
    for name in ("positive", "negative"):
        one, other = (nodes[source(saved, sampler, name)[0]] for sampler in (plain, adapted))
        texts = [source(saved, node, "text") for node in (one, other)]
        assert one is other or texts[0] == texts[1] is not None
    assert nodes[source(saved, plain, "model")[0]]["type"] == "CheckpointLoaderSimple"
    assert nodes[source(saved, adapted, "model")[0]]["type"] in OURS


def test_both_pictures_differ_by_the_schedule_alone():
    """The same adapter on the same prompts and samplers; one of the two hooks has a schedule, which is one."""
    saved = json.loads((FOLDER / "scheduled_blocks.json").read_text(encoding="utf-8"))
    nodes, plain, scheduled = by_id(saved), titled(saved, "Sample all the time"), titled(saved, "Sample scheduled")
    assert plain["widgets_values"] == scheduled["widgets_values"]
    for name in ("model", "seed", "latent_image"):
        assert source(saved, plain, name) == source(saved, scheduled, name) is not None
    hooks = []
    for sampler in (plain, scheduled):
        prompts = [nodes[source(saved, sampler, name)[0]] for name in ("positive", "negative")]
        (setter,) = {source(saved, prompt, "clip")[0] for prompt in prompts}
        hooks.append((nodes[source(saved, nodes[setter], "hooks")[0]], [source(saved, prompt, "text") for prompt in prompts], nodes[setter]["widgets_values"]))
    (one, texts, options), (other, same_texts, same_options) = hooks
    assert texts == same_texts and options == same_options and one is not other
    values = [dict(zip([entry["name"] for entry in hook["inputs"] if "widget" in entry], hook["widgets_values"], strict=True)) for hook in (one, other)]
    assert {name for name in values[0] if values[0][name] != values[1][name]} == {"schedule"} and values[0]["schedule"] == ""
    placed = parse(values[1]["schedule"]).on(Blocks.layout("SD1.5"))
    assert len(placed.rules) == 3 and not any(curve.is_constant for _, curve in placed.rules)


def test_both_pictures_differ_by_the_blocks_alone():
    """The same file, prompts and samplers; one of the two loaders gets block weights, and those leave a part of the blocks on."""
    saved = json.loads((FOLDER / "block_weights.json").read_text(encoding="utf-8"))
    nodes, samplers = by_id(saved), [titled(saved, f"Sample with {part}") for part in ("the whole adapter", "some of its blocks")]
    assert samplers[0]["widgets_values"] == samplers[1]["widgets_values"]
    for name in ("seed", "latent_image"):
        assert source(saved, samplers[0], name) == source(saved, samplers[1], name) is not None
    loaders = [nodes[source(saved, sampler, "model")[0]] for sampler in samplers]
    for name in ("positive", "negative"):
        prompts = [nodes[source(saved, sampler, name)[0]] for sampler in samplers]
        assert [source(saved, prompt, "clip") for prompt in prompts] == [(loader["id"], 1) for loader in loaders]
        assert source(saved, prompts[0], "text") == source(saved, prompts[1], "text") is not None
    assert loaders[0]["widgets_values"] == loaders[1]["widgets_values"] and source(saved, loaders[0], "block_weights") is None
    node = nodes[source(saved, loaders[1], "block_weights")[0]]
    family, dialect, text = node["widgets_values"][:3]
    assert node["type"] == "TriLoRABlockWeights" and dialect == "auto"
    weights = parse_weights(text, Blocks.layout(family))
    assert weights.text() == text and {value for _, value in weights.rules} | {weights.default} == {0, 1}


PAPER = [42, "fixed", 25, 7, "dpmpp_2m", "karras", 1]  # Block-wise LoRA's sampling: 25 steps, DPM++ 2M Karras, CFG 7


def values(node: dict) -> dict[str, object]:
    return dict(zip([entry["name"] for entry in node["inputs"] if "widget" in entry], node["widgets_values"], strict=True))


def test_the_ablation_differs_by_the_blocks_alone():
    """Two rows of the same blocks: one training each above, one adapter of all blocks below; everything else is shared."""
    saved = json.loads((FOLDER / "block_ablation.json").read_text(encoding="utf-8"))
    nodes, (grid,) = by_id(saved), [node for node in saved["nodes"] if node["type"] == "TriLoRAPictureGrid"]
    samplers = [nodes[source(saved, nodes[source(saved, grid, f"picture_{n}")[0]], "samples")[0]] for n in range(1, 9)]
    assert len({node["id"] for node in samplers}) == 8 and all(node["widgets_values"] == PAPER for node in samplers)
    for name in ("positive", "negative", "latent_image", "seed"):
        assert len({source(saved, node, name) for node in samplers}) == 1
    models = [nodes[source(saved, node, "model")[0]] for node in samplers]
    above, (base, *below) = models[:4], models[4:]
    assert base["type"] == "CheckpointLoaderSimple" and [node["type"] for node in models] == ["TriLoRATrainAdapter"] * 4 + [base["type"]] + ["TriLoRALoader"] * 3
    for name in ("model", "dataset", "method", "settings"):
        assert len({source(saved, node, name) for node in above}) == 1
    assert len({node["widgets_values"][0] for node in above}) == 1 and len({node["id"] for node in above}) == 4
    presets = [values(nodes[source(saved, node, "plan")[0]])["rank"] for node in above]
    assert presets == [f"Block-wise {level} (SD1.x)" for level in ("full", "upper", "middle", "bottom")]
    assert [values(node)["block_weights"] for node in below] == presets[1:]
    for node in below:
        saver = nodes[source(saved, node, "lora_name")[0]]
        assert saver["type"] == "TriLoRASaveAdapter" and source(saved, saver, "adapter")[0] == above[0]["id"]
    labels = values(grid)["labels"].splitlines()
    assert values(grid)["columns"] == 4 and len(labels) == 8
    assert [label.split()[1].rstrip(",") for label in labels[1:4]] == [label.split()[1].rstrip(",") for label in labels[5:]] == ["upper", "middle", "bottom"]


def test_the_recipe_is_the_papers():
    """A full-block character, a block-wise style, regularisation pictures of the base model without a trigger, both files on one stack."""
    saved = json.loads((FOLDER / "character_plus_style.json").read_text(encoding="utf-8"))
    nodes, prompt, words = by_id(saved), titled(saved, "Prompt")["widgets_values"][0], []
    kept = {source(saved, titled(saved, f"Train the {part}"), "regularisation")[0] for part in ("character", "style")}
    kept = nodes[kept.pop()] if len(kept) == 1 else None
    assert kept["type"] == "TriLoRAImageDataset" and values(kept)["trigger"] == ""
    drawn = nodes[source(saved, nodes[source(saved, kept, "images")[0]], "samples")[0]]
    assert drawn["type"] == "KSampler" and nodes[source(saved, drawn, "model")[0]]["type"] == "CheckpointLoaderSimple"
    encoded = nodes[source(saved, drawn, "positive")[0]]
    assert source(saved, encoded, "text") == source(saved, kept, "captions") is not None
    for part in ("character", "style"):
        training = titled(saved, f"Train the {part}")
        plan = source(saved, training, "plan")
        assert (plan is None) is (part == "character")
        words.append(values(nodes[source(saved, training, "dataset")[0]])["trigger"])
        saver = titled(saved, f"Save the {part}")
        assert source(saved, saver, "adapter")[0] == training["id"] and source(saved, titled(saved, part.title()), "lora_name")[0] == saver["id"]
    assert len(set(words)) == 2 and all(word in prompt for word in words)
    ranks = parse_weights(values(titled(saved, "Upper blocks only"))["rank"], Blocks.layout("SD1.5"))
    assert {"IN01-IN03", "OUT09-OUT11"} <= {selector.text for selector, value in ranks.rules if value}
    samplers = [titled(saved, title) for title in ("The character alone", "The style alone", "Character and style")]
    assert all(node["widgets_values"] == PAPER for node in samplers) and drawn["widgets_values"][1:] == PAPER[1:]
    assert nodes[source(saved, samplers[2], "model")[0]]["type"] == "TriLoRAApplyStack"
    for name in ("positive", "negative", "latent_image", "seed"):
        assert len({source(saved, node, name) for node in samplers}) == 1


def test_the_prompt_uses_the_trigger():
    training, transforms, applying = (json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
                                      for name in ("train_trilora", "train_tlora", "apply_trilora"))
    for saved in (training, transforms):
        (dataset,) = [node for node in saved["nodes"] if node["type"] == "TriLoRATrainingDataset"]
        trigger = dataset["widgets_values"][1]
        assert trigger and all(trigger in titled(shown, "Prompt")["widgets_values"][0] for shown in (saved, applying))


def test_both_ways_to_train_differ_by_the_method_alone():
    """What a person learns in one training workflow holds in the other: same nodes, same links, same values elsewhere."""
    training, transforms = ({node["id"]: node for node in json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["nodes"]}
                            for name in ("train_trilora", "train_tlora"))
    differing = {training[i]["type"] for i in training if training[i]["type"] != transforms[i]["type"]
                 or training[i].get("widgets_values") != transforms[i].get("widgets_values")}
    assert training.keys() == transforms.keys() and differing == {"MarkdownNote", "TriLoRAMethodTriLoRA"}


def test_every_node_has_a_help_page_and_no_page_is_left_over():
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "web" / "docs").iterdir()}
    assert set(pages) == set(OURS)
    for name, text in pages.items():
        assert text.startswith("# ") and "## Inputs" in text and "## Common mistakes" in text and "## Example" in text, name
