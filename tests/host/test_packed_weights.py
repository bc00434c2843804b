"""Models whose layers keep their weights packed (GGUF) train and extract as the model of their unpacked weights does.

With a stand-in for the layers everywhere; with ComfyUI-GGUF's own where its folder is in GGUF_NODES and `gguf` is installed.
"""

import asyncio
import importlib
import os
import sys
from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from comfyui_trilora.tests.host import packed_layers, tiny_models
from comfyui_trilora.tests.host.adapter_files import low_rank
from comfyui_trilora.tests.host.tiny_run import distance, random_dataset, run_node, traces

KEY = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
GGUF_NODES = os.environ.get("GGUF_NODES")


def again(tiny, operations, change):
    """The tiny SD3 again with layers of another kind; `change` turns its plain weights into theirs."""
    model = tiny.patcher.model
    with torch.inference_mode():
        config = comfy.supported_models.SD3(model.model_config.unet_config)
        config.set_inference_dtype(torch.float32, None)
        config.custom_operations = operations
        new = type(model)(config, device=torch.device("cpu"))
        change(new, model.diffusion_model.state_dict())
    return new


def stand_in(tiny):
    """(packed model, its patcher, module -> its weight unpacked)."""

    def change(new, state):
        new.diffusion_model.load_state_dict(state)
        packed_layers.packed(new)

    model = again(tiny, packed_layers.PackedOps, change)
    device = torch.device("cpu")
    return packed_layers.PackedPatcher(model, device, device), lambda module: module.get_weight(module.weight, torch.float32)


def real(tiny):
    """The same with ComfyUI-GGUF's layers and the tensors that `gguf` has written to a file."""
    gguf = pytest.importorskip("gguf")
    if not GGUF_NODES:
        pytest.skip("GGUF_NODES is not set")
    import nodes

    asyncio.run(nodes.load_custom_node(GGUF_NODES))
    package = sys.modules[str(Path(GGUF_NODES)).replace(".", "_x_")].__name__
    ops, loader = (importlib.import_module(f"{package}.{name}") for name in ("ops", "nodes"))
    quantise, kind = gguf.quants.quantize, gguf.GGMLQuantizationType.Q8_0

    def tensor(value):
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            packed = torch.from_numpy(quantise(value.float().numpy().copy(), kind))
            return ops.GGMLTensor(packed, tensor_type=kind, tensor_shape=value.shape)
        return ops.GGMLTensor(value.float().clone(), tensor_type=gguf.GGMLQuantizationType.F32, tensor_shape=value.shape)

    def change(new, state):
        new.diffusion_model.load_state_dict({key: tensor(value) for key, value in state.items() if key != "pos_embed"}, strict=False)
        new.diffusion_model.pos_embed.copy_(state["pos_embed"])

    model = again(tiny, ops.GGMLOps, change)
    device = torch.device("cpu")
    patcher = loader.GGUFModelPatcher.clone(comfy.model_patcher.ModelPatcher(model, device, device))
    return patcher, lambda module: module.get_weight(module.weight, torch.float32)


@pytest.fixture(scope="module")
def tiny(host_nodes):
    return tiny_models.flow_model()


@pytest.fixture(scope="module", params=[stand_in, real], ids=["stand-in", "ComfyUI-GGUF"])
def pair(request, tiny):
    """(patcher of the packed model, patcher of a model of the same values)."""
    patcher, unpack = request.param(tiny)

    def change(new, state):
        values = {}
        for name, module in patcher.model.diffusion_model.named_modules():
            if getattr(module, "weight", None) is not None and hasattr(module, "get_weight"):
                values[f"{name}.weight"] = unpack(module).clone()
        new.diffusion_model.load_state_dict({**state, **values})

    plain = again(tiny, None, change)
    packed = [m for m in patcher.model.diffusion_model.modules() if getattr(getattr(m, "weight", None), "tensor_type", None) is not None]
    assert len(packed) > 10 and all(m.weight.dtype == torch.uint8 for m in packed if m.weight.size() != m.weight.shape)
    return patcher, tiny_models.as_patcher(plain)


