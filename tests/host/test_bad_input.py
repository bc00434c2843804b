"""Everything a person can get wrong: one sentence that names the culprit and the remedy, and nothing is changed or written."""

import comfy.model_sampling
import folder_paths
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import (
    PHOTOGRAPHS,
    list_saved_adapters,
    load_checkpoint,
    random_dataset,
    run_node,
    traces,
    weights_hash,
    write_photographs,
)
from safetensors.torch import save, save_file

QUERY = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def folder(base_dir, request):
    """An empty subfolder of the host's input folder of this test's own."""
    path = base_dir / "input" / request.node.name.replace("[", "_").replace("]", "")
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def encode(host_nodes, models_dir):
    """Function: name of a folder -> outputs of Training Dataset."""
    _, clip, vae = load_checkpoint(host_nodes)
    return lambda name, **options: run_node(host_nodes, "TriLoRATrainingDataset", folder=name, vae=vae, clip=clip, resolution=64, **options)


@pytest.fixture
def apply(host_nodes, tiny, error):
    """Function: file name, bytes -> message with which the loader refuses the file, after checking that the model is as before."""
    written = []

    def refuse(name: str, content: bytes) -> str:
        file = list_saved_adapters() / name
        file.write_bytes(content)
        written.append(file)
        before = weights_hash(tiny.patcher)
        with pytest.raises(error) as refused:
            run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name)
        assert tiny.patcher.patches == {} and weights_hash(tiny.patcher) == before
        return str(refused.value)

    yield refuse
    for file in written:
        file.unlink()


@pytest.fixture
def train(host_nodes, error):
    """Function: MODEL, dataset, method options -> message with which Train Adapter refuses, after checking the model."""

    def refuse(patcher, dataset, method: str = "TriLoRAMethodLoRA", target: str = "attention", **options) -> str:
        settings = run_node(host_nodes, "TriLoRATrainingSettings", steps=1)[0]
        method = run_node(host_nodes, method, **options)[0]
        before, files = weights_hash(patcher), set(list_saved_adapters().rglob("*"))
        with pytest.raises(error) as refused:
            run_node(host_nodes, "TriLoRATrainAdapter", model=patcher, dataset=dataset, method=method, settings=settings, target=target)
        assert traces(patcher) == [] and weights_hash(patcher) == before
        assert set(list_saved_adapters().rglob("*")) == files
        return str(refused.value)

    return refuse


