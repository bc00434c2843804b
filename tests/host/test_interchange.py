"""Files of peft, diffusers and the host's own trainer on the host's model, and files of ours in diffusers.

Each is measured by what the library that wrote it, or reads it, merges into the same weights.
"""

import json
import shutil
from pathlib import Path

import folder_paths
import pytest
import torch
from comfyui_trilora.tests.host import foreign_writers, tiny_models
from comfyui_trilora.tests.host.foreign_writers import Twin, deltas, weight_of
from comfyui_trilora.tests.host.tiny_run import distance, list_saved_adapters, load_checkpoint, run_node
from safetensors import safe_open

RANK = 2


@pytest.fixture(scope="module")
def twin(tiny):
    return Twin(tiny.patcher)


@pytest.fixture(scope="module")
def folder():
    """A folder of its own among the host's LoRA folders."""
    path = list_saved_adapters() / "foreign"
    path.mkdir(exist_ok=True)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def files(twin, folder):
    """Writer -> (name under which the loaders list its file, the deltas that the writer means)."""
    written = {
        "peft": foreign_writers.write_peft(twin, folder / "peft", RANK, 2 * RANK),
        "diffusers": foreign_writers.write_diffusers(twin, folder / "diffusers", RANK, 2 * RANK),
        "diffusers' scripts": foreign_writers.write_scripts(twin, folder / "scripts", RANK),
    }
    return {writer: (listed(path), expected) for writer, (path, expected) in written.items()}


def listed(path: Path) -> str:
    return str(path.relative_to(list_saved_adapters()))


def applied(host_nodes, patcher, name: str, loader: str):
    """The MODEL with a file on it at strength 1."""
    if loader == "TriLoRAApplyStack":
        (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", lora_name=name)
        return run_node(host_nodes, loader, model=patcher, stack=stack)[0]
    return run_node(host_nodes, loader, model=patcher, lora_name=name, strength_model=1.0)[0]


def assert_deltas(found: dict, expected: dict, tolerance: float = 1e-5, scale: float = 1.0) -> None:
    """The same weights changed, each by the same, to a part of its own norm."""
    assert expected and found.keys() == {f"{key}" for key in expected}, sorted(found.keys() ^ expected.keys())[:5]
    for key, delta in expected.items():
        assert distance(found[key], scale * delta) <= tolerance, key


@pytest.mark.parametrize("writer", ["peft", "diffusers", "diffusers' scripts"])
@pytest.mark.parametrize("loader", ["TriLoRALoader", "TriLoRAApplyStack"])
def test_a_file_does_what_its_writer_means(host_nodes, tiny, twin, files, writer, loader, caplog):
    """On every linear layer and convolution of the U-Net, with alpha twice the rank; the scripts on attention, with alpha = rank."""
    name, expected = files[writer]
    assert expected.keys() == set(twin.targets.values()) if writer in ("peft", "diffusers") else len(expected) == 7 * 8
    assert_deltas(deltas(applied(host_nodes, tiny.patcher, name, loader), tiny.patcher), expected)
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize("writer", ["peft", "diffusers"])
def test_cores_loader_knows_no_alpha_of_theirs(host_nodes, tiny, files, writer):
    """It finds all layers, and takes every scale for 1: here half of what peft and diffusers mean."""
    name, expected = files[writer]
    assert_deltas(deltas(applied(host_nodes, tiny.patcher, name, "LoraLoaderModelOnly"), tiny.patcher), expected, scale=0.5)


@pytest.mark.parametrize("writer", ["peft", "diffusers", "diffusers' scripts"])
@pytest.mark.parametrize("keys", ["kohya", "peft", "generic"])
def test_saved_again_by_us_every_loader_gives_what_the_writer_meant(host_nodes, tiny, files, writer, keys):
    """The host's, ours and, but for generic names, which only the host knows, diffusers'."""
    name, expected = files[writer]
    (adapter, _) = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)
    (ours,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name=f"foreign/again_{keys}", dtype="fp32", keys=keys, model=tiny.patcher)
    for loader in ("TriLoRALoader", "LoraLoaderModelOnly"):
        assert_deltas(deltas(applied(host_nodes, tiny.patcher, ours, loader), tiny.patcher), expected)
    if keys != "generic":
        assert_deltas(Twin(tiny.patcher).fused(list_saved_adapters() / ours), expected)