@pytest.fixture
def train(host_nodes, pack_module, tiny):
    """Function: MODEL, method node and target -> (adapter, report)."""

    def run(patcher, node="TriLoRAMethodLoRA", target="linear", **settings):
        dataset = random_dataset(pack_module("nodes.types"), tiny)
        config = run_node(host_nodes, "TriLoRATrainingSettings", **{"steps": 3, "learning_rate": 1e-3, "warmup": 0.0, "precision": "model", **settings})[0]
        method = run_node(host_nodes, node, rank=2)[0]
        return run_node(host_nodes, "TriLoRATrainAdapter", model=patcher, dataset=dataset, method=method, settings=config, target=target)[1::2]

    return run


def with_file(patcher, strength=1.0):
    """The MODEL with a low-rank file on one of its packed weights, by ComfyUI's own loader."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, low_rank(KEY, 384, 128, seed=3), strength, 0)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("node", ["TriLoRAMethodLoRA", "TriLoRAMethodTriLoRA"])
def test_training_on_packed_weights_is_training_on_their_values(pair, train, node, checkpointing):
    packed, plain = pair
    (adapter, report), (expected, _) = (train(each, node, checkpointing=checkpointing) for each in (packed, plain))
    assert adapter.keys() == expected.keys() and "notice" not in report
    for key, tensor in adapter.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5, msg=key)
    assert traces(packed) == []


def test_a_file_on_the_packed_model_is_trained_through(pair, train):
    """Its layers apply the patches themselves, in the backward pass too."""
    packed, plain = pair
    (adapter, _), (expected, _) = (train(with_file(each)) for each in (packed, plain))
    (without, _) = train(packed)
    for key, tensor in adapter.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5, msg=key)
    assert max(distance(adapter[key], without[key]) for key in adapter if "lora_up" in key) > 1e-3


def test_extraction_finds_what_is_on_a_packed_model(pair, host_nodes, pack_module):
    """Also after the patched model was loaded, which leaves its patches on the shared tensors."""
    packed, _ = pair
    tuned, method = with_file(packed), run_node(host_nodes, "TriLoRAMethodLoRA", rank=4)[0]
    file = low_rank(KEY, 384, 128, seed=3)
    expected = 0.5 * file[f"{KEY}.lora_up.weight"] @ file[f"{KEY}.lora_down.weight"]
    for loaded in (packed, tuned, packed):
        comfy.model_management.load_models_gpu([loaded])
        adapter, report = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned, model_base=packed, method=method, target="linear")
        layers, _ = pack_module("trilora_ops.checkpoint").split_layers(adapter)
        assert list(layers) == [KEY]
        found = layers[KEY].pair
        assert distance(found.scale * found.up @ found.down, expected) < 1e-4


def test_the_report_of_a_plan_counts_the_values_of_packed_weights(pair, train, host_nodes, pack_module, tiny):
    packed, plain = pair
    plan = run_node(host_nodes, "TriLoRABlockPlan", rank="J01=2")[0]
    lines = []
    for patcher in (packed, plain):
        report = run_node(
            host_nodes, "TriLoRATrainAdapter", model=patcher, dataset=random_dataset(pack_module("nodes.types"), tiny), plan=plan,
            method=run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)[0], settings=run_node(host_nodes, "TriLoRATrainingSettings", steps=1)[0],
        )[3]  # fmt: skip
        lines += [line for line in report.splitlines() if line.startswith("backward pass")]
    assert lines[0] == lines[1]


class SomebodysLinear(torch.nn.Linear):
    """A layer whose packed weight only its own forward pass understands."""


def test_packed_weights_that_cannot_be_read_are_refused_by_name(host_nodes, tiny, train, error):
    def change(new, state):
        new.diffusion_model.load_state_dict(state)
        layer = SomebodysLinear(128, 384)
        layer.weight = torch.nn.Parameter(torch.zeros(384 * 64, 1, dtype=torch.uint8), requires_grad=False)
        new.diffusion_model.joint_blocks[0].x_block.attn.qkv = layer

    patcher = tiny_models.as_patcher(again(tiny, None, change))
    method = run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)[0]
    with pytest.raises(error, match=rf"{KEY}\.weight is kept as torch\.uint8 by a SomebodysLinear .* cannot be trained through"):
        train(patcher)
    other = patcher.clone()
    other.add_patches({f"{KEY}.weight": (torch.ones(384, 128),)}, 1.0)
    with pytest.raises(error, match=rf"{KEY}\.weight: its weight is kept as torch\.uint8 by a SomebodysLinear"):
        run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=other, model_base=patcher, method=method, target="linear")
