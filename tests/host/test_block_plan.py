"""Block plans in the host: SD1.5's blocks at a small width, and a Flux; from the nodes to files that every loader takes."""

import json

import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import distance, list_saved_adapters, random_dataset, run_node
from safetensors import safe_open

# Block-wise LoRA's levels, and the last block with attention alone; as texts, kohya's list of 25, and webui's of 17
PLANS = {
    "full": "",
    "upper": "default=0, IN01-IN03=4, OUT09-OUT11=4",
    "middle": "0,0,0,0,4,4,4" + ",0" * 12 + ",4,4,4,0,0,0",
    "bottom": "1,0,0,0,0,1,1,0,1,1,1,0,0,0,0,0,0",
    "late": "default=0, OUT11=4",
}
BLOCKS = {
    "upper": {"IN01", "IN02", "OUT09", "OUT10", "OUT11"},
    "middle": {"IN04", "IN05", "OUT06", "OUT07", "OUT08"},
    "bottom": {"IN07", "IN08", "OUT03", "OUT04", "OUT05"},
    "late": {"OUT11"},
}
WIDE = {"middle": {"IN06"}, "bottom": set()}  # what a target with convolutions has in addition
FLUX = {"double": "default=0, D=4", "single": "train_double_block_indices=none", "late": "default=0, S01=4"}


@pytest.fixture(scope="module")
def sd15(host):
    return tiny_models.sd15_model()


@pytest.fixture(scope="module")
def blocks(pack_module, sd15):
    return pack_module("nodes.block_plan").blocks_of(sd15.patcher.model)


@pytest.fixture(scope="module")
def dataset(pack_module, sd15):
    return random_dataset(pack_module("nodes.types"), sd15)


def train(host_nodes, tiny, dataset, plan=None, method=None, target="attention", steps=2, **settings):
    """Train Adapter's outputs: (model, adapter, loss, report)."""
    settings = {"learning_rate": 5e-3, "schedule": "constant", "warmup": 0.0, **settings}
    method = method or run_node(host_nodes, "TriLoRAMethodLoRA", rank=4)[0]
    settings = run_node(host_nodes, "TriLoRATrainingSettings", steps=steps, **settings)[0]
    plans = {} if plan is None else {"plan": plan if not isinstance(plan, dict) else run_node(host_nodes, "TriLoRABlockPlan", **plan)[0]}
    return run_node(host_nodes, "TriLoRATrainAdapter", model=tiny.patcher, dataset=dataset, method=method, settings=settings, target=target, **plans)


@pytest.fixture(scope="module")
def trained(host_nodes, sd15, dataset):
    """Name of a plan -> Train Adapter's outputs."""
    return {name: train(host_nodes, sd15, dataset, None if name == "full" else {"rank": text}) for name, text in PLANS.items()}


def layers_of(adapter) -> set[str]:
    return {key.rsplit(".lora_", 1)[0] for key in adapter if ".lora_" in key}


def targets_of(pack_module, adapter, patcher) -> dict:
    return pack_module("nodes.comfy_patches").patches_from_state(adapter, patcher, None, "the adapter")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_file_holds_the_plans_layers_and_no_others(pack_module, trained, sd15, blocks, name):
    """Of the full run's layers exactly those in the plan's blocks, each with the shapes it has there."""
    full, adapter = trained["full"][1], trained[name][1]
    wanted = {key for key in targets_of(pack_module, full, sd15.patcher) if blocks.place(key).block in BLOCKS[name]}
    assert set(targets_of(pack_module, adapter, sd15.patcher)) == wanted and wanted
    assert adapter.keys() < full.keys()
    assert {key: tensor.shape for key, tensor in adapter.items()} == {key: full[key].shape for key in adapter}


