"""Training through models of every prediction type: it learns, its gradients are right, and the model stays as it was."""

import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import random_dataset, traces, weights_hash

MODELS = {
    "v": tiny_models.v_prediction_model,
    "flow": tiny_models.flow_model,
    "flux": tiny_models.flux_model,
}


@pytest.fixture(scope="module")
def engine(pack_module):
    """The parts of the pack that these tests drive, by module name."""
    names = ("nodes.training_run", "nodes.comfy_host", "nodes.types", "training.config", "training.inject", "training.loop",
             "training.objective", "training.plan", "trilora_ops.registry", "trilora_ops.residuals.lora", "trilora_ops.residuals.trilora")
    return {name.rpartition(".")[2]: pack_module(name) for name in names}


def condition(patcher) -> tuple:
    """Everything about a model's tensors: bytes, identities, and which of them ask for gradients (0.3.64's do)."""
    return weights_hash(patcher), [(id(p), p.requires_grad) for p in patcher.model.parameters()]


def config(engine, **changes):
    settings = {"steps": 6, "learning_rate": 5e-3, "batch_size": 2, "schedule": "constant", "warmup": 0.0, "caption_dropout": 0.1}
    return engine["config"].TrainingConfig(**{**settings, **changes})


@pytest.fixture(scope="module", params=MODELS)
def runs(request, engine):
    """(kind of model, patcher, condition before, {checkpointing: (adapter, progress, report, fixed losses)}, condition after)."""
    tiny = MODELS[request.param]()
    before = condition(tiny.patcher)
    method = engine["registry"].Method(engine["trilora"].TriLoraConfig(rank=4, sigma_init="ones"))
    dataset = random_dataset(engine["types"], tiny)
    results = {}
    for checkpointing in (False, True):
        host = engine["comfy_host"].ComfyHost(tiny.patcher)
        results[checkpointing] = engine["training_run"].run(host, dataset, method, config(engine, checkpointing=checkpointing), "linear", None)
    return request.param, tiny.patcher, before, results, condition(tiny.patcher)


def test_the_prediction_type_is_the_models(runs, engine):
    kind, patcher, *_ = runs
    assert engine["comfy_host"].ComfyHost(patcher).prediction == ("flow" if kind == "flux" else kind)


def test_training_lowers_the_loss_on_fixed_noise(runs):
    *_, results, _ = runs
    for _, progress, _, (before, after) in results.values():
        assert progress.skipped == 0 and after < 0.99 * before


def test_the_log_tells_of_every_twentieth_of_a_run(engine, caplog):
    """However fast the steps are; the node's own text changes twice a second."""
    tiny = MODELS["v"]()
    method = engine["registry"].Method(engine["lora"].LoraConfig(rank=1))
    with caplog.at_level("INFO", logger="trilora"):
        engine["training_run"].run(engine["comfy_host"].ComfyHost(tiny.patcher), random_dataset(engine["types"], tiny), method,
                                   config(engine, steps=41, batch_size=1), "attention", None)
    told = [record.getMessage().split()[1] for record in caplog.records if record.getMessage().startswith("step ")]
    assert told == [f"{step}/41" for step in (*range(2, 41, 2), 41)]


def test_checkpointing_changes_nothing_but_memory(runs):
    """Same losses, same gradients, same adapter."""
    *_, results, _ = runs
    (plain, progress, _, fixed), (recomputed, again, _, fixed_again) = results[False], results[True]
    assert again.losses == pytest.approx(progress.losses, rel=1e-4)
    assert again.grad_norm == pytest.approx(progress.grad_norm, rel=1e-3)
    assert fixed_again == pytest.approx(fixed, rel=1e-4)
    assert recomputed.keys() == plain.keys()


def test_only_flux_needs_copies_of_its_activations(runs):
    """Its blocks add in place to what autograd has kept; the run finds that out by itself."""
    kind, _, _, results, _ = runs
    assert [progress.cloning for _, progress, *_ in results.values()] == [kind == "flux"] * 2


