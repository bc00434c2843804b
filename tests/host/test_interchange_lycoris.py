"""LyCORIS' modules on the host's weights: what a layer computes with one, and with the weight that the host makes of its file.

The layer's output under LyCORIS is the measure; its `get_merged_weight` multiplies LoHa's and LoKr's scale in twice. Where
the host's core differs from LyCORIS, the test says so with the exact formula: the pack leaves these kinds to core, and
must then do what core does.
"""

from dataclasses import dataclass

import pytest
import torch
from comfyui_trilora.tests.host.foreign_writers import deltas, weight_of
from comfyui_trilora.tests.host.tiny_run import distance, list_saved_adapters, run_node
from safetensors.torch import save_file
from torch import nn

LINEAR = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_middle_block_0_in_layers_2"
TARGETS = {LINEAR: "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight", CONV: "diffusion_model.middle_block.0.in_layers.2.weight"}


@pytest.fixture
def written(tiny):
    """Function: module class and options -> (name of its file, {target: Trained}), every parameter moved from its start."""
    path = list_saved_adapters() / "lycoris.safetensors"

    def write(kind, **options):
        with torch.inference_mode(False), torch.no_grad():
            modules, layers = nn.ModuleDict(), {}
            for number, (name, key) in enumerate(TARGETS.items()):
                weight = weight_of(tiny.patcher, key).clone()
                layer = nn.Linear(128, 128, bias=False) if weight.ndim == 2 else nn.Conv2d(128, 128, 3, padding=1, bias=False)
                layer.weight = nn.Parameter(weight)
                modules[name] = kind(name, layer, 1.0, **{"lora_dim": 4, "alpha": 2.0, **options})
                layers[key] = Trained(modules[name], layer, weight.clone())
                layers[key].module.apply_to()
                for parameter in modules[name].parameters():
                    number += 2
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            save_file({key: value.detach().contiguous() for key, value in modules.state_dict().items()}, path)
        return path.name, layers

    yield write
    path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Trained:
    """A layer under a module of LyCORIS; weight: the layer's own."""

    module: object
    layer: nn.Module
    weight: torch.Tensor

    def error(self, delta: torch.Tensor, strength: float = 1.0) -> float:
        """Distance of what `delta` adds to the layer's output from what LyCORIS adds at this strength, relative to that."""
        linear = self.weight.ndim == 2
        with torch.inference_mode(False), torch.no_grad():
            x = torch.randn((40, 128) if linear else (2, 128, 9, 8), generator=torch.Generator().manual_seed(3))

            def compute(weight):
                return nn.functional.linear(x, weight) if linear else nn.functional.conv2d(x, weight, padding=1)

            self.module.multiplier = strength
            added = self.layer(x).double() - compute(self.weight)
            self.module.multiplier = 1.0
            assert float(added.norm()) > 0.01 * float(compute(self.weight).norm())
            return distance(compute(delta.clone()), added)


def applied(host_nodes, tiny, name: str, loader: str, strength: float = 1.0, **inputs) -> dict[str, torch.Tensor]:
    """Target key -> what a loader's patches add to the weight."""
    if loader == "TriLoRAApplyStack":
        (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", lora_name=name, strength_model=strength, **inputs)
        return deltas(run_node(host_nodes, loader, model=tiny.patcher, stack=stack)[0], tiny.patcher)
    return deltas(run_node(host_nodes, loader, model=tiny.patcher, lora_name=name, strength_model=strength, **inputs)[0], tiny.patcher)


def kinds() -> dict[str, tuple]:
    """Name -> (module class, options), for what core computes as LyCORIS does."""
    from lycoris.modules.full import FullModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    return {
        "LoCon": (LoConModule, {}), "LoCon, rs_lora": (LoConModule, {"rs_lora": True}), "Tucker": (LoConModule, {"use_tucker": True}),
        "DoRA on the input": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
        "LoHa": (LohaModule, {}), "LoHa, Tucker": (LohaModule, {"use_tucker": True}),
        "LoKr": (LokrModule, {"factor": 8}), "LoKr, both halves": (LokrModule, {"factor": 8, "decompose_both": True, "lora_dim": 2}),
        "LoKr, full": (LokrModule, {"full_matrix": True}),
        "GLoRA": (GLoRAModule, {}), "full": (FullModule, {}),
    }  # fmt: skip


KINDS = ("LoCon", "LoCon, rs_lora", "Tucker", "DoRA on the input", "LoHa", "LoHa, Tucker", "LoKr", "LoKr, both halves", "LoKr, full", "GLoRA", "full")
LOADERS = ("TriLoRALoader", "TriLoRAApplyStack", "LoraLoaderModelOnly")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_does_what_lycoris_does(host_nodes, tiny, written, kind, loader):
    module, options = kinds()[kind]
    name, layers = written(module, **options)
    found = applied(host_nodes, tiny, name, loader)
    assert found.keys() == layers.keys()
    assert {key: layer.error(found[key]) <= 2e-5 for key, layer in layers.items()} == dict.fromkeys(layers, True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "DoRA" not in kind])
def test_strength_is_lycoris_multiplier(host_nodes, tiny, written, kind):
    """(At other strengths than 1 LyCORIS' DoRA is no straight line.)"""
    module, options = kinds()[kind]
    name, layers = written(module, **options)
    ways = [(loader, {"strength": 0.6}) for loader in LOADERS] + [(loader, {"block_weights": "MID=0.6"}) for loader in LOADERS[:2]]
    for loader, inputs in ways:
        found = applied(host_nodes, tiny, name, loader, **inputs)
        assert {key: layer.error(found[key], 0.6) <= 2e-5 for key, layer in layers.items()} == dict.fromkeys(layers, True)


