"""The paper's data recipe in the host: repeats, a dataset from images of the same graph, and prior preservation in Train Adapter."""

import dataclasses
import json

import comfy.model_management
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import (
    CHECKPOINT,
    PHOTOGRAPHS,
    list_saved_adapters,
    load_checkpoint,
    random_dataset,
    run_node,
    traces,
    weights_hash,
    write_photographs,
)

INTERRUPT = comfy.model_management.InterruptProcessingException


@pytest.fixture(scope="module")
def encoders(host_nodes, models_dir):
    """VAE and CLIP of the tiny checkpoint, as inputs of a dataset node."""
    _, clip, vae = load_checkpoint(host_nodes)
    return {"vae": vae, "clip": clip}


@pytest.fixture(scope="module")
def from_images(host_nodes, encoders):
    """Function: IMAGE inputs, options -> outputs of Training Dataset (images), called with lists as the executor does."""

    def encode(*images, captions=("a cat",), **options):
        values = {"trigger": "", "resolution": 64, "repeats": 1, **options, **encoders}
        return run_node(host_nodes, "TriLoRAImageDataset", images=list(images), captions=list(captions), **{k: [v] for k, v in values.items()})

    return encode


def images(count, height=64, width=64, seed=0):
    return torch.rand((count, height, width, 3), generator=torch.Generator().manual_seed(seed))


def test_a_batch_is_encoded_as_its_files_would_be(host_nodes, encoders, from_images, base_dir):
    """Latents, prompts and conditioning of an IMAGE batch = those of a folder of PNG files of it."""
    from PIL import Image

    batch, folder = images(2, 96, 64), base_dir / "input" / "as_files"
    folder.mkdir()
    for i, image in enumerate(batch):
        Image.fromarray((image * 255).round().to(torch.uint8).numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"caption {i}")
    found, text = from_images(batch, captions=["caption 0\n\ncaption 1\n"], trigger="ohwx", resolution=128, repeats=4)
    expected, other = run_node(host_nodes, "TriLoRATrainingDataset", folder="as_files", trigger="ohwx", resolution=128, repeats=4, **encoders)
    assert text == other and text.startswith("2 images, 2 with captions, an epoch shows 8") and found.tag_frequency == expected.tag_frequency
    for one, two in zip(found.images, expected.images, strict=True):
        assert (one.prompt, one.repeats) == (two.prompt, two.repeats) and one.prompt.startswith("ohwx, caption ")
        assert torch.equal(one.latent, two.latent) and torch.equal(one.conditioning[0][0], two.conditioning[0][0])


def test_lists_of_images_and_of_captions(from_images):
    """Images of several sizes, and captions from a list of texts, whose line breaks are no separators."""
    dataset, text = from_images(images(2), images(1, 64, 128, seed=1), captions=["a\ncat", "a dog", "a bird"], resolution=128)
    assert [image.prompt for image in dataset.images] == ["a cat", "a dog", "a bird"]
    assert len({tuple(image.latent.shape) for image in dataset.images}) == 2 and "3 images" in text


def test_an_empty_caption_of_a_linked_list_stays_where_it_is(from_images):
    """A picture drawn from the empty prompt belongs into a regularisation set."""
    dataset, _ = from_images(images(2), captions=["a cat", ""], resolution=128)
    assert [image.prompt for image in dataset.images] == ["a cat", ""]


def test_wrong_captions_are_refused(from_images, error):
    with pytest.raises(error, match="captions: 2 lines for 3 images; give one line for all, or one for each"):
        from_images(images(3), captions=["a\nb"])
    with pytest.raises(error, match="captions: 0 lines for 1 image;"):
        from_images(images(1), captions=[""])
    assert from_images(images(2), captions=[""], trigger="ohwx")[0].images[1].prompt == "ohwx"