def test_parameters_and_files_fall_as_the_plans_say(host_nodes, trained):
    """Report and file agree with the tensors; the five plans in the order of their sizes."""
    folder, sizes, parameters = list_saved_adapters(), {}, {}
    for name, (_, adapter, _, report) in trained.items():
        saved = folder / run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name=f"plan_{name}", dtype="fp32")[0]
        sizes[name] = saved.stat().st_size
        parameters[name] = sum(tensor.numel() for key, tensor in adapter.items() if not key.endswith(".alpha"))
        assert f"{parameters[name]:,} parameters" in report
        with safe_open(saved, "pt") as file:
            header, metadata = len(file.keys()), file.metadata()
        assert header == len(adapter) and ("trilora.block_plan" in metadata) is (name != "full")
        saved.unlink()
    for kind in (sizes, parameters):
        assert kind["late"] < min(kind["upper"], kind["middle"], kind["bottom"]) and max(kind["upper"], kind["middle"], kind["bottom"]) < kind["full"]
    assert sizes["late"] / sizes["full"] == pytest.approx(len(layers_of(trained["late"][1])) / len(layers_of(trained["full"][1])), rel=0.5)


@pytest.mark.parametrize(("name", "first", "without"), [("upper", "IN01", "EMB to IN00"), ("bottom", "IN07", "EMB to IN06"), ("late", "OUT11", "EMB to OUT10")])
def test_the_report_says_what_a_plan_saves(trained, name, first, without):
    report = trained[name][3]
    assert f"from {first} on:" in report and f"{without}: neither gradients nor kept activations" in report
    assert "of the target's 128 layers" in report


def engine_gradients(pack_module, tiny, dataset, adapters, checkpointing, host=None):
    """({layer: gradients}, {block of the model: whether a graph leads into it}) of one loss."""
    inject, objective = pack_module("training.inject"), pack_module("training.objective")
    with host.session():
        samples = [host.prepare(image, image.conditioning) for image in dataset.images[:1]]
        sigma = host.sigma(torch.tensor([0.6]))
        x0 = samples[0].x0
        x = host.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(3)), sigma)
        entered, hooks = [], []

        def note(module, args, kwargs):
            entered.append(any(isinstance(a, torch.Tensor) and a.requires_grad for a in (*args, *kwargs.values())))

        with inject.injected(host, adapters, checkpointing, clone_saved=host.prediction == "flow"):
            for block in host.blocks():
                hooks.append(block.register_forward_pre_hook(note, with_kwargs=True))
            try:
                estimate = host.denoise(x, sigma, host.collate(samples))
                forward = list(entered)
                objective.x0_loss(estimate, x0, objective.loss_weight(host.prediction, sigma)).sum().backward()
            finally:
                for hook in hooks:
                    hook.remove()
    return {key: [p.grad.clone() for p in a.parameters()] for key, a in adapters.items()}, forward


def planned(pack_module, host, text, target, blocks):
    """Adapters of rank 4 by a plan, moved from their start as by training, each layer by a draw of its own."""
    plan, lora = pack_module("training.plan"), pack_module("trilora_ops.residuals.lora")
    method = pack_module("trilora_ops.registry").Method(lora.LoraConfig(rank=4))
    read = pack_module("trilora_ops.block_plan").BlockPlan(text).read(blocks, method)
    adapters = plan.build_adapters(host, method, target, 2, read)
    for key, adapter in adapters.items():
        if text:
            adapter.residual.up.data.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(len(key) + sum(map(ord, key))))
    return adapters


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("model", "name", "target"), [*(("sd15", name, "attention") for name in BLOCKS), ("sd15", "middle", "linear+conv"),
                                                       *(("flux", name, "linear") for name in FLUX)])
