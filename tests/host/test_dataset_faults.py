"""The dataset nodes with what people really have: what is left out stands on the node, and what cannot be trained stops at once."""

import dataclasses
import logging
import os
from types import SimpleNamespace

import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import load_checkpoint, random_dataset, run_node, write_photographs
from PIL import Image

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def encoders(host_nodes, models_dir):
    """VAE and CLIP of the tiny checkpoint, as inputs of a dataset node."""
    _, clip, vae = load_checkpoint(host_nodes)
    return {"vae": vae, "clip": clip}


@pytest.fixture
def shown(pack_module, monkeypatch):
    """Texts that were shown on a node, in order."""
    texts = []
    monkeypatch.setattr(pack_module("nodes.compat"), "show_text", lambda text, node_id: texts.append(text))
    return texts


@pytest.fixture
def folder(base_dir, request):
    """A folder of three captioned photographs in the input folder, of the test's own name."""
    return write_photographs(base_dir / "input" / request.node.name.partition("[")[0], side=96)


def encode(host_nodes, encoders, folder, **options):
    return run_node(host_nodes, "TriLoRATrainingDataset", folder=folder.name, resolution=64, **{**encoders, **options})


def test_after_an_error_the_node_no_longer_shows_the_images_of_an_earlier_run(host_nodes, encoders, folder, shown):
    encode(host_nodes, encoders, folder)
    assert shown[-1].startswith("3 images")
    (folder / "coffee.png").write_bytes(b"no picture")
    with pytest.raises(Exception, match="coffee.png"):
        encode(host_nodes, encoders, folder)
    assert shown[-1] == "nothing was encoded: this run of the node did not end"


def test_what_is_left_out_stands_on_the_node_and_in_the_summary(host_nodes, encoders, folder, shown, caplog):
    (folder / "coffee.txt").unlink()
    (folder / "spare.txt").write_text("a spare caption")
    (folder / "IMG_1.heif2").write_bytes(b"x")
    with caplog.at_level(logging.WARNING, "trilora"):
        dataset, text = encode(host_nodes, encoders, folder, trigger="ohwx")
    expected = [
        "1 of 3 images have no caption and are trained with the trigger word alone: coffee.png",
        "captions that belong to no image are not used: spare.txt",
        "files of other types are not used: 1 .heif2 (IMG_1.heif2)",
    ]
    assert text.splitlines()[0] == "3 images, 2 with captions" and text.splitlines()[-3:] == expected
    assert dataset.summary == text and shown[-1] == text.replace("\n", ";\n")
    assert [record.message for record in caplog.records if record.name == "trilora"] == expected
    for name in ("spare.txt", "IMG_1.heif2"):
        (folder / name).unlink()
    (folder / "coffee.txt").write_text("a cup")
    _, text = encode(host_nodes, encoders, folder)
    assert "not used" not in text and "not used" not in shown[-1] and "no caption" not in shown[-1]


def test_system_folders_are_not_offered_and_links_that_lead_back_end(pack_module, folder):
    for name in ("__MACOSX", "@eaDir", ".thumbnails"):
        (folder / name).mkdir()
        Image.new("RGB", (8, 8)).save(folder / name / "01.png")
    only_system = folder.parent / "only_system_files"
    only_system.mkdir()
    (only_system / "._01.png").write_bytes(b"\0\5\x16\7")
    for i in range(30):
        (folder / f"again{i}").symlink_to(folder)
    (folder / "root").symlink_to(folder.parent)
    listed = [name for name in pack_module("nodes.dataset").image_folders() if folder.name in name or "only_system" in name]
    assert listed == [folder.name]


def test_a_linked_folder_elsewhere_is_still_offered(pack_module, folder, tmp_path):
    elsewhere = write_photographs(tmp_path / "photos", side=64)
    (folder / "linked").symlink_to(elsewhere)
    assert f"{folder.name}/linked" in pack_module("nodes.dataset").image_folders()


