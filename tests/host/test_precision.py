"""What a run computes in: the choice, that bf16 learns the same, and that the model samples afterwards as before."""

import comfy.model_management
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import random_dataset, run_node, traces, weights_hash

MODELS = {"eps": tiny_models.eps_prediction_model, "flow": tiny_models.flow_model, "flux": tiny_models.flux_model}
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def in_dtype(stored: torch.dtype, compute: torch.dtype | None):
    """The eps model with weights in `stored`, computing in `compute` where that is given."""
    return tiny_models.as_patcher(tiny_models.as_stored(tiny_models.eps_prediction_model().patcher.model, stored, compute))


def casting(patcher) -> list:
    """Which layers cast their weights, and to what the model casts."""
    layers = {name: m.comfy_cast_weights for name, m in patcher.model.named_modules() if hasattr(m, "comfy_cast_weights")}
    return [patcher.model.manual_cast_dtype, layers]


def learn(pack_module, host, tiny, **changes):
    config, registry = pack_module("training.config"), pack_module("trilora_ops.registry")
    settings = config.TrainingConfig(**{"steps": 6, "learning_rate": 5e-3, "batch_size": 2, "schedule": "constant", "warmup": 0.0, "caption_dropout": 0.1, **changes})
    method = registry.Method(pack_module("trilora_ops.residuals.trilora").TriLoraConfig(rank=4, sigma_init="ones"))
    return pack_module("nodes.training_run").run(host, random_dataset(pack_module("nodes.types"), tiny), method, settings, "linear+conv", None)


@pytest.mark.parametrize(
    ("stored", "compute", "precision", "native", "wanted"),
    [(FP32, None, "model", True, FP32), (FP32, None, "auto", True, BF16), (FP32, None, "auto", False, FP32), (FP32, None, "bf16", False, BF16),
     (BF16, FP32, "auto", True, BF16), (BF16, FP32, "auto", False, FP32), (BF16, None, "auto", False, BF16), (BF16, None, "model", True, BF16),
     (FP16, None, "auto", True, FP16), (FP16, None, "bf16", True, BF16), (FP16, FP32, "auto", True, BF16), (torch.float8_e4m3fn, FP32, "model", True, FP32)],
)  # fmt: skip
def test_the_choice(pack_module, monkeypatch, stored, compute, precision, native, wanted):
    """"auto" leaves half precision alone and asks the device; and a second run chooses as the first did."""
    module, patcher = pack_module("nodes.comfy_host"), in_dtype(stored, compute)
    monkeypatch.setattr(module, "multiplies_bf16", lambda device: native)
    for _ in range(2):
        host = module.ComfyHost(patcher, precision)
        assert host.compute_dtype == wanted
        with host.session():
            assert (host.model.manual_cast_dtype or host.model.get_dtype()) == wanted


def test_auto_leaves_a_model_alone_that_cannot_run_in_bf16(pack_module, monkeypatch):
    module, patcher = pack_module("nodes.comfy_host"), in_dtype(FP32, None)
    monkeypatch.setattr(module, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr(patcher.model.model_config, "supported_inference_dtypes", [FP16, FP32], raising=False)
    assert module.ComfyHost(patcher, "auto").compute_dtype == FP32


def test_what_has_instructions(pack_module, monkeypatch):
    """A processor is asked itself, since the host answers no for every one; other devices are the host's to know."""
    compat, asked = pack_module("nodes.compat"), []
    for answer in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=answer: answer)
        assert compat.multiplies_bf16(torch.device("cpu")) is answer
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not compat.multiplies_bf16(torch.device("cpu"))
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda device: asked.append(device) or True)
    assert compat.multiplies_bf16(torch.device("cuda")) and asked == [torch.device("cuda")]