def layer(name: str, out: int, inp: int, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_up.weight": torch.randn(out, rank), f"{name}.lora_down.weight": torch.randn(rank, inp)}


# Folders of images


def test_an_empty_folder(encode, error, folder):
    (folder / "notes.md").write_text("no image")
    with pytest.raises(error, match=rf"folder='{folder.name}': holds no images that can be read .but 1 .md .notes.md..; put files of type .*\.png"):
        encode(folder.name)


@pytest.mark.parametrize("name", ["no_such_folder", "../input_elsewhere", "..", "/etc", "", ".", "photographs/../.."])
def test_a_folder_that_is_not_in_the_input_folder(encode, error, pack_module, name):
    """Refused when the workflow is checked and, since that check can be skipped, when it runs."""
    node = pack_module("nodes.dataset").TrainingDatasetNode
    verdict = node.validate_inputs(folder=name)
    assert isinstance(verdict, str) and verdict.startswith(f"folder={name!r}: ") and "input folder" in verdict
    assert "create it, put images in" in verdict if name == "no_such_folder" else "choose one from the list" in verdict
    with pytest.raises(error) as refused:
        encode(name)
    assert str(refused.value) == verdict


@pytest.mark.parametrize("damage", ["not an image", "half of one"])
def test_an_image_that_cannot_be_read(encode, error, folder, damage):
    write_photographs(folder, side=64)
    broken = folder / "coffee.png"
    broken.write_bytes(b"a shopping list" if damage == "not an image" else broken.read_bytes()[: broken.stat().st_size // 2])
    with pytest.raises(error, match=r": 1 of 3 images cannot be read \(coffee\.png: .+\); replace or remove them$"):
        encode(folder.name)


def test_images_without_captions(encode, error, folder, caplog):
    """Without a trigger word there is nothing to train them with; with one they are trained with it alone, and counted."""
    write_photographs(folder, side=64)
    for name in ("chelsea.txt", "coffee.txt"):
        (folder / name).unlink()
    with pytest.raises(error) as refused:
        encode(folder.name)
    count = f"2 of {len(PHOTOGRAPHS)} images have no caption"
    assert count in str(refused.value) and "chelsea.png, coffee.png" in str(refused.value)
    assert str(refused.value).endswith("add .txt files or set a trigger word")
    dataset, summary = encode(folder.name, trigger="ohwx")
    assert [image.prompt for image in dataset.images] == [f"ohwx, {PHOTOGRAPHS['astronaut.png']}", "ohwx", "ohwx"]
    assert f"{len(PHOTOGRAPHS)} images, 1 with captions" in summary
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert count in warning and "chelsea.png, coffee.png" in warning


# Files of adapters


def test_a_file_of_another_model_family(apply):
    message = apply("flux.safetensors", save(layer("diffusion_model.double_blocks.0.img_attn.qkv", 192, 64)))
    assert message.startswith("flux.safetensors: none of its 1 layer found a place in this model (diffusion_model.double_blocks.0.img_attn.qkv); ")
    assert "its names are those of Flux or HunyuanVideo, and this model is SD20; " in message and message.endswith("nothing was applied")


def test_a_file_of_a_wider_model_of_the_same_family(apply):
    """Names fit and shapes do not: refused before anything is applied, with both shapes."""
    message = apply("wide.safetensors", save({**layer(QUERY.replace("to_q", "to_k"), 128, 128), **layer(QUERY, 320, 320)}))
    assert message.startswith("wide.safetensors: its names are those of a U-Net (SD1.5, SD2, SDXL), and this model is SD20; ")
    assert f"its layer for {QUERY}.weight is (320, 320), expected (128, 128)" in message
    assert message.endswith("nothing was applied")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file(apply, share):
    content = save(layer(QUERY, 128, 128))
    message = apply("half.safetensors", content[: int(len(content) * share)])
    assert message.startswith("half.safetensors: damaged or incomplete (")
    assert message.endswith("copy or download the file again")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_file_with_a_value_that_is_no_number(apply, value):
    tensors = layer(QUERY, 128, 128)
    tensors[f"{QUERY}.lora_up.weight"][3, 1] = value
    message = apply("nan.safetensors", save(tensors))
    assert message.startswith(f"nan.safetensors: {QUERY}.lora_up.weight: holds NaN or infinite values; ")


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".pth", ".bin"])
def test_a_file_that_could_run_code(apply, ending):
    message = apply(f"old{ending}", b"\x80\x04.")
    assert message == f"old{ending}: only .safetensors files are read, because {ending} files can run code; convert it to .safetensors first"


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "no_such.safetensors"])
def test_a_file_outside_the_lora_folders(host_nodes, tiny, base_dir, name, error):
    """The name in a prompt is not to be trusted: only files in the host's LoRA folders are opened."""
    save_file(layer(QUERY, 128, 128), base_dir / "models" / "secret.safetensors")
    with pytest.raises(error, match=f"lora_name='{name}': there is no such file"):
        run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name)


# Training


def test_a_rank_larger_than_a_layer(train, tiny, pack_module):
    dataset = random_dataset(pack_module("nodes.types"), tiny)
    message = train(tiny.patcher, dataset, rank=65)
    assert message.startswith("layer diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight: rank=65 is larger than the layer")
    assert "rank 64 at the most; lower the rank or leave this layer out" in message


def test_latents_of_another_models_vae(train, tiny, pack_module):
    dataset = random_dataset(pack_module("nodes.types"), tiny_models.flow_model())
    message = train(tiny.patcher, dataset, rank=2)
    assert "latents have 16 channels and this model's have 4" in message
    assert message.endswith("encode the dataset with this model's own VAE")


