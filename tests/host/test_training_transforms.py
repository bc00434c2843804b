"""Transform adapters from the method node to the file in every loader: presets, and kinds that only this file knows."""

from dataclasses import dataclass
from typing import ClassVar

import comfy.sd
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import (
    distance,
    list_saved_adapters,
    load_checkpoint,
    random_dataset,
    run_node,
    sample_latents,
    tiny_dataset,
    traces,
    weights_hash,
)
from torch import nn

LATENT = (1, 4, 8, 8)
# pair -> (the method node's sizes, target, tensors of a layer in the file)
RUNS = {
    "TLoRA": ({"transform_size": 2, "rank": 2}, "attention", {"transform.core", "residual.core"}),
    "TLoRA*": ({"transform_size": 1, "rank": 3}, "linear+conv", {"transform.core", "residual.up", "residual.down", "residual.scale"}),
    "DoRA-like": ({"rank": 3, "options": "alpha=2"}, "attention", {"transform.m", "residual.up", "residual.down", "residual.scale"}),
    "OFT-like": ({"transform_size": 4}, "linear+conv", {"transform.skew"}),
    "toy + toy": ({"rank": 2}, "linear+conv", {"transform.g", "residual.a", "residual.b"}),
}


@pytest.fixture(scope="module")
def registry(pack_module):
    """The pack's registry with one kind more on each side: its class, and its line."""
    registry = pack_module("trilora_ops.registry")
    registry.TRANSFORMS["toy"] = toy_transform(pack_module("trilora_ops.transforms.channels"))
    registry.RESIDUALS["toy"] = toy_residual(pack_module("trilora_ops.residuals.low_rank"))
    yield registry
    del registry.TRANSFORMS["toy"], registry.RESIDUALS["toy"]


def toy_transform(channels):
    """T x = x + g * roll(x, 1)."""

    class Toy(channels.ChannelTransform):
        def __init__(self, shape, g):
            super().__init__(shape)
            self.g = nn.Parameter(g)

        def rows(self, x, transposed=False):
            return x + ((self.g * x).roll(-1, dims=1) if transposed else self.g * x.roll(1, dims=1))

    @dataclass(frozen=True)
    class ToyConfig:
        kind: ClassVar[str] = "toy"
        TENSORS: ClassVar[tuple[str, ...]] = ("g",)
        SIZE: ClassVar[str | None] = None

        @classmethod
        def read(cls, shape, tensors):
            return Toy(shape, tensors["g"]) if set(tensors) == {"g"} else None

        def build(self, shape, weight, generator):
            return Toy(shape, torch.zeros(shape.inp))

    return ToyConfig


def toy_residual(low_rank):
    """R = a * b in tensors of its own names."""

    class Toy(low_rank.LowRankResidual):
        def __init__(self, shape, a, b):
            super().__init__(shape)
            self.a, self.b = nn.Parameter(a), nn.Parameter(b)

        def factors(self):
            return self.a, self.b

        def tensors(self):
            return {"a": self.a.detach(), "b": self.b.detach()}

    @dataclass(frozen=True)
    class ToyConfig:
        kind: ClassVar[str] = "toy"
        TENSORS: ClassVar[tuple[str, ...]] = ("a", "b")
        SIZE: ClassVar[str | None] = "width"
        width: int = 5

        @classmethod
        def read(cls, shape, tensors):
            return Toy(shape, tensors["a"], tensors["b"]) if set(tensors) == {"a", "b"} else None

        def build(self, shape, weight, generator):
            return Toy(shape, torch.zeros(shape.out, self.width), 0.1 * torch.randn(self.width, shape.columns, generator=generator))

    return ToyConfig


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


def kept_adapters(train, run) -> tuple:
    """(what `run` returns, the adapters that the training run inside it built and trained)."""
    kept, build = {}, train.build_adapters

    def build_and_keep(*arguments):
        kept.update(build(*arguments))
        return kept

    train.build_adapters = build_and_keep
    try:
        return run(), kept
    finally:
        train.build_adapters = build