@pytest.mark.parametrize("module", ["diag_oft.DiagOFTModule", "boft.ButterflyOFTModule"])
@pytest.mark.parametrize("strength", [1.0, 0.6, -1.0])
def test_rotations(host_nodes, tiny, written, module, strength):
    """OFT and BOFT: core multiplies by the strength once too often, so its loader agrees with LyCORIS at 1 alone.

    Ours are the straight line through 0 and 1, by the node's strength and by that of the blocks; so is LyCORIS' OFT, while
    its BOFT turns by a part of each of its stages.
    """
    name, layers = written(_module(module), lora_dim=8)
    once = applied(host_nodes, tiny, name, "TriLoRAApplyStack")
    core = applied(host_nodes, tiny, name, "LoraLoaderModelOnly", strength)
    for key, layer in layers.items():
        assert layer.error(once[key]) <= 2e-5 and layer.error(core[key] / strength, strength) <= 2e-5
    for loader in ("TriLoRALoader", "TriLoRAApplyStack"):
        for inputs in ({"strength": strength}, {"block_weights": f"default={strength}"}):
            found = applied(host_nodes, tiny, name, loader, **inputs)
            for key, layer in layers.items():
                assert distance(found[key], strength * once[key]) <= 1e-5
                assert "Butterfly" in module or layer.error(found[key], strength) <= 2e-5


def test_dora_on_the_output_is_cores_reading(host_nodes, tiny, written):
    """m / ||W + delta|| (W + delta), the norms of each row, is DoRA, in its paper and in LyCORIS; core divides by ||W|| instead."""
    name, layers = written(_module("locon.LoConModule"), weight_decompose=True)
    for loader in LOADERS:
        found = applied(host_nodes, tiny, name, loader)
        for key, layer in layers.items():
            with torch.inference_mode(False), torch.no_grad():
                changed, weight = layer.weight + layer.module.get_diff_weight()[0], layer.weight
                m = layer.module.dora_scale.detach()

                def norms(tensor):
                    return tensor.flatten(1).norm(dim=1).view(-1, *(1 for _ in tensor.shape[1:]))

                assert layer.error(changed * (m / norms(changed)) - weight) <= 2e-5
                assert distance(found[key], changed * (m / norms(weight)) - weight) <= 2e-5
                assert layer.error(found[key]) > 1e-3


@pytest.mark.parametrize(
    ("options", "as_core"),
    [({"rescaled": True}, lambda module: module.rescale.data.fill_(1.0)), ({"constraint": 0.5}, lambda module: setattr(module, "constraint", 0.5))],
    ids=["rescaled", "constraint"],
)
def test_where_core_reads_oft_otherwise(host_nodes, tiny, written, options, as_core):
    """It leaves `rescale` out, and takes as the largest norm of the skew matrices what LyCORIS multiplies by the layer's width."""
    name, layers = written(_module("diag_oft.DiagOFTModule"), lora_dim=8, **options)
    for loader in LOADERS:
        found = applied(host_nodes, tiny, name, loader)
        assert all(layer.error(found[key]) > 1e-2 for key, layer in layers.items())
    for layer in layers.values():
        as_core(layer.module)
    assert all(layer.error(found[key]) <= 2e-5 for key, layer in layers.items())


def test_core_cannot_multiply_lokr_with_a_tucker_core(host_nodes, tiny, written, caplog):
    """It logs an error (torch's kron wants another layout) and leaves the convolution as it was; the linear layer is right."""
    name, layers = written(_module("lokr.LokrModule"), factor=4, use_tucker=True)
    linear, convolution = TARGETS.values()
    for loader in LOADERS:
        caplog.clear()
        found = applied(host_nodes, tiny, name, loader)
        assert layers[linear].error(found[linear]) <= 2e-5
        failed = any(convolution in record.getMessage() for record in caplog.records if record.levelname == "ERROR")
        assert not found[convolution].any() if failed else layers[convolution].error(found[convolution]) <= 2e-5


def test_what_no_loader_of_the_host_knows_is_refused(host_nodes, tiny, written):
    """IA3: an error that names a key, and no model."""
    name, _ = written(_module("ia3.IA3Module"))
    with pytest.raises(ValueError, match=rf"{name}: none of its \d+ keys fits this model .*lora_unet_middle_block"):
        run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name)


@pytest.mark.parametrize("kind", KINDS)
def test_inspecting_and_saving_again(host_nodes, tiny, written, pack_module, kind):
    """Two layers are seen, low-rank ones with their energy; saved again the file does the same, whatever its kind."""
    module, options = kinds()[kind]
    name, layers = written(module, **options)
    adapter, _ = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)
    facts = pack_module("nodes.inspection").inspect(adapter)
    assert {fact.name for fact in facts} == set(TARGETS)
    if kind.startswith("LoCon"):
        energies = {TARGETS[fact.name]: fact.energy for fact in facts}
        assert energies == {key: pytest.approx(float(merge(layer).square().sum()), rel=1e-4) for key, layer in layers.items()}
    (again,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="lycoris_again", dtype="fp32", model=tiny.patcher)
    found = applied(host_nodes, tiny, again, "TriLoRALoader")
    (list_saved_adapters() / again).unlink()
    assert {key: layer.error(found[key]) <= 2e-5 for key, layer in layers.items()} == dict.fromkeys(layers, True)


def merge(layer: Trained) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return layer.module.get_diff_weight()[0].detach()


def _module(path: str):
    import importlib

    module, name = path.split(".")
    return getattr(importlib.import_module(f"lycoris.modules.{module}"), name)