def test_gradients_of_a_plan_are_those_of_the_full_computation(pack_module, sd15, model, name, target, checkpointing):
    """Full: adapters on every layer of the target, those outside the plan at their start, no checkpointing."""
    tiny = sd15 if model == "sd15" else tiny_models.flux_model()
    host = pack_module("nodes.comfy_host").ComfyHost(tiny.patcher)
    blocks = pack_module("nodes.block_plan").blocks_of(host.model)
    data = random_dataset(pack_module("nodes.types"), tiny, count=1)
    text = PLANS[name] if model == "sd15" else FLUX[name]
    with host.session():
        adapters = planned(pack_module, host, text, target, blocks)
        whole = planned(pack_module, host, "", target, blocks) | planned(pack_module, host, text, target, blocks)
    found, entered = engine_gradients(pack_module, tiny, data, adapters, checkpointing, host)
    expected, _ = engine_gradients(pack_module, tiny, data, whole, False, host)
    assert len(found) < len(expected)
    for key, gradients in found.items():
        for ours, full in zip(gradients, expected[key], strict=True):
            assert ours.any(), key
            assert distance(ours, full) <= 1e-4, key
    # no graph leads into a block before the first trained one; into every later one it does
    modules = dict(host.model.diffusion_model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    trained = [any(key.startswith(f"diffusion_model.{names[id(block)]}.") for key in adapters) for block in host.blocks()]
    first = trained.index(True)
    assert not any(entered[: first + 1]) and (first > 0 or name in ("upper", "double"))
    assert all(entered[first + 1:])


def test_nothing_below_is_asked_for_its_weight(pack_module, sd15, dataset, blocks, monkeypatch):
    """The backward pass of a late plan fetches frozen weights of late blocks only, with checkpointing too."""
    host = pack_module("nodes.comfy_host").ComfyHost(sd15.patcher)
    names, asked = {id(module): key for key, module in host.layers().items()}, set()
    fetch = host.frozen_weight

    def ask(module, like):
        if torch._C._current_graph_task_id() >= 0:  # the forward pass may ask too
            asked.add(names[id(module)])
        return fetch(module, like)

    monkeypatch.setattr(host, "frozen_weight", ask)
    with host.session():
        adapters = planned(pack_module, host, PLANS["late"], "attention", blocks)
    for checkpointing in (False, True):
        engine_gradients(pack_module, sd15, dataset, adapters, checkpointing, host)
    assert {blocks.place(key).block for key in asked} <= {"OUT11", "FINAL"} and asked


@pytest.mark.parametrize("name", BLOCKS)
def test_core_and_our_loader_apply_a_plans_file(host_nodes, pack_module, sd15, trained, name, caplog):
    """Core takes the file without a word, and what is applied is what was trained."""
    file = run_node(host_nodes, "TriLoRASaveAdapter", adapter=trained[name][1], name="plan_loads", dtype="fp32")[0]
    latent = torch.randn(sd15.latent_shape, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected, base = (tiny_models.predict(sd15._replace(patcher=model), latent, 2.0) for model in (trained[name][0], sd15.patcher))
        caplog.clear()
        (core,) = run_node(host_nodes, "LoraLoaderModelOnly", model=sd15.patcher, lora_name=file, strength_model=1.0)
        assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
        ours, _ = run_node(host_nodes, "TriLoRALoader", model=sd15.patcher, lora_name=file)
        assert core.patches.keys() == ours.patches.keys() == trained[name][0].patches.keys()
        for model in (core, ours):
            assert distance(tiny_models.predict(sd15._replace(patcher=model), latent, 2.0) - base, expected - base) <= 1e-3
    (list_saved_adapters() / file).unlink()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_kohya_reader_finds_whole_layers(trained, name):
    """sd-scripts builds its network from a file's tensors: each layer's rank is down's first axis, its alpha stands beside."""
    adapter = trained[name][1]
    for layer in layers_of(adapter):
        down, up, alpha = (adapter[layer + end] for end in (".lora_down.weight", ".lora_up.weight", ".alpha"))
        assert layer.startswith("lora_unet_") and "." not in layer
        assert down.shape[0] == up.shape[1] == 4 and alpha.ndim == 0
    assert len(adapter) == 3 * len(layers_of(adapter))
    assert adapter.metadata["ss_network_module"] == "networks.lora" and adapter.metadata["ss_network_dim"] == "4"


@pytest.mark.parametrize("name", BLOCKS)
def test_a_plan_read_from_its_file_trains_the_same_again(host_nodes, sd15, dataset, trained, name):
    """Through Save, Load and Plan from Adapter: the same tensors, bit by bit."""
    file = run_node(host_nodes, "TriLoRASaveAdapter", adapter=trained[name][1], name="plan_again", dtype="fp16")[0]
    loaded = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=file)[0]
    plan, text = run_node(host_nodes, "TriLoRAPlanFromAdapter", adapter=loaded, model=sd15.patcher)
    again = train(host_nodes, sd15, dataset, plan)[1]
    assert again.keys() == trained[name][1].keys()
    assert all(torch.equal(tensor, trained[name][1][key]) for key, tensor in again.items())
    assert again.metadata["trilora.block_plan"] == trained[name][1].metadata["trilora.block_plan"]
    assert "target: attention" in text and json.loads(again.metadata["trilora.block_plan"])[0]["rank"] in text
    (list_saved_adapters() / file).unlink()


@pytest.mark.parametrize("name", [*BLOCKS, "full"])
def test_a_plan_read_from_tensors_alone_trains_the_same_layers(host_nodes, pack_module, sd15, dataset, trained, name):
    """As of a file of another program: no metadata, or those of a tool that made another file of it."""
    state = pack_module("trilora_ops.checkpoint").AdapterState(trained[name][1])
    plan, text = run_node(host_nodes, "TriLoRAPlanFromAdapter", adapter=state, model=sd15.patcher)
    again = train(host_nodes, sd15, dataset, plan, run_node(host_nodes, "TriLoRAMethodLoRA", rank=9)[0])[1]
    assert {key: tensor.shape for key, tensor in again.items()} == {key: tensor.shape for key, tensor in trained[name][1].items()}
    if name == "late":
        assert text.splitlines()[0] == "rank  default=0, OUT11=4"
        (smaller,) = run_node(host_nodes, "TriLoRAResizeAdapter", adapter=trained[name][1], rank=2)[:1]
        assert "OUT11=2" in run_node(host_nodes, "TriLoRAPlanFromAdapter", adapter=smaller, model=sd15.patcher)[1]


def test_conv_and_linear_ranks_make_a_locon(host_nodes, sd15, dataset, trained):
    """kohya's block_dims and conv_block_dims: ranks by kind; blocks without attention are trained in their convolutions."""
    adapter = train(host_nodes, sd15, dataset, {"rank": "default=0, IN03=2, OUT10-OUT11=4, OUT10-OUT11.conv=2"}, target="linear+conv")[1]
    ranks = {layer: adapter[layer + ".lora_down.weight"].shape[0] for layer in layers_of(adapter)}
    assert ranks["lora_unet_down_blocks_0_downsamplers_0_conv"] == 2
    assert {rank for layer, rank in ranks.items() if "conv" in layer} == {2}
    assert {rank for layer, rank in ranks.items() if "attn" in layer} == {4}


def test_methods_by_block(host_nodes, pack_module, sd15, dataset):
    """A chain of plans: TLoRA* in the middle, TriLoRA at the end with its own alpha and rate. One file, which both loaders apply."""
    ring = run_node(host_nodes, "TriLoRAMethodTransform", pair="TLoRA*", rank=2)[0]
    trilora = run_node(host_nodes, "TriLoRAMethodTriLoRA", rank=3, sigma_init="ones")[0]
    last = run_node(host_nodes, "TriLoRABlockPlan", rank="default=0, OUT11=5", alpha="OUT11=2.5", learning_rate="OUT11=2", method=trilora)[0]
    plan = run_node(host_nodes, "TriLoRABlockPlan", rank="default=0, MID1=1", method=ring, plan=last)[0]
    model, adapter, _, report = train(host_nodes, sd15, dataset, plan, steps=3)
    assert "tensor_ring+lora, trilora" in report and adapter.metadata["trilora.form"] == "transform"
    assert any(".transform.core0" in key for key in adapter) and adapter["lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_q.lora_down.weight"].shape[0] == 5
    file = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="plan_mixed", dtype="fp32")[0]
    latent = torch.randn(sd15.latent_shape, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        (core,) = run_node(host_nodes, "LoraLoaderModelOnly", model=sd15.patcher, lora_name=file, strength_model=1.0)
        ours, _ = run_node(host_nodes, "TriLoRALoader", model=sd15.patcher, lora_name=file)
        base, expected, *found = (tiny_models.predict(sd15._replace(patcher=m), latent, 2.0) for m in (sd15.patcher, model, core, ours))
    assert all(distance(each - base, expected - base) <= 1e-3 for each in found)
    loaded = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=file)[0]
    again = train(host_nodes, sd15, dataset, run_node(host_nodes, "TriLoRAPlanFromAdapter", adapter=loaded, model=sd15.patcher)[0], steps=3)[1]
    assert all(torch.equal(tensor, adapter[key]) for key, tensor in again.items()) and again.keys() == adapter.keys()
    (list_saved_adapters() / file).unlink()