@pytest.mark.parametrize("kind", ["IMG_TO_IMG", "IMG_TO_IMG_FLOW", "COSMOS_RFLOW", "V_PREDICTION_DDPM"])
def test_a_prediction_type_that_cannot_be_trained(train, tiny, pack_module, kind):
    """Named, whether the model has it from birth or from a sampling node."""
    if not hasattr(comfy.model_sampling, kind):
        pytest.skip(f"this host has no {kind}")

    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, getattr(comfy.model_sampling, kind)):
        pass

    patched = tiny.patcher.clone()
    patched.add_object_patch("model_sampling", Sampling(tiny.patcher.model.model_config))
    message = train(patched, random_dataset(pack_module("nodes.types"), tiny), rank=2)
    assert message == f"model: its prediction type {kind} cannot be trained yet; use an eps, v or flow model"


def test_a_target_without_layers(train, tiny, pack_module):
    message = train(tiny.patcher, random_dataset(pack_module("nodes.types"), tiny), target="the left half", rank=2)
    assert message.startswith("target='the left half': choose one of attention, ")


def test_a_core_of_two_ranks_that_is_diagonal(host_nodes, error):
    with pytest.raises(error, match="rank_out=4 with rank=8: a diagonal core is square; set rank_out to 0 or core to full"):
        run_node(host_nodes, "TriLoRAMethodTriLoRA", rank=8, rank_out=4)


# Saving


@pytest.fixture
def refuse_to_save(host_nodes, error, base_dir, pack_module):
    """Function: adapter, inputs of Save Adapter -> its message, after checking that no file appeared anywhere."""

    def refuse(tensors: dict[str, torch.Tensor], **inputs) -> str:
        adapter = pack_module("trilora_ops.checkpoint").AdapterState(tensors)
        before = set(base_dir.rglob("*"))
        with pytest.raises(error) as refused:
            run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, **inputs)
        assert set(base_dir.rglob("*")) == before
        return str(refused.value)

    return refuse


@pytest.mark.parametrize("name", ["../../x", "../x", "/tmp/x", "", "  ", ".", "..", "a/../..", "a/.."])
def test_a_name_that_leads_out_of_the_folder(refuse_to_save, name):
    message = refuse_to_save(layer(QUERY, 128, 128), name=name)
    assert message.startswith(f"name={name!r}: must be a file name") and "output/loras" in message


def test_an_adapter_without_tensors(refuse_to_save):
    assert refuse_to_save({}, name="empty") == "adapter: holds no tensors; connect the output of Train Adapter"


def test_values_that_the_chosen_dtype_cannot_hold(refuse_to_save):
    """Kinds that are not plain low rank are saved as they are, so a large factor may not fit fp16; a large difference fits no model."""
    unbalanced = layer(QUERY, 128, 128) | {f"{QUERY}.dora_scale": torch.ones(128, 1)}
    for half, factor in (("up", 1e6), ("down", 1e-6)):
        unbalanced[f"{QUERY}.lora_{half}.weight"] *= factor
    message = refuse_to_save(unbalanced, name="large", dtype="fp16")
    assert message.startswith(f"{QUERY}.lora_up.weight: ") and message.endswith("too large for float16; save the adapter as bf16 or fp32")
    message = refuse_to_save({"diffusion_model.out.0.diff": torch.full((64,), 1e6)}, name="large", dtype="fp32")
    assert message == "diffusion_model.out.0.diff: holds numbers beyond 65504, more than half precision can hold; the file is broken"


def test_a_name_with_subfolders_is_fine(host_nodes, pack_module):
    """Not bad input: people sort their adapters into folders, and the loader lists the file with its folder."""
    adapter = pack_module("trilora_ops.checkpoint").AdapterState(layer(QUERY, 128, 128))
    list_saved_adapters()
    names = [run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name=name)[0] for name in ("people/me", "people/./me/", " people/me ")]
    assert [name.replace("\\", "/") for name in names] == [f"people/me_0000{i}_.safetensors" for i in (1, 2, 3)]
    assert set(names) <= set(folder_paths.get_filename_list("loras"))
