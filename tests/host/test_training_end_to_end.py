"""From a folder of photographs to a file that every loader takes: the nodes in the order in which people connect them."""

import comfy.model_management
import pytest
import torch
from comfyui_trilora.tests.host.tiny_run import (
    distance,
    encode_photographs,
    list_saved_adapters,
    load_checkpoint,
    run_node,
    sample_latents,
    tiny_dataset,
    traces,
    weights_hash,
)

LATENT = (1, 4, 8, 8)
# (method node, its inputs, target)
RUNS = {
    "trilora": ("TriLoRAMethodTriLoRA", {"rank": 4, "sigma_init": "ones"}, "attention"),
    "locon": ("TriLoRAMethodLoRA", {"rank": 3, "alpha": 2.0}, "linear+conv"),
}


@pytest.fixture(scope="module")
def base(host_nodes, models_dir):
    """(MODEL, CLIP, VAE) of the stock checkpoint."""
    return load_checkpoint(host_nodes)


@pytest.fixture(scope="module")
def prompts(host_nodes, base):
    """CONDITIONING of a prompt and of the empty one."""
    return [run_node(host_nodes, "CLIPTextEncode", clip=base[1], text=text)[0] for text in ("photograph of a cat", "")]


@pytest.fixture(scope="module")
def base_latents(base, prompts):
    return sample_latents(base[0], *prompts, LATENT)


@pytest.fixture(scope="module", params=RUNS)
def trained(request, host_nodes, base):
    """One run: the four outputs of Train Adapter, the name of the saved fp32 file, and what the run did to its surroundings."""
    method_node, options, target = RUNS[request.param]
    before = weights_hash(base[0]), [id(p) for p in base[0].model.parameters()]
    modes = []
    settings = run_node(host_nodes, "TriLoRATrainingSettings", steps=5, learning_rate=2e-3, batch_size=2, schedule="constant",
                        warmup=0.0, training_seed=3)[0]
    method = run_node(host_nodes, method_node, **options)[0]
    with torch.inference_mode():
        model, adapter, loss, report = run_node(host_nodes, "TriLoRATrainAdapter", model=base[0],
                                                dataset=tiny_dataset(host_nodes), method=method, settings=settings, target=target)
        modes.append(torch.is_inference_mode_enabled())
    list_saved_adapters()
    name = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name=request.param.replace(" ", "_"), dtype="fp32")[0]
    after = weights_hash(base[0]), [id(p) for p in base[0].model.parameters()]
    return {"model": model, "adapter": adapter, "loss": loss, "report": report, "file": name, "before": before, "after": after,
            "modes": modes, "target": target}


@pytest.fixture(scope="module")
def trained_latents(trained, prompts):
    return sample_latents(trained["model"], *prompts, LATENT)


def fixed_noise_loss(report: str) -> tuple[float, float]:
    """(before, after) from the report's line "loss on fixed noise"."""
    (line,) = [line for line in report.splitlines() if line.startswith("loss on fixed noise")]
    words = line.split()
    return float(words[words.index("before,") - 1]), float(words[words.index("after") - 1])


def test_the_dataset_holds_the_photographs(host_nodes, models_dir):
    """Every photograph is there with its caption, at its own aspect ratio."""
    dataset = encode_photographs(host_nodes)
    assert [image.name for image in dataset.images] == ["astronaut.png", "chelsea.png", "coffee.png"]
    assert dataset.images[1].prompt == "photograph, a tabby cat looking up"
    assert dataset.tag_frequency["photograph"] == 3
    shapes = {tuple(image.latent.shape) for image in dataset.images}
    assert len(shapes) > 1 and all(shape[2] * shape[3] <= 16 * 16 for shape in shapes)
    assert "3 images, 3 with captions" in dataset.summary


def test_training_lowers_the_loss_on_fixed_noise(trained):
    before, after = fixed_noise_loss(trained["report"])
    assert after < 0.98 * before
    assert len(trained["loss"]["loss"]) == 5 and all(loss > 0 for loss in trained["loss"]["loss"])


def test_the_base_model_is_left_as_found(trained, base):
    """Same bytes, same tensor objects, no forward or hook left, no gradient kept, and the host's flags as before."""
    assert trained["after"] == trained["before"]
    assert traces(base[0]) == []
    assert trained["modes"] == [True]
    assert not getattr(comfy.model_management, "in_training", False)
    assert not base[0].patches