def test_numbered_folders_are_listed_with_their_parent(pack_module, base_dir, host_nodes, encoders):
    """kohya's layout: the parent of "25_name" can be chosen, and changes when an image in it does."""
    node = pack_module("nodes.dataset").TrainingDatasetNode
    root = base_dir / "input" / "kohya"
    for name in ("25_ohwx", "plain"):
        write_photographs(root / name, side=96)
    write_photographs(base_dir / "input" / "holder" / "plain", side=96)
    listed = [name for name in pack_module("nodes.dataset").image_folders() if name.startswith(("kohya", "holder"))]
    assert listed == ["holder/plain", "kohya", "kohya/25_ohwx", "kohya/plain"]
    before = node.fingerprint_inputs(folder="kohya")
    dataset, text = run_node(host_nodes, "TriLoRATrainingDataset", folder="kohya", resolution=64, repeats=2, **encoders)
    assert [image.repeats for image in dataset.images] == [50] * len(PHOTOGRAPHS) and dataset.folders() == {"25_ohwx": {"n_repeats": 50, "img_count": 3}}
    (root / "25_ohwx" / "coffee.txt").write_text("another caption")
    assert node.fingerprint_inputs(folder="kohya") != before


class Trainee:
    """A tiny flow model, data, and a regularisation set of another latent size and text length."""

    def __init__(self, pack_module):
        types = pack_module("nodes.types")
        self.nodes_module = pack_module
        self.tiny = tiny_models.flow_model()
        _, _, height, width = self.tiny.latent_shape
        self.dataset = random_dataset(types, self.tiny)
        self.kept = random_dataset(types, self.tiny, 4, sizes=((height, width // 2),), tokens=(154,))
        self.kept = dataclasses.replace(self.kept, images=tuple(dataclasses.replace(image, repeats=2) for image in self.kept.images))
        self.before = weights_hash(self.tiny.patcher)

    def inputs(self, host_nodes, regularisation=True, **settings):
        """Inputs of Train Adapter."""
        values = {"steps": 3, "learning_rate": 1e-3, "batch_size": 2, "schedule": "constant", "warmup": 0.0, **settings}
        return {
            "model": self.tiny.patcher, "dataset": self.dataset, "target": "attention", "method": run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)[0],
            "settings": run_node(host_nodes, "TriLoRATrainingSettings", **values)[0], **({"regularisation": self.kept} if regularisation else {}),
        }  # fmt: skip


@pytest.fixture(scope="module")
def trainee(pack_module, host_nodes):
    return Trainee(pack_module)


def test_train_adapter_preserves_a_prior(host_nodes, trainee):
    """Losses apart and together, the report, the metadata; and the set changes what is learned."""
    _, adapter, loss, report = run_node(host_nodes, "TriLoRATrainAdapter", **trainee.inputs(host_nodes, prior_weight=0.5))
    assert loss["loss"] == pytest.approx([a + 0.5 * b for a, b in zip(loss["data"], loss["prior"], strict=True)], rel=1e-5) and len(loss["prior"]) == 3
    assert "regularisation on fixed noise" in report and "weight 0.5" in report and "(data " in report and ", prior " in report
    metadata = adapter.metadata
    assert (metadata["ss_num_reg_images"], metadata["ss_prior_loss_weight"], metadata["ss_num_train_images"]) == ("8", "0.5", "3")
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"images": {"n_repeats": 2, "img_count": 4}}
    assert json.loads(metadata["trilora.training"])["prior_weight"] == 0.5
    assert set(json.loads(metadata["trilora.result"])) == {"loss_before", "loss_after", "prior_before", "prior_after"}
    _, plain, alone, _ = run_node(host_nodes, "TriLoRATrainAdapter", **trainee.inputs(host_nodes, regularisation=False))
    assert set(alone) == {"loss"} and any(not torch.equal(adapter[key], plain[key]) for key in plain)
    assert weights_hash(trainee.tiny.patcher) == trainee.before and traces(trainee.tiny.patcher) == []


def test_weight_0_is_the_run_without_the_set(host_nodes, trainee):
    _, off, loss, report = run_node(host_nodes, "TriLoRATrainAdapter", **trainee.inputs(host_nodes, prior_weight=0.0))
    _, plain, alone, _ = run_node(host_nodes, "TriLoRATrainAdapter", **trainee.inputs(host_nodes, regularisation=False))
    assert loss == alone and all(torch.equal(off[key], plain[key]) for key in plain)
    assert "regularisation" not in report and off.metadata["ss_num_reg_images"] == "0"


def test_an_interrupt_in_a_pass_of_the_set_saves_what_was_learned(host_nodes, trainee, pack_module):
    """Struck in the set's own pass of the second step: the file holds the adapter after the first."""
    expected = run_node(host_nodes, "TriLoRATrainAdapter", **trainee.inputs(host_nodes, steps=1, caption_dropout=0.0))[1]
    passes = []

    def strike(module, args, output):
        if torch.is_grad_enabled() and output.requires_grad:
            passes.append(args[0].shape[1:])
            if len(passes) == 4:  # data, set, data, set
                output.register_hook(lambda gradient: (_ for _ in ()).throw(INTERRUPT()))

    folder = list_saved_adapters()
    before = set(folder.rglob("*"))
    handle = trainee.tiny.patcher.model.diffusion_model.joint_blocks[1].x_block.mlp.fc1.register_forward_hook(strike)
    try:
        with pytest.raises(INTERRUPT):
            run_node(host_nodes, "TriLoRATrainAdapter", **trainee.inputs(host_nodes, caption_dropout=0.0))
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    (file,) = set(folder.rglob("*")) - before
    saved = pack_module("trilora_ops.checkpoint").read_adapter(file)
    file.unlink()
    assert passes[0] == passes[2] != passes[1] == passes[3], "the fourth pass is one of the set"
    assert saved.metadata["trilora.steps"] == "1" and saved.metadata["ss_num_reg_images"] == "8" and saved.keys() == expected.keys()
    for key, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6, msg=key)
    assert weights_hash(trainee.tiny.patcher) == trainee.before and traces(trainee.tiny.patcher) == []