def test_flux_blocks_by_index(host_nodes, pack_module):
    """kohya's lists for Flux, by learning rate and by rank; the file has nothing of the double blocks."""
    tiny = tiny_models.flux_model()
    data = random_dataset(pack_module("nodes.types"), tiny, count=2)
    for field in ("rank", "learning_rate"):
        adapter = train(host_nodes, tiny, data, {field: "train_double_block_indices=none train_single_block_indices=1"}, target="transformer")[1]
        layers = layers_of(adapter)
        assert layers == {f"diffusion_model.single_blocks.1.linear{part}" for part in (1, 2)}
    adapter = train(host_nodes, tiny, data, {"rank": "network_reg_dims=single_blocks=2,double_blocks_1=3"}, target="transformer")[1]
    ranks = {layer.split(".")[1] + layer.split(".")[2]: adapter[layer + ".lora_down.weight"].shape[0] for layer in layers_of(adapter)}
    assert ranks == {"single_blocks0": 2, "single_blocks1": 2, "double_blocks0": 4, "double_blocks1": 3}


@pytest.mark.parametrize(("inputs", "message"), [
    ({"rank": "IN12=4"}, "block plan: rank: 'IN12' names no block of this model"),
    ({"rank": "default=0"}, "is 0 in every layer of this model"),
    ({"learning_rate": "default=0"}, "is 0 in every layer of this model"),
    ({"rank": "default=0, IN03=4, IN06=4"}, r"target='attention' has no layer in what the plan trains \(IN03, IN06\); choose target='linear\+conv', which makes it a LoCon"),
    ({"rank": "OUT11=300"}, "layer diffusion_model.output_blocks.11.1.*rank=300 is larger than the layer"),
    ({"rank": "OUT11=0.5"}, "rank: OUT11=0.5: a rank is a whole number"),
])  # fmt: skip
def test_errors_come_before_the_training(host_nodes, sd15, dataset, inputs, message):
    with pytest.raises(ValueError, match=message):
        train(host_nodes, sd15, dataset, inputs)


def test_blocks_without_a_layer_in_the_target_are_named(host_nodes, sd15, dataset, caplog):
    report = train(host_nodes, sd15, dataset, {"rank": "default=0, OUT11=4, IN03=4, OUT10.conv=4"})[3]
    (line,) = [line for line in report.splitlines() if line.startswith("left out by the target")]
    assert line.endswith("IN03, OUT10.conv")
    assert any("has no layer in IN03, OUT10.conv; a wider target has" in r.getMessage() for r in caplog.records)


def test_an_adapter_without_ranks_has_no_plan(host_nodes, pack_module, sd15):
    other = {"lora_unet_mid_block_attentions_0_norm.diff": torch.ones(64)}
    with pytest.raises(ValueError, match="has no layer with a rank"):
        run_node(host_nodes, "TriLoRAPlanFromAdapter", adapter=other, model=sd15.patcher)