@pytest.mark.parametrize("writer", ["peft", "diffusers", "diffusers' scripts"])
def test_resized_to_one_direction(host_nodes, tiny, twin, files, writer):
    """Save it as fp16 in diffusers' keys, and diffusers fuses the best approximation of rank 1."""
    name, expected = files[writer]
    (adapter, _) = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)
    smaller = run_node(host_nodes, "TriLoRAResizeAdapter", adapter=adapter, rank=1)[0]
    (ours,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=smaller, name="foreign/small", dtype="fp16", keys="peft", model=tiny.patcher)
    best = {}
    for key, delta in expected.items():
        U, sigma, Vt = torch.linalg.svd(delta.flatten(1).double(), full_matrices=False)
        best[key] = (sigma[0] * U[:, :1] @ Vt[:1]).view(delta.shape).float()
    assert_deltas(twin.fused(list_saved_adapters() / ours), best, 2e-3)


@pytest.mark.parametrize("writer", ["peft", "diffusers", "diffusers' scripts"])
def test_inspecting_sees_every_layer(host_nodes, files, pack_module, writer):
    """Spectra with the writer's own scale."""
    name, expected = files[writer]
    (adapter, about) = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)
    assert f"{len(expected)} low-rank" in about
    energy = sum(layer.energy for layer in pack_module("trilora_ops.inspection").inspect(adapter))
    assert energy == pytest.approx(sum(float(delta.double().square().sum()) for delta in expected.values()), rel=1e-4)


@pytest.mark.parametrize("groups", [("IN", "MID", "OUT", "EMB", "FINAL"), ("OUT",), ("MID",)], ids=", ".join)
@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_diffusers_fuses_what_we_have_trained(host_nodes, tiny, twin, pack_module, form, groups):
    """An adapter of ours under the host's names: as a file in either form, of all blocks or block-wise, in fp16."""
    blocks = pack_module("trilora_ops.blocks").Blocks.of(twin.targets.values())
    chosen = [key for key in twin.targets.values() if blocks.place(key).group in groups]
    with torch.inference_mode():
        adapter = {}
        for number, key in enumerate(chosen):
            out, inp, *kernel = weight_of(tiny.patcher, key).shape
            rank, size, generator = min(4, out), 10.0 ** -(number % 3), torch.Generator().manual_seed(number)
            adapter[key.removesuffix(".weight") + ".lora_up.weight"] = size * torch.randn((out, rank, *(1 for _ in kernel)), generator=generator)
            adapter[key.removesuffix(".weight") + ".lora_down.weight"] = torch.randn((rank, inp, *kernel), generator=generator)
    (name,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name=f"foreign/trained_{form}", dtype="fp16", keys=form, model=tiny.patcher)
    (original,) = run_node(host_nodes, "LoraModelLoader", model=tiny.patcher, lora=adapter, strength_model=1.0)
    expected = deltas(original, tiny.patcher)
    assert expected.keys() == set(chosen)
    assert_deltas(twin.fused(list_saved_adapters() / name), expected, 2e-3)


