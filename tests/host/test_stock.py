"""The host and the tiny models alone, without the pack: if these fail, no other host test means anything."""

from contextlib import nullcontext

import comfy.model_management
import folder_paths
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models


@pytest.fixture(scope="module")
def loaded(stock_nodes, models_dir):
    """MODEL, CLIP, VAE from the stock checkpoint loader."""
    with torch.inference_mode():
        return stock_nodes.CheckpointLoaderSimple().load_checkpoint("tiny_sd15.safetensors")


def is_healthy(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all()) and 1e-3 < float(tensor.float().std()) < 1e3


def test_the_host_stays_in_its_base_directory(models_dir, base_dir):
    assert "tiny_sd15.safetensors" in folder_paths.get_filename_list("checkpoints")
    assert folder_paths.get_folder_paths("checkpoints") == [str(models_dir / "checkpoints")]
    for folder in (folder_paths.get_output_directory(), folder_paths.get_input_directory()):
        assert folder.startswith(str(base_dir))


def test_training_and_sampling_nodes_are_there(stock_nodes):
    assert {"KSampler", "TrainLoraNode", "LossGraphNode"} <= set(stock_nodes.NODE_CLASS_MAPPINGS)


def test_checkpoint_keeps_the_layout_of_sd15(loaded):
    model, clip, _ = loaded
    keys = model.model.state_dict().keys()
    assert "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight" in keys
    assert model.model.get_dtype() == torch.float32
    assert "clip_l.transformer.text_model.encoder.layers.11.mlp.fc2.weight" in clip.cond_stage_model.state_dict()


def test_stock_pipeline_samples_and_decodes(stock_nodes, loaded):
    model, clip, vae = loaded
    with torch.inference_mode():
        positive, negative = (stock_nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a red square", ""))
        assert positive[0][0].shape == (1, 77, 768) and is_healthy(positive[0][0])
        assert not torch.allclose(positive[0][0], negative[0][0], atol=1e-2)
        latent = stock_nodes.EmptyLatentImage().generate(64, 64, 1)[0]
        sampled = stock_nodes.KSampler().sample(model, 7, 2, 4.0, "euler", "normal", positive, negative, latent)[0]
        assert sampled["samples"].shape == (1, 4, 8, 8) and is_healthy(sampled["samples"])
        image = stock_nodes.VAEDecode().decode(vae, sampled)[0]
        assert image.shape == (1, 64, 64, 3) and 0.02 < float(image.std()) and 0.1 < float(image.mean()) < 0.9


def test_taesd_is_listed_and_encodes(stock_nodes, models_dir):
    assert "taesd" in stock_nodes.VAELoader.INPUT_TYPES()["required"]["vae_name"][0]
    with torch.inference_mode():
        vae = stock_nodes.VAELoader().load_vae("taesd")[0]
        image = torch.rand((1, 64, 64, 3))
        latent = stock_nodes.VAEEncode().encode(vae, image)[0]["samples"]
    assert latent.shape == (1, 4, 8, 8)
    assert 0.3 < float(latent.std()) * 0.18215 < 3


@pytest.mark.parametrize(
    ("build", "sigma"),
    [
        (tiny_models.eps_prediction_model, 2.0),
        (tiny_models.v_prediction_model, 2.0),
        (tiny_models.flow_model, 0.6),
        (tiny_models.flux_model, 0.6),
    ],
)
def test_tiny_models_predict(host, build, sigma):
    tiny = build()
    with torch.inference_mode():
        latent = torch.randn(tiny.latent_shape) * sigma
        first, again = (tiny_models.predict(tiny, latent, sigma) for _ in range(2))
        other_text = tiny._replace(conditioning=[[tiny.conditioning[0][0].flip(-1), tiny.conditioning[0][1]]])
        other = tiny_models.predict(other_text, latent, sigma)
    assert first.shape == tiny.latent_shape and is_healthy(first)
    assert torch.equal(first, again)
    assert float((first - other).std()) > 1e-3, "the text makes no difference"


@pytest.mark.parametrize("build", [tiny_models.v_prediction_model, tiny_models.flow_model, tiny_models.flux_model])
def test_gradients_reach_every_matrix_of_a_tiny_model(monkeypatch, host, build):
    kernels = hasattr(getattr(torch.ops, "comfy_kitchen", None), "apply_rope1")
    if build is tiny_models.flux_model and kernels and not hasattr(comfy.model_management, "in_training"):
        pytest.skip("this host's kernels have no backward pass, and no flag that leaves them out")
    # Where the host has the flag, it chooses operators that autograd knows.
    monkeypatch.setattr(comfy.model_management, "in_training", True, raising=False)
    tiny = build()
    assert all(parameter.is_inference() for parameter in tiny.patcher.model.diffusion_model.parameters())
    network = tiny.patcher.model.diffusion_model
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.clone()))
    text, options = tiny.conditioning[0]
    extra = {"y": options["pooled_output"].clone()} if "pooled_output" in options else {}
    latent = torch.randn(tiny.latent_shape)
    saving = torch.autograd.graph.allow_mutation_on_saved_tensors if build is tiny_models.flux_model else nullcontext
    with saving():
        out = tiny.patcher.model.apply_model(latent, torch.tensor([0.7]), c_crossattn=text.clone(), **extra)
        out.square().mean().backward()
    matrices = {name: p for name, p in network.named_parameters() if p.ndim > 1}
    silent = [name for name, p in matrices.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []
