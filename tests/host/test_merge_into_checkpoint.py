"""A patched MODEL in the host's own Save Checkpoint and ModelSave: the file is W + delta, rounded once."""

import comfy.model_patcher
import comfy.utils
import folder_paths
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.test_applying import layer
from comfyui_trilora.tests.host.tiny_run import list_saved_adapters, load_checkpoint, run_node
from safetensors.torch import load_file, save_file

QUERY = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
KERNEL = "diffusion_model.middle_block.0.in_layers.2"
STRENGTH = 0.7


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["fp32", "fp16", "bf16"])
def model(request, host_nodes):
    """A U-Net whose weights lie in memory in one dtype, as a checkpoint of that dtype does."""
    patcher = tiny_models.eps_prediction_model().patcher
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[request.param]
    with torch.inference_mode():
        patcher.model.diffusion_model.to(dtype)
    return patcher


def low_rank_file():
    """(file, {weight: fp64 delta at strength 1})."""
    tensors = {**layer(QUERY, 128, 128), **layer(KERNEL, 128, 128, kernel=(3, 3))}
    delta = {n: 0.5 * tensors[f"{n}.lora_up.weight"].flatten(1).double() @ tensors[f"{n}.lora_down.weight"].flatten(1).double() for n in (QUERY, KERNEL)}
    return tensors, {f"{name}.weight": d for name, d in delta.items()}


def transform_file(pack_module, model):
    """The same for a TLoRA: delta = W (T - I) + R of the very weight in memory, in fp32."""
    registry = pack_module("trilora_ops.registry")
    method = registry.Method(registry.RESIDUALS["tensor_ring"](rank=2), registry.TRANSFORMS["tensor_ring"](2))
    tensors, deltas = {}, {}
    for name in (QUERY, KERNEL):
        weight = comfy.utils.get_attr(model.model, f"{name}.weight").float().clone()
        module = torch.nn.Linear(*weight.shape[::-1]) if weight.ndim == 2 else torch.nn.Conv2d(*weight.shape[1::-1], weight.shape[2:])
        adapter = method.build(module, weight, generator(1))
        for p in adapter.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=generator(2))
        parts = {"transform": adapter.transform.tensors(), "residual": adapter.residual.tensors()}
        tensors |= {f"{name}.{part}.{key}": t.contiguous() for part, found in parts.items() for key, t in found.items()}
        deltas[f"{name}.weight"] = adapter.delta(weight).detach().double()
    return tensors, deltas


def checked(found: dict, before: dict, deltas: dict, prefix: str) -> None:
    """Adapted weights are the exact sum rounded once to their dtype: no further from it than its nearest value, up to fp32's error; all else is untouched."""
    deltas = {key.replace("diffusion_model.", prefix, 1): delta for key, delta in deltas.items()}
    assert set(deltas) <= set(found) == set(before)
    for key, tensor in found.items():
        assert tensor.dtype == before[key].dtype
        if key not in deltas:
            assert torch.equal(tensor, before[key]), key
            continue
        delta = STRENGTH * deltas[key].view(tensor.shape)
        exact = before[key].double() + delta
        assert not torch.equal(tensor, before[key])
        further = (tensor.double() - exact).abs() - (exact.to(tensor.dtype).double() - exact).abs()
        # a delta rounded to 16 bits before it is added would be further away by 100 times this
        assert float(further.max()) <= 2e-6 * float(before[key].double().abs().max() + delta.abs().max()), key


def saved_by(host_nodes, node, prefix, **inputs) -> dict:
    run_node(host_nodes, node, filename_prefix=prefix, **inputs)
    folder = folder_paths.get_output_directory()
    path, stem, counter, *_ = folder_paths.get_save_image_path(prefix, folder)
    return load_file(f"{path}/{stem}_{counter - 1:05}_.safetensors")


@pytest.mark.parametrize("kind", ["low rank", "transform"])
def test_model_save_writes_the_merged_weights(host_nodes, pack_module, model, kind):
    """For every dtype a checkpoint may be in, through TriLoRA Loader and the host's ModelSave."""
    tensors, deltas = low_rank_file() if kind == "low rank" else transform_file(pack_module, model)
    file = list_saved_adapters() / "to_merge.safetensors"
    save_file(tensors, file)
    before = saved_by(host_nodes, "ModelSave", "merged/plain", model=model)
    (patched, _) = run_node(host_nodes, "TriLoRALoader", model=model, lora_name=file.name, strength_model=STRENGTH)
    checked(saved_by(host_nodes, "ModelSave", "merged/model", model=patched), before, deltas, "model.diffusion_model.")
    after = saved_by(host_nodes, "ModelSave", "merged/plain", model=model)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_save_checkpoint_takes_the_text_encoder_too(host_nodes, models_dir):
    """CheckpointSave of MODEL, CLIP and VAE: the loader's file with adapted U-Net and text encoder, all else bit by bit."""
    model, clip, vae = load_checkpoint(host_nodes)
    text = "text_model.encoder.layers.3.mlp.fc1"
    tensors = {**layer(QUERY, 320, 320), **layer(f"lora_te_{text.replace('.', '_')}", 3072, 768)}
    file = list_saved_adapters() / "to_merge.safetensors"
    save_file(tensors, file)
    before = saved_by(host_nodes, "CheckpointSave", "merged/plain", model=model, clip=clip, vae=vae)
    patched = run_node(host_nodes, "TriLoRALoader", model=model, clip=clip, lora_name=file.name, strength_model=STRENGTH, strength_clip=STRENGTH)
    found = saved_by(host_nodes, "CheckpointSave", "merged/whole", model=patched[0], clip=patched[1], vae=vae)
    changed = {key for key in found if not torch.equal(found[key], before[key])}
    te = next(key for key in before if key.endswith(f"{text}.weight"))
    query = QUERY.replace("diffusion_model.", "model.diffusion_model.", 1) + ".weight"
    assert changed == {query, te}
    names = {query: QUERY, te: f"lora_te_{text.replace('.', '_')}"}
    deltas = {key: 0.5 * tensors[f"{n}.lora_up.weight"].double() @ tensors[f"{n}.lora_down.weight"].double() for key, n in names.items()}
    checked({key: found[key] for key in changed}, {key: before[key] for key in changed}, deltas, "diffusion_model.")