@pytest.fixture(scope="module")
def trained(host_nodes):
    """Function: options -> the LORA_MODEL of the host's trainer, trained once for all tests."""
    known = {}

    def train(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in known:
            known[key] = foreign_writers.train(host_nodes.NODE_CLASS_MAPPINGS["TrainLoraNode"], tiny_models.eps_prediction_model, **options)
        return known[key]

    return train


TRAINER = {"LoRA": {}, "LoRA, bf16": {"lora_dtype": "bf16"}, "LoHa": {"algorithm": "LoHa"}, "LoKr": {"algorithm": "LoKr"}, "OFT": {"algorithm": "OFT"}}


@pytest.mark.parametrize("options", TRAINER.values(), ids=TRAINER)
def test_an_adapter_of_the_hosts_trainer(host_nodes, tiny, trained, options):
    """Its LORA_MODEL through our Save Adapter, and the file of its SaveLoRA: on every loader what its own loader makes of it."""
    adapter = trained(**options)
    (original,) = run_node(host_nodes, "LoraModelLoader", model=tiny.patcher, lora=adapter, strength_model=1.0)
    expected = deltas(original, tiny.patcher)
    assert len(expected) > 100 and all(delta.any() for delta in expected.values())
    (ours,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="foreign/host", dtype="fp32")
    before = set((list_saved_adapters() / "foreign").iterdir())
    save = "SaveLoRA" if "SaveLoRA" in host_nodes.NODE_CLASS_MAPPINGS else "SaveLoRANode"  # as 0.3.64 calls it
    run_node(host_nodes, save, lora=adapter, prefix="loras/foreign/theirs")
    (theirs,) = set((list_saved_adapters() / "foreign").iterdir()) - before
    for name in (ours, listed(theirs)):
        for loader in ("TriLoRALoader", "TriLoRAApplyStack", "LoraLoaderModelOnly"):
            assert_deltas(deltas(applied(host_nodes, tiny.patcher, name, loader), tiny.patcher), expected, 5e-5)


def test_low_rank_layers_of_the_hosts_trainer_become_canonical(host_nodes, trained):
    """With one alpha for all, though what else it trains (norms, biases) stays as it is beside them."""
    adapter = trained()
    (name,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="foreign/canonical", dtype="fp32")
    with safe_open(folder_paths.get_full_path_or_raise("loras", name), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    assert tensors.keys() == adapter.keys() and len({float(t) for key, t in tensors.items() if key.endswith(".alpha")}) == 1
    downs = [tensor.flatten(1) for key, tensor in tensors.items() if key.endswith(".lora_down.weight")]
    assert len(downs) > 60
    for down in downs:
        torch.testing.assert_close(down @ down.t(), torch.eye(down.shape[0]), atol=1e-5, rtol=0)
    others = [key for key in adapter if key.endswith((".diff", ".diff_b"))]
    assert others and all(torch.equal(tensors[key], adapter[key]) for key in others)


def test_inspecting_what_the_hosts_trainer_made(host_nodes, trained):
    """As a picture and a report, whatever else is beside its low-rank layers."""
    pictures, report = run_node(host_nodes, "TriLoRAInspectAdapter", adapter=trained())
    assert pictures.ndim == 4 and float(pictures.std()) > 0.01
    assert f"{sum(key.endswith('.lora_up.weight') for key in trained())} layers" in report


def test_a_stack_of_files_of_every_writer_is_the_dense_sum(host_nodes, tiny, files, trained):
    """peft's, diffusers' in both spellings, the host's and one of ours, in two orders."""
    (ours,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=trained(), name="foreign/stacked", dtype="fp16", keys="kohya", model=tiny.patcher)
    host = deltas(applied(host_nodes, tiny.patcher, ours, "LoraLoaderModelOnly"), tiny.patcher)
    parts = [(*files[writer], strength) for writer, strength in zip(files, (0.7, -0.4, 1.3), strict=True)] + [(ours, host, 0.5)]
    expected: dict = {}
    for _, found, strength in parts:
        for key, delta in found.items():
            expected[key] = expected.get(key, 0) + strength * delta
    for order in (parts, parts[::-1]):
        stack = None
        for name, _, strength in order:
            given = {"stack": stack} if stack else {}
            (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", lora_name=name, strength_model=strength, **given)
        model = run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, stack=stack)[0]
        assert_deltas(deltas(model, tiny.patcher), expected, 5e-5)


@pytest.mark.parametrize("loader", ["TriLoRALoader", "TriLoRAApplyStack"])
def test_dora_of_peft_is_what_peft_merges(host_nodes, tiny, twin, folder, loader):
    """m / ||W + delta|| (W + delta), the norms of rows; core divides by ||W||, which is another change."""
    path, means = foreign_writers.write_peft(twin, folder / "dora", RANK, 2 * RANK, use_dora=True)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    found = deltas(applied(host_nodes, tiny.patcher, listed(path), loader), tiny.patcher)
    assert found.keys() == means.keys()
    for module, key in twin.targets.items():
        weight, name = twin.state[f"{module}.weight"], f"base_model.model.{module}"
        up, down = (tensors[f"{name}.lora_{half}.weight"].flatten(1) for half in "BA")
        changed, shape = weight + 2 * (up @ down).view(weight.shape), (-1, *(1 for _ in weight.shape[1:]))
        m, norm = tensors[f"{name}.lora_magnitude_vector"].reshape(shape), weight.flatten(1).norm(dim=1).view(shape)
        wanted = changed * (m / changed.flatten(1).norm(dim=1).view(shape)) - weight
        assert distance(found[key], wanted) <= 1e-5 and distance(found[key], means[key]) <= 1e-4
        assert distance(means[key], changed * (m / norm) - weight) > 1e-2


@pytest.mark.parametrize("loader", ["TriLoRALoader", "LoraLoader"])
def test_a_text_encoder_of_diffusers(host_nodes, models_dir, tiny, twin, folder, loader):
    """One layer of CLIP-L, under the names that the installed transformers gives it, and no layer of the U-Net."""
    path, expected = foreign_writers.write_text_encoder(twin, folder / "text", RANK, RANK)
    clip = load_checkpoint(host_nodes)[1]
    model, patched = run_node(host_nodes, loader, model=tiny.patcher, clip=clip, lora_name=listed(path), strength_model=1.0, strength_clip=1.0)
    assert model.patches == {} and len(expected) == 6
    found = {key.split("layers.0.")[1]: delta for key, delta in deltas(patched.patcher, clip.patcher).items()}
    assert_deltas(found, expected, 1e-4)