@pytest.fixture(scope="module", params=MODELS)
def runs(request, pack_module):
    """(kind, {precision: (adapter, progress, report, fixed losses)}, (state of the model before, after), (prediction before, after))."""
    tiny = MODELS[request.param]()
    latent = torch.randn(tiny.latent_shape, generator=torch.Generator().manual_seed(4))
    sigma = 2.0 if request.param == "eps" else 0.6

    def state():
        with torch.inference_mode():
            predicted = tiny_models.predict(tiny, latent, sigma).clone()  # loads the model as it is sampled
        return predicted, (casting(tiny.patcher), weights_hash(tiny.patcher), traces(tiny.patcher))

    results, states = {}, [state()]
    for precision in ("model", "bf16"):
        host = pack_module("nodes.comfy_host").ComfyHost(tiny.patcher, precision)
        results[precision] = learn(pack_module, host, tiny, precision=precision)
    states.append(state())
    return request.param, results, states


def test_bf16_learns_what_fp32_learns(runs):
    """The loss on fixed noise falls, by as much as in fp32 to a tenth; it is not the same run."""
    _, results, _ = runs
    (_, own, report, fixed), (_, half, other_report, other_fixed) = results["model"], results["bf16"]
    assert half.skipped == 0 and half.losses != own.losses
    assert half.losses == pytest.approx(own.losses, rel=3e-2)
    assert other_fixed[1] < other_fixed[0] and other_fixed[0] - other_fixed[1] == pytest.approx(fixed[0] - fixed[1], rel=0.1)
    assert report.count("computed in") == 1 and "float32" in report and "bfloat16" in other_report


def test_adapters_stay_fp32(runs):
    _, results, _ = runs
    for state, *_ in results.values():
        assert all(t.dtype == FP32 and torch.isfinite(t).all() for t in state.values())


def test_the_model_samples_as_before(runs):
    """Same prediction bit for bit, same weights, and no layer casts that did not."""
    _, _, (before, after) = runs
    assert torch.equal(after[0], before[0]) and after[1] == before[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_bf16_point_where_those_of_fp32_do(pack_module, checkpointing):
    """All adapters together: cosine above 0.99 and the same length to 3 %."""
    tiny = tiny_models.eps_prediction_model()
    norms, found = [], []
    for precision in ("model", "bf16"):
        host = pack_module("nodes.comfy_host").ComfyHost(tiny.patcher, precision)
        plan, inject, objective = (pack_module(f"training.{name}") for name in ("plan", "inject", "objective"))
        method = pack_module("trilora_ops.registry").Method(pack_module("trilora_ops.residuals.lora").LoraConfig(rank=4))
        with host.session():
            generator = torch.Generator().manual_seed(9)
            adapters = plan.build_adapters(host, method, "linear+conv", seed=2)
            for adapter in adapters.values():
                adapter.residual.up.data.normal_(0.0, 0.05, generator=generator)
            samples = [host.prepare(i, i.conditioning) for i in random_dataset(pack_module("nodes.types"), tiny, count=2).images]
            x0, sigma = torch.cat([sample.x0 for sample in samples]), torch.tensor([0.5, 3.0])
            x = host.add_noise(x0, torch.randn(x0.shape, generator=generator), sigma)
            with inject.injected(host, adapters, checkpointing):
                loss = objective.x0_loss(host.denoise(x, sigma, host.collate(samples)), x0, objective.loss_weight("eps", sigma))
                loss.sum().backward()
        found.append(torch.cat([p.grad.flatten() for a in adapters.values() for p in a.parameters()]))
        norms.append(float(found[-1].norm()))
    assert norms[1] == pytest.approx(norms[0], rel=3e-2)
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.99


def test_the_node_passes_it_on(pack_module, host_nodes, monkeypatch):
    """Training Settings -> Train Adapter -> the host it trains through."""
    tiny, report = tiny_models.eps_prediction_model(), {}
    dataset = random_dataset(pack_module("nodes.types"), tiny)
    monkeypatch.setattr(pack_module("nodes.comfy_host"), "multiplies_bf16", lambda device: False)
    (method,) = run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)
    for precision in ("auto", "bf16"):
        (settings,) = run_node(host_nodes, "TriLoRATrainingSettings", steps=1, precision=precision)
        report[precision] = run_node(host_nodes, "TriLoRATrainAdapter", model=tiny.patcher, dataset=dataset, method=method, settings=settings)[3]
    assert "float32" in report["auto"] and "bfloat16" in report["bf16"]