def test_the_returned_model_is_not_the_base(trained_latents, base_latents):
    assert distance(trained_latents, base_latents) > 1e-2


def test_our_loader_gives_what_was_trained(host_nodes, base, trained, trained_latents, prompts):
    model, clip = run_node(host_nodes, "TriLoRALoader", model=base[0], lora_name=trained["file"])
    assert clip is None
    assert distance(sample_latents(model, *prompts, LATENT), trained_latents) <= 1e-4


def test_core_loaders_give_what_was_trained(host_nodes, base, trained, trained_latents, prompts, caplog):
    """The file needs nothing of ours: core's loaders read all of it, without a word about missing keys."""
    model, _ = run_node(host_nodes, "LoraLoader", model=base[0], clip=base[1], lora_name=trained["file"],
                        strength_model=1.0, strength_clip=1.0)
    (alone,) = run_node(host_nodes, "LoraLoaderModelOnly", model=base[0], lora_name=trained["file"], strength_model=1.0)
    assert model.patches.keys() == alone.patches.keys() == trained["model"].patches.keys()
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
    for patched in (model, alone):
        assert distance(sample_latents(patched, *prompts, LATENT), trained_latents) <= 1e-4


def test_every_target_layer_is_in_the_file(trained, base):
    """attention: 8 layers a transformer; linear+conv: every linear layer and convolution inside the U-Net's blocks."""
    names = {key.rsplit(".lora_", 1)[0] for key in trained["adapter"] if ".lora_up." in key}
    modules = dict(base[0].model.diffusion_model.named_modules())
    wide = [n for n, m in modules.items() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    if trained["target"] == "attention":
        expected = [n for n in wide if ".attn1." in n or ".attn2." in n]
        assert len(expected) == 8 * sum(".transformer_blocks." in n and n.endswith(".norm1") for n in modules)
    else:
        expected = [n for n in wide if n not in ("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2")]
    assert len(names) == len(expected)


def test_core_loss_plot_and_saver_take_our_outputs(host_nodes, base, trained, trained_latents, prompts):
    """LORA_MODEL and LOSS_MAP are the host's own: its nodes save and apply ours."""
    (model,) = run_node(host_nodes, "LoraModelLoader", model=base[0], lora=trained["adapter"], strength_model=1.0)
    model = model if not isinstance(model, tuple) else model[0]
    assert distance(sample_latents(model, *prompts, LATENT), trained_latents) <= 1e-4
    assert set(trained["loss"]) == {"loss"}


def test_the_injected_adapters_compute_what_the_patched_model_does(host_nodes, base, pack_module):
    """Activations through the adapters = activations through the merged weights, for one denoising of a batch."""
    host = pack_module("nodes.comfy_host").ComfyHost(base[0])
    dataset = tiny_dataset(host_nodes)
    lora = pack_module("trilora_ops.residuals.lora").LoraConfig(rank=2)
    method = pack_module("trilora_ops.registry").Method(lora)
    with host.session():
        adapters = pack_module("training.plan").build_adapters(host, method, "everything", seed=1)
        for adapter in adapters.values():
            adapter.residual.up.data.normal_(0.0, 0.02)
        sample = host.prepare(dataset.images[0], dataset.images[0].conditioning)
        sigma = torch.tensor([1.3])
        x = host.add_noise(sample.x0, torch.randn(sample.x0.shape), sigma)
        with torch.no_grad():
            plain = host.denoise(x, sigma, host.collate([sample]))
            with pack_module("training.inject").injected(host, adapters):
                injected = host.denoise(x, sigma, host.collate([sample]))
        tensors, _ = pack_module("training.export").export_tensors(adapters, host.family(), host.layers())
    state = pack_module("trilora_ops.checkpoint").AdapterState(tensors)
    patched, _ = pack_module("nodes.applying").apply_state(state, pack_module("nodes.types").StackEntry("adapter", 1.0, 0.0), base[0], None)
    comfy.model_management.load_models_gpu([patched])
    with torch.inference_mode():
        merged = patched.model.apply_model(x, sigma, **host.collate([sample]))
    assert distance(injected, plain) > 1e-2
    assert distance(injected, merged) <= 1e-5