@pytest.fixture(scope="module", params=RUNS)
def trained(request, host_nodes, pack_module, registry, base, prompts):
    """One run through the nodes: Train Adapter's outputs, its adapters, the saved fp32 file, and latents of the training forward."""
    sizes, target, tensors = RUNS[request.param]
    before = weights_hash(base[0]), [id(p) for p in base[0].model.parameters()]
    method = run_node(host_nodes, "TriLoRAMethodTransform", pair=request.param, **sizes)[0]
    settings = run_node(host_nodes, "TriLoRATrainingSettings", steps=5, learning_rate=5e-3, batch_size=2, schedule="constant",
                        warmup=0.0, training_seed=3)[0]
    (model, adapter, loss, report), adapters = kept_adapters(
        pack_module("nodes.training_run"),
        lambda: run_node(host_nodes, "TriLoRATrainAdapter", model=base[0], dataset=tiny_dataset(host_nodes), method=method,
                         settings=settings, target=target))
    after = weights_hash(base[0]), [id(p) for p in base[0].model.parameters()]
    list_saved_adapters()
    name = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="transform", dtype="fp32")[0]
    host = pack_module("nodes.comfy_host").ComfyHost(base[0])
    with host.session(), pack_module("training.inject").injected(host, adapters):
        forward = sample_latents(host.patcher, *prompts, LATENT)
    return {"pair": request.param, "tensors": tensors, "model": model, "adapter": adapter, "loss": loss["loss"], "report": report,
            "file": name, "before": before, "after": after, "adapters": adapters, "forward": forward}


def test_every_pair_is_offered_by_the_node(host_nodes, pack_module, registry):
    """The list is made when it is asked for: kinds registered after the node was loaded are in it."""
    schema = host_nodes.NODE_CLASS_MAPPINGS["TriLoRAMethodTransform"].GET_SCHEMA()
    (pair,) = [entry for entry in schema.inputs if entry.id == "pair"]
    assert pair.options == list(pack_module("trilora_ops.presets").pairs())
    assert {*RUNS, "toy + lora", "tensor_ring + toy"} <= set(pair.options)


def test_a_wrong_option_is_answered_with_the_right_ones(host_nodes):
    with pytest.raises(ValueError, match="options: 'ringrank' is unknown; TLoRA has transform.ring_rank=1"):
        run_node(host_nodes, "TriLoRAMethodTransform", pair="TLoRA", options="ringrank=2")


def test_training_lowers_the_loss_on_fixed_noise(trained):
    (line,) = [line for line in trained["report"].splitlines() if line.startswith("loss on fixed noise")]
    words = line.split()
    before, after = float(words[words.index("before,") - 1]), float(words[words.index("after") - 1])
    assert after < 0.99 * before
    assert len(trained["loss"]) == 5 and all(loss > 0 for loss in trained["loss"])


def test_the_base_model_is_left_as_found(trained, base):
    assert trained["after"] == trained["before"]
    assert traces(base[0]) == [] and not base[0].patches


def test_the_file_holds_transform_and_residual_of_every_layer(trained):
    names = {key.partition(".")[2].rstrip("0123456789") for key in trained["adapter"]}
    assert names == trained["tensors"]
    assert len({key.partition(".")[0] for key in trained["adapter"]}) == len(trained["adapters"]) >= 8
    assert trained["adapter"].metadata["trilora.form"] == "transform"


def test_the_trained_model_is_the_training_forward(trained, base_latents, prompts):
    """In memory, merged into the weights, and along the activations: the same latents, which are not the base's."""
    assert distance(trained["forward"], base_latents) > 1e-2
    assert distance(sample_latents(trained["model"], *prompts, LATENT), trained["forward"]) <= 1e-4