def test_the_fingerprint_looks_at_everything_and_never_fails(pack_module, folder, monkeypatch):
    node = pack_module("nodes.dataset").TrainingDatasetNode
    (folder / "gone.png").symlink_to(folder / "nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    before = node.fingerprint_inputs(folder=folder.name)
    assert before == node.fingerprint_inputs(folder=folder.name)
    (folder / "nowhere").write_bytes(b"x")
    assert node.fingerprint_inputs(folder=folder.name) != before
    changed = node.fingerprint_inputs(folder="there_is_no_such_folder")
    assert changed != changed  # not a number: run again, and let the node say why

    def refuse(path="."):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    changed = node.fingerprint_inputs(folder=folder.name)
    assert changed != changed


def test_a_folder_that_is_no_name_is_refused(pack_module):
    said = pack_module("nodes.dataset").TrainingDatasetNode.validate_inputs(folder="x" * 100_000)
    assert "no such folder" in said and len(said) < 300
    for value in ("\0", "\ud800", "a\nb", 5, ["x"], {}):
        said = pack_module("nodes.dataset").TrainingDatasetNode.validate_inputs(folder=value)
        assert said.startswith("folder") and said.isprintable() and said.encode()


@pytest.mark.parametrize("missing", ["vae", "clip"])
def test_a_checkpoint_without_vae_or_text_encoder_is_said(host_nodes, encoders, folder, error, missing):
    with pytest.raises(error, match=f"^{missing}: is empty"):
        encode(host_nodes, encoders, folder, **{missing: None})


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_vae_that_overflows_is_named_at_the_first_image(host_nodes, encoders, folder, error, value):
    """Astronaut is fine, Chelsea is not: the third image is never encoded."""
    calls = []

    def encode_image(pixels):
        calls.append(pixels)
        latent = torch.zeros(1, 4, 8, 8)
        latent[0, 3, 7, 7] = value if len(calls) == 2 else 0
        return latent

    with pytest.raises(error, match="the latent of chelsea.png holds values that are not finite.*VAE.*--fp32-vae"):
        encode(host_nodes, encoders, folder, vae=SimpleNamespace(encode=encode_image))
    assert len(calls) == 2


@pytest.mark.parametrize("where", ["cond", "pooled_output"])
def test_a_text_encoder_that_overflows_is_named(host_nodes, encoders, folder, error, where):
    clip = encoders["clip"]

    def encode_tokens(tokens):
        (cond, options), = clip.encode_from_tokens_scheduled(tokens)
        options = {**options, "attention_mask": torch.full((1, 77), -INF)}  # a mask may be infinite
        if where == "cond":
            return [[cond * NAN, options]]
        return [[cond, {**options, where: options[where] * INF}]]

    broken = SimpleNamespace(tokenizer=clip.tokenizer, tokenize=clip.tokenize, encode_from_tokens_scheduled=encode_tokens)
    with pytest.raises(error, match="the encoded caption of astronaut.png holds values that are not finite.*--fp32-text-enc"):
        encode(host_nodes, encoders, folder, clip=broken)


def broken_dataset(dataset, part):
    """The dataset with something in its second image that is not finite."""
    image = dataset.images[1]
    (text, options), = image.conditioning
    with torch.inference_mode():
        image = {
            "latent": lambda: dataclasses.replace(image, latent=image.latent * NAN),
            "conditioning": lambda: dataclasses.replace(image, conditioning=[[text * INF, options]]),
            "options": lambda: dataclasses.replace(image, conditioning=[[text, {**options, "pooled_output": text[0] * NAN}]]),
        }[part]()
    return dataclasses.replace(dataset, images=(dataset.images[0], image, *dataset.images[2:]))


@pytest.mark.parametrize("part", ["latent", "conditioning", "options"])
@pytest.mark.parametrize("linked_to", ["dataset", "regularisation"])
def test_training_stops_before_its_first_step(host_nodes, pack_module, error, part, linked_to):
    """A dataset that another node or an older version has made comes over the link and is looked at, too."""
    tiny = tiny_models.eps_prediction_model()
    dataset = random_dataset(pack_module("nodes.types"), tiny)
    inputs = {"dataset": dataset, linked_to: broken_dataset(dataset, part)}
    settings = run_node(host_nodes, "TriLoRATrainingSettings", steps=3)[0]
    with pytest.raises(error, match="of 1.png holds values that are not finite"):
        run_node(host_nodes, "TriLoRATrainAdapter", model=tiny.patcher, method=run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)[0], settings=settings, **inputs)


def test_embeddings_in_captions_through_the_node(host_nodes, encoders, folder, error):
    (folder / "chelsea.txt").write_text("a cat, embedding:no_such_thing")
    with pytest.raises(error, match="captions name 1 embeddings that cannot be used .chelsea.png: embedding:no_such_thing."):
        encode(host_nodes, encoders, folder)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([torch.zeros(1, 64, 64, 5)], "image 1: has 5 channels"),
        ([torch.zeros(2, 64, 64, 3), torch.zeros(1, 64, 64, 0)], "image 3: has 0 channels"),
        ([torch.zeros(1, 2, 64, 64, 3)], "image 1: has 4 axes"),
        ([torch.zeros(64, 64, 3)], "image 1: has 2 axes"),
        ([torch.zeros(1, 0, 64, 3)], "image 1: has no pixels"),
        ([torch.zeros(0, 64, 64, 3)], "images: there are none"),
        ([torch.zeros(())], "image 1: has 0 axes"),
        ([torch.zeros(1, 64, 64, 3), None], "image 2: is a NoneType"),
        ([{"samples": torch.zeros(1, 4, 8, 8)}], "image 1: is a dict"),
        ([], "images: there are none"),
    ],
)
def test_images_of_another_kind_are_refused(host_nodes, encoders, error, images, words):
    values = {"trigger": [""], "resolution": [64], "repeats": [1], **{name: [value] for name, value in encoders.items()}}
    with pytest.raises(error, match=f"^{words}"):
        run_node(host_nodes, "TriLoRAImageDataset", images=images, captions=["a cat"], **values)


@pytest.mark.parametrize(("captions", "words"), [([None], "captions: must be text"), (["x" * 10_001], "image 0001: its caption .* 10001 characters")])
def test_captions_of_another_kind_are_refused(host_nodes, encoders, error, captions, words):
    values = {"trigger": [""], "resolution": [64], "repeats": [1], **{name: [value] for name, value in encoders.items()}}
    with pytest.raises(error, match=words):
        run_node(host_nodes, "TriLoRAImageDataset", images=[torch.zeros(1, 64, 64, 3)], captions=captions, **values)


def test_only_line_breaks_part_captions(pack_module):
    lines = pack_module("nodes.image_dataset").caption_lines
    assert lines(["a\u2028cat\x0b here\r\n\r\na dog\rx"]) == ["a cat here", "a dog", "x"]