def test_the_base_model_draws_its_own_regularisation_set_in_one_graph(started_host):
    """KSampler -> VAE Decode -> Training Dataset (images) -> Train Adapter, through a server's executor."""
    write_photographs(started_host.base / "input" / "regularised", side=96)

    def node(kind, **inputs):
        described = started_host.object_info[kind]["input"]["required"]
        defaults = {name: entry[1]["default"] for name, entry in described.items() if len(entry) > 1 and "default" in entry[1]}
        return {"class_type": kind, "inputs": {**defaults, **inputs}}

    prompt = {
        "load": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "plain": node("CLIPTextEncode", clip=["load", 1], text="photograph of a cat"),
        "empty": node("CLIPTextEncode", clip=["load", 1], text=""),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=3),
        "sample": node("KSampler", model=["load", 0], positive=["plain", 0], negative=["empty", 0], latent_image=["latent", 0], seed=1, steps=2,
                       cfg=2.0, sampler_name="euler", scheduler="normal", denoise=1.0),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "kept": node("TriLoRAImageDataset", images=["decode", 0], vae=["load", 2], clip=["load", 1], captions="photograph of a cat",
                     resolution=64),
        "data": node("TriLoRATrainingDataset", folder="regularised", vae=["load", 2], clip=["load", 1], trigger="ohwx", resolution=64, repeats=25),
        "method": node("TriLoRAMethodLoRA", rank=2),
        "settings": node("TriLoRATrainingSettings", steps=2),
        "train": node("TriLoRATrainAdapter", model=["load", 0], dataset=["data", 0], method=["method", 0], settings=["settings", 0],
                      target="attention", regularisation=["kept", 0]),
        "report": node("PreviewAny", source=["train", 3]),
        "kept_summary": node("PreviewAny", source=["kept", 1]),
    }  # fmt: skip
    outputs = started_host.post_prompt(prompt)["outputs"]
    assert outputs["kept_summary"]["text"][0].splitlines()[0] == "3 images, 3 with captions"
    (report,) = outputs["report"]["text"]
    assert "3 images, 3 with captions, an epoch shows 75" in report and "3 images, 3 with captions, weight 1" in report
    assert "regularisation on fixed noise" in report