@pytest.mark.parametrize("loader", ["LoraLoader", "LoraLoaderModelOnly", "TriLoRALoader"])
def test_the_saved_file_in_every_loader_is_the_training_forward(host_nodes, base, trained, prompts, caplog, loader):
    inputs = {"LoraLoader": {"clip": base[1], "strength_model": 1.0, "strength_clip": 1.0}, "LoraLoaderModelOnly": {"strength_model": 1.0}}
    model = run_node(host_nodes, loader, model=base[0], lora_name=trained["file"], **inputs.get(loader, {}))[0]
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
    assert model.patches.keys() == trained["adapters"].keys()
    assert distance(sample_latents(model, *prompts, LATENT), trained["forward"]) <= 1e-4


def test_the_saved_file_as_a_hook_is_the_training_forward(host_nodes, base, trained, prompts):
    """Core's hooks patch the weights for the conditions that carry them, while sampling."""
    (hooks,) = run_node(host_nodes, "CreateHookLoraModelOnly", lora_name=trained["file"], strength_model=1.0)
    hooked = [run_node(host_nodes, "ConditioningSetProperties", cond_NEW=prompt, strength=1.0, set_cond_area="default", hooks=hooks)[0]
              for prompt in prompts]
    assert distance(sample_latents(base[0], *hooked, LATENT), trained["forward"]) <= 1e-4


@pytest.mark.parametrize("pair", ["TLoRA", "TLoRA*", "diagonal + trilora"])
def test_a_flow_model_learns_a_transform(pack_module, pair):
    """SD3's fused q, k and v as one layer: the loss falls, and core's loader gives the training forward."""
    names = ("nodes.training_run", "nodes.types", "nodes.comfy_host", "training.config", "training.inject", "trilora_ops.presets")
    train, types, comfy_host, config, inject, presets = map(pack_module, names)
    tiny = tiny_models.flow_model()
    settings = config.TrainingConfig(steps=6, learning_rate=5e-3, batch_size=2, schedule="constant", warmup=0.0, caption_dropout=0.1)
    method = presets.build_method(pair, rank=2)
    (state, progress, _, (before, after)), adapters = kept_adapters(
        train, lambda: train.run(comfy_host.ComfyHost(tiny.patcher), random_dataset(types, tiny), method, settings, "linear", None))
    assert progress.skipped == 0 and after < 0.99 * before
    latent = torch.randn(tiny.latent_shape, generator=torch.Generator().manual_seed(8))
    host = comfy_host.ComfyHost(tiny.patcher)
    with host.session(), inject.injected(host, adapters), torch.inference_mode():
        forward = tiny_models.predict(tiny._replace(patcher=host.patcher), latent, 0.7)
    with torch.inference_mode():
        plain = tiny_models.predict(tiny, latent, 0.7)
        patched = comfy.sd.load_lora_for_models(tiny.patcher, None, dict(state), 1.0, 0)[0]
        loaded = tiny_models.predict(tiny._replace(patcher=patched), latent, 0.7)
    assert distance(plain, forward) > 1e-3 and distance(loaded, forward) <= 1e-4


@pytest.mark.parametrize("loader", ["LoraLoaderModelOnly", "TriLoRALoader"])
def test_training_on_top_of_a_transform_file(host_nodes, base, trained, loader):
    """Train Adapter loads the model outside inference mode, while a loader node has read the file's tensors inside it."""
    inputs = {"LoraLoaderModelOnly": {"strength_model": 1.0}, "TriLoRALoader": {}}[loader]
    model = run_node(host_nodes, loader, model=base[0], lora_name=trained["file"], **inputs)[0]
    method = run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)[0]
    settings = run_node(host_nodes, "TriLoRATrainingSettings", steps=1)[0]
    _, adapter, loss, _ = run_node(host_nodes, "TriLoRATrainAdapter", model=model, dataset=tiny_dataset(host_nodes), method=method,
                                   settings=settings, target="attention")
    assert len(loss["loss"]) == 1 and adapter
