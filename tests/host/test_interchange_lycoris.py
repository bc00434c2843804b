"""LyCORIS' modules on the host's weights: what a layer computes with one, and with the weight that the host makes of its file.

The layer's output under LyCORIS is the measure; its `get_merged_weight` multiplies LoHa's and LoKr's scale in twice. Where
the host's core differs from LyCORIS, the test says so with core's formula: ours is LyCORIS'.
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


# name -> (module class, options), where ours alone does as LyCORIS does
OURS = {
    "DoRA": ("locon.LoConModule", {"weight_decompose": True}),
    "DoRA with a Tucker core": ("locon.LoConModule", {"weight_decompose": True, "use_tucker": True}),
    "LoHa with DoRA": ("loha.LohaModule", {"weight_decompose": True}), "LoHa, Tucker, with DoRA": ("loha.LohaModule", {"weight_decompose": True, "use_tucker": True}),
    "LoHa with DoRA on the input": ("loha.LohaModule", {"weight_decompose": True, "wd_on_out": False}),
    "LoKr with DoRA": ("lokr.LokrModule", {"weight_decompose": True, "factor": 8}),
    "LoKr with DoRA on the input": ("lokr.LokrModule", {"weight_decompose": True, "wd_on_out": False, "factor": 8}),
    "LoKr, Tucker": ("lokr.LokrModule", {"factor": 4, "use_tucker": True}),
    "LoKr, Tucker, both halves": ("lokr.LokrModule", {"factor": 16, "use_tucker": True, "decompose_both": True, "lora_dim": 3}),
    "LoKr, Tucker, with DoRA": ("lokr.LokrModule", {"factor": 4, "use_tucker": True, "weight_decompose": True}),
    "OFT": ("diag_oft.DiagOFTModule", {"lora_dim": 8}), "OFT, rescaled": ("diag_oft.DiagOFTModule", {"lora_dim": 8, "rescaled": True}),
    "OFT, constraint": ("diag_oft.DiagOFTModule", {"lora_dim": 8, "constraint": 0.01}),
    "BOFT": ("boft.ButterflyOFTModule", {"lora_dim": 8}), "BOFT, rescaled": ("boft.ButterflyOFTModule", {"lora_dim": 8, "rescaled": True}),
    "BOFT, constraint": ("boft.ButterflyOFTModule", {"lora_dim": 8, "constraint": 0.01}),
    "IA3": ("ia3.IA3Module", {}), "IA3 on the input": ("ia3.IA3Module", {"train_on_input": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", OURS)
def test_what_core_reads_otherwise_or_not_at_all_is_lycoris_own(host_nodes, tiny, written, kind, caplog):
    """And saved again by Save Adapter, and at half the strength on the line through W and that."""
    module, options = OURS[kind]
    name, layers = written(_module(module), **options)
    for loader in LOADERS[:2]:
        found = applied(host_nodes, tiny, name, loader)
        assert found.keys() == layers.keys() and all(layer.error(found[key]) <= 2e-5 for key, layer in layers.items())
        half = applied(host_nodes, tiny, name, loader, 0.5)
        assert all(distance(half[key], 0.5 * found[key]) <= 1e-5 for key in layers)
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    adapter, _ = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)
    (again,) = run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="lycoris_again", dtype="fp32", model=tiny.patcher)
    found = applied(host_nodes, tiny, again, "TriLoRALoader")
    (list_saved_adapters() / again).unlink()
    assert all(layer.error(found[key]) <= 2e-5 for key, layer in layers.items())


def test_core_divides_by_the_norms_of_w_alone(host_nodes, tiny, written):
    """DoRA on the output axis: m / ||W + delta|| (W + delta) in its paper, PEFT, diffusers and LyCORIS, as in ours; / ||W|| in core."""
    name, layers = written(_module("locon.LoConModule"), weight_decompose=True)
    found = applied(host_nodes, tiny, name, "LoraLoaderModelOnly")
    for key, layer in layers.items():
        with torch.inference_mode(False), torch.no_grad():
            changed, weight = layer.weight + layer.module.get_diff_weight()[0], layer.weight
            norms = weight.flatten(1).norm(dim=1).view(-1, *(1 for _ in weight.shape[1:]))
            assert distance(found[key], changed * (layer.module.dora_scale.detach() / norms) - weight) <= 2e-5
        assert layer.error(found[key]) > 1e-3


@pytest.mark.parametrize(
    ("options", "as_core"),
    [({"rescaled": True}, lambda module: module.rescale.data.fill_(1.0)), ({"constraint": 0.5}, lambda module: setattr(module, "constraint", 0.5))],
    ids=["rescaled", "constraint"],
)
def test_where_core_reads_oft_otherwise(host_nodes, tiny, written, options, as_core):
    """It leaves `rescale` out, and takes as the largest norm of the skew matrices what LyCORIS multiplies by the layer's width."""
    name, layers = written(_module("diag_oft.DiagOFTModule"), lora_dim=8, **options)
    found = applied(host_nodes, tiny, name, "LoraLoaderModelOnly")
    assert all(layer.error(found[key]) > 1e-2 for key, layer in layers.items())
    for layer in layers.values():
        as_core(layer.module)
    assert all(layer.error(found[key]) <= 2e-5 for key, layer in layers.items())


@pytest.mark.parametrize("kind", KINDS)
def test_inspecting_and_saving_again(host_nodes, tiny, written, pack_module, kind):
    """Two layers are seen, low-rank ones with their energy; saved again the file does the same, whatever its kind."""
    module, options = kinds()[kind]
    name, layers = written(module, **options)
    adapter, _ = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)
    facts = pack_module("trilora_ops.inspection").inspect(adapter)
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