def test_the_model_is_left_as_found(runs):
    _, patcher, before, _, after = runs
    assert after == before
    assert traces(patcher) == []
    assert all(p.is_inference() for p in patcher.model.diffusion_model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_flux_are_the_slopes_of_the_loss(engine, checkpointing):
    """In every adapted layer: the derivative along its own gradient = the finite difference along it."""
    tiny = MODELS["flux"]()
    host = engine["comfy_host"].ComfyHost(tiny.patcher)
    dataset = random_dataset(engine["types"], tiny, count=2)
    method = engine["registry"].Method(engine["lora"].LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(9)
    with host.session():
        samples = [host.prepare(image, image.conditioning) for image in dataset.images]
        adapters = engine["plan"].build_adapters(host, method, "linear", seed=2)
        for adapter in adapters.values():
            adapter.residual.up.data.normal_(0.0, 0.05, generator=generator)
        x0 = torch.cat([sample.x0 for sample in samples])
        sigma = torch.tensor([0.3, 0.8])
        x = host.add_noise(x0, torch.randn(x0.shape, generator=generator), sigma)
        weight = engine["objective"].loss_weight("flow", sigma)

        def loss() -> torch.Tensor:
            return engine["objective"].x0_loss(host.denoise(x, sigma, host.collate(samples)), x0, weight).sum()

        with engine["inject"].injected(host, adapters, checkpointing, clone_saved=True):
            loss().backward()
        assert len(adapters) >= 20
        for key, adapter in adapters.items():
            parameters = list(adapter.parameters())
            length = torch.cat([p.grad.flatten() for p in parameters]).norm()
            assert length > 0, key
            step = 0.02 * float(torch.cat([p.detach().flatten() for p in parameters]).norm())
            ends = []
            for sign in (1, -2):
                for p in parameters:
                    p.data.add_(p.grad, alpha=sign * step / float(length))
                with torch.no_grad(), engine["inject"].injected(host, adapters):
                    ends.append(float(loss()))
            for p in parameters:
                p.data.add_(p.grad, alpha=step / float(length))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert slope == pytest.approx(float(length), rel=2e-2), key


def test_training_on_top_of_another_adapter(engine, pack_module):
    """A patched model trains as it is: the loss before the first step is the patched model's, and its patches stay."""
    tiny = MODELS["v"]()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    patched = tiny.patcher.clone()
    with torch.inference_mode():
        patched.add_patches({key: ("diff", (torch.randn(128, 128) * 2,))}, 1.0)
    method = engine["registry"].Method(engine["lora"].LoraConfig(rank=2))
    dataset = random_dataset(engine["types"], tiny)
    befores = []
    for patcher in (tiny.patcher, patched):
        host = engine["comfy_host"].ComfyHost(patcher)
        state, _, _, (before, _) = engine["training_run"].run(host, dataset, method, config(engine, steps=1), "attention", None)
        befores.append(before)
    assert abs(befores[0] - befores[1]) > 1e-4 * befores[0]
    adapted, _ = pack_module("nodes.applying").apply_state(state, pack_module("nodes.types").StackEntry("adapter", 1.0, 0.0), patched, None)
    assert len(adapted.patches[key]) == 2 and len(patched.patches) == 1


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_stored_in_fewer_bits_train_as_their_values_do(engine, stored, checkpointing):
    """A base in bf16 or fp8 that computes in fp32: the losses of the same run on an fp32 base of the same values."""
    tiny, exact = (tiny_models.v_prediction_model() for _ in range(2))
    small = tiny_models.as_stored(tiny.patcher.model, stored)
    with torch.inference_mode():
        exact.patcher.model.diffusion_model.load_state_dict({k: v.float() for k, v in small.diffusion_model.state_dict().items()})
    method = engine["registry"].Method(engine["lora"].LoraConfig(rank=2))
    dataset, losses = random_dataset(engine["types"], tiny), []
    settings = config(engine, steps=2, checkpointing=checkpointing)
    for patcher in (tiny_models.as_patcher(small), exact.patcher):
        before = weights_hash(patcher)
        host = engine["comfy_host"].ComfyHost(patcher)
        state, progress, _, fixed = engine["training_run"].run(host, dataset, method, settings, "linear+conv", None)
        losses.append([*progress.losses, progress.grad_norm, *fixed])
        assert weights_hash(patcher) == before and traces(patcher) == []
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_model_that_computes_in_bf16_learns_in_fp32(engine):
    """Half-precision activations, full-precision adapters: small steps are not lost to rounding."""
    tiny = tiny_models.v_prediction_model()
    half = tiny_models.as_stored(tiny.patcher.model, torch.bfloat16, compute=None)
    host = engine["comfy_host"].ComfyHost(tiny_models.as_patcher(half))
    assert host.compute_dtype == torch.bfloat16
    method = engine["registry"].Method(engine["lora"].LoraConfig(rank=2))
    settings = config(engine, learning_rate=1e-3, caption_dropout=0.0)
    state, progress, _, (before, after) = engine["training_run"].run(host, random_dataset(engine["types"], tiny), method, settings, "linear", None)
    assert progress.skipped == 0 and after < before
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in state.values())
