"""The table of kinds against the programs that write the files: the change of a weight, on layers whose sizes are all different.

LyCORIS' measure is what a layer computes under its module, PEFT's what it merges. Everything moves away from its start.
"""

import importlib

import pytest
import torch
from comfyui_trilora.trilora_ops.errors import TriLoRAError, bounded
from comfyui_trilora.trilora_ops.files import kinds
from comfyui_trilora.trilora_ops.files.layer import LIMIT
from torch import nn

LAYERS = {
    "wide": lambda: nn.Linear(18, 16, bias=False), "tall": lambda: nn.Linear(10, 24, bias=False),
    "convolution": lambda: nn.Conv2d(6, 16, (3, 2), stride=2, padding=1, bias=False), "1 x 1": lambda: nn.Conv2d(10, 8, 1, bias=False),
    "groups": lambda: nn.Conv2d(12, 8, 3, groups=2, bias=False), "1-D": lambda: nn.Conv1d(6, 16, 3, bias=False),
    "3-D": lambda: nn.Conv3d(4, 8, (1, 2, 3), bias=False),
}  # fmt: skip
LYCORIS = {
    "LoCon": ("locon.LoConModule", {}), "LoCon, rs_lora": ("locon.LoConModule", {"rs_lora": True}), "Tucker": ("locon.LoConModule", {"use_tucker": True}),
    "DoRA": ("locon.LoConModule", {"weight_decompose": True}), "DoRA, inputs": ("locon.LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "DoRA, Tucker": ("locon.LoConModule", {"weight_decompose": True, "use_tucker": True}),
    "LoHa": ("loha.LohaModule", {}), "LoHa, Tucker": ("loha.LohaModule", {"use_tucker": True}), "LoHa, DoRA": ("loha.LohaModule", {"weight_decompose": True}),
    "LoHa, DoRA, inputs": ("loha.LohaModule", {"weight_decompose": True, "wd_on_out": False}),
    "LoKr": ("lokr.LokrModule", {"lora_dim": 2}), "LoKr, whole": ("lokr.LokrModule", {"full_matrix": True}), "LoKr, Tucker": ("lokr.LokrModule", {"use_tucker": True, "lora_dim": 1}),
    "LoKr, both": ("lokr.LokrModule", {"decompose_both": True, "lora_dim": 1}), "LoKr, DoRA": ("lokr.LokrModule", {"weight_decompose": True, "lora_dim": 2}),
    "LoKr, DoRA, inputs": ("lokr.LokrModule", {"weight_decompose": True, "wd_on_out": False, "lora_dim": 2}),
    "LoKr, unbalanced": ("lokr.LokrModule", {"unbalanced_factorization": True, "lora_dim": 1}),
    "GLoRA": ("glora.GLoRAModule", {}), "full": ("full.FullModule", {}), "IA3": ("ia3.IA3Module", {}), "IA3, inputs": ("ia3.IA3Module", {"train_on_input": True}),
    "OFT": ("diag_oft.DiagOFTModule", {}), "OFT, rescaled": ("diag_oft.DiagOFTModule", {"rescaled": True}), "OFT, bound": ("diag_oft.DiagOFTModule", {"constraint": 0.01}),
    "BOFT": ("boft.ButterflyOFTModule", {}), "BOFT, rescaled, bound": ("boft.ButterflyOFTModule", {"rescaled": True, "constraint": 0.01}),
}  # fmt: skip
# LyCORIS itself fails there: GLoRA and IA3 take a grouped convolution for a whole one, and BOFT wants other numbers of rows
IMPOSSIBLE = {("GLoRA", "groups"), ("IA3, inputs", "groups"), ("BOFT", "tall"), ("BOFT, rescaled, bound", "tall")}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def distance(a, b) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def compute(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What the layer computes with another weight."""
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


def read(name: str, tensors: dict, shape) -> object:
    """The layer of a file's tensors for a weight of this shape, checked."""
    grouped, others = kinds.by_layer(tensors)
    assert list(grouped) == [name] and not others
    found = kinds.read_layer(name, grouped[name])
    assert found.unread == () and found.weight is not None
    found.weight.check_finite()
    found.weight.check(shape)
    return found.weight


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris(kind, layer):
    pytest.importorskip("lycoris")
    if (kind, layer) in IMPOSSIBLE:
        pytest.skip("LyCORIS cannot do it")
    torch.manual_seed(3)
    plain, adapted = LAYERS[layer](), LAYERS[layer]()
    adapted.load_state_dict(plain.state_dict())
    path, options = LYCORIS[kind]
    module, name = path.split(".")
    module = getattr(importlib.import_module(f"lycoris.modules.{module}"), name)("x", adapted, 1.0, **{"lora_dim": 4, "alpha": 2.0, **options})
    module.apply_to()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter += 0.2 * draw(*parameter.shape, seed=number)
        x = draw(40, plain.weight.shape[1]) if plain.weight.ndim == 2 else draw(2, plain.in_channels, *[7] * (plain.weight.ndim - 2))
        wanted = adapted(x).double() - plain(x).double()
        found = read("x", {f"x.{key}": value.detach() for key, value in module.state_dict().items()}, plain.weight.shape)
        delta = found.delta(plain.weight)
        assert delta.shape == plain.weight.shape and float(wanted.norm()) > 0.01 * float(plain(x).norm())
        added = compute(plain, delta, x)
        assert distance(added, wanted) <= 1e-5


def peft_cases():
    """Name -> (configuration's class, its options)."""
    return {
        "LoRA": ("LoraConfig", {"lora_alpha": 8}), "DoRA": ("LoraConfig", {"lora_alpha": 8, "use_dora": True}),
        "LoHa": ("LoHaConfig", {"alpha": 8}), "LoHa, effective": ("LoHaConfig", {"alpha": 8, "use_effective_conv2d": True}),
        "LoKr": ("LoKrConfig", {"alpha": 8, "r": 2}), "LoKr, effective": ("LoKrConfig", {"alpha": 8, "r": 1, "use_effective_conv2d": True}),
        "LoKr, both": ("LoKrConfig", {"alpha": 8, "r": 1, "decompose_both": True}),
    }  # fmt: skip


@pytest.mark.parametrize("layer", ["wide", "tall", "convolution", "1 x 1"])
@pytest.mark.parametrize("kind", peft_cases())
def test_peft(kind, layer):
    """PEFT's own merge; the alpha, which it keeps in its configuration, stands in the file."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    net = nn.Sequential(LAYERS[layer]())
    before = net[0].weight.detach().clone()
    config, options = peft_cases()[kind]
    model = peft.get_peft_model(net, getattr(peft, config)(**{"r": 4, "target_modules": ["0"], **options}))
    with torch.no_grad():
        for number, (_, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.2 * draw(*parameter.shape, seed=number)
    tensors = {key.replace("base_model.model.0", "x"): value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}
    wanted = model.merge_and_unload()[0].weight.detach() - before
    found = read("x", tensors | {"x.alpha": torch.tensor(8.0)}, before.shape)
    unread = 1.0 if found.READS_ALPHA else 8 / options.get("r", 4)  # of two whole factors no other program reads an alpha
    assert distance(unread * found.delta(before), wanted) <= 1e-5


@pytest.mark.parametrize("shape", [(12,), (12, 1), (1, 12, 1, 1)], ids=str)
@pytest.mark.parametrize("ending", [".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"])
def test_magnitudes_of_the_outputs_in_every_spelling(shape, ending):
    """1-D ones too, under any name; PEFT's of convolutions have an axis in front."""
    if ending == ".dora_scale" and len(shape) == 4:
        pytest.skip("that is LyCORIS' spelling of the inputs")
    pair, m, weight = {"x.lora_B.weight": draw(12, 2), "x.lora_A.weight": draw(2, 18)}, 1 + draw(12).abs(), draw(12, 18, seed=5)
    changed = weight + pair["x.lora_B.weight"] @ pair["x.lora_A.weight"]
    wanted = changed * m[:, None] / changed.norm(dim=1, keepdim=True) - weight
    assert distance(read("x", pair | {f"x{ending}": m.reshape(shape)}, weight.shape).delta(weight), wanted) <= 1e-6


def test_rows_of_zeros_have_no_direction():
    """W + A = 0 in a row: it stays 0, whatever its magnitude."""
    tensors = {"x.lora_B.weight": torch.zeros(3, 1), "x.lora_A.weight": torch.zeros(1, 4), "x.dora_scale": torch.ones(3, 1)}
    assert torch.equal(read("x", tensors, (3, 4)).delta(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize(("tensors", "unread", "methods"), [
    ({".oft_R.weight": draw(3, 6)}, (".oft_R.weight",), {".oft_R.weight": "PEFT's OFT without its adapter_config.json"}), ({".alpha": torch.tensor(1.0)}, (".alpha",), {}),
    ({".b_norm": draw(3)}, (".b_norm",), {}), ({".dora_scale": draw(3, 1)}, (".dora_scale",), {}),
])  # fmt: skip
def test_what_makes_no_layer(tensors, unread, methods):
    found = kinds.read_layer("x", tensors)
    assert found.weight is None and found.bias is None and found.unread == unread and found.unsupported == methods


def test_weight_and_bias_are_two_layers():
    found = kinds.read_layer("x", {".w_norm": draw(5), ".b_norm": draw(5, seed=1)})
    assert found.weight.kind == "full difference" and found.bias.kind == "bias" and found.unread == ()
    found.bias.check((5,))
    with pytest.raises(TriLoRAError, match=r"is \(5,\), expected \(4,\)"):
        found.bias.check((4,))


@pytest.mark.parametrize("tensors", [{".w_norm": draw(5), ".diff": draw(5)}, {".diff_b": draw(5), ".b_norm": draw(5), ".w_norm": draw(5)},
                                     {".lokr_w1": draw(2, 2), ".lokr_w1_a": draw(2, 1), ".lokr_w1_b": draw(1, 2), ".lokr_w2": draw(2, 2)},
                                     {".lora_up.weight": draw(3, 2), ".lora_down.weight": draw(2, 3), ".hada_w1_a": draw(3, 2)},
                                     {".lora_up.weight": draw(3, 2), ".lora_down.weight": draw(2, 3), ".dora_scale": draw(3, 1), ".lora_magnitude_vector": draw(3)}])  # fmt: skip
def test_two_of_a_thing_are_refused(tensors):
    with pytest.raises(TriLoRAError, match="two layers for one place|in the file twice"):
        kinds.read_layer("x", tensors)


@pytest.mark.parametrize("size", [0.9, 1.1])
@pytest.mark.parametrize("kind", ["low rank", "LoKr", "difference", "magnitudes"])
def test_the_bound_is_where_half_precision_ends(kind, size):
    """Just below it is accepted, whatever the rough bound says, and just above refused."""
    one = {"low rank": {".lora_up.weight": torch.eye(4), ".lora_down.weight": torch.eye(4)}, "LoKr": {".lokr_w1": torch.eye(2), ".lokr_w2": torch.eye(2)},
           "difference": {".diff": torch.eye(4)}, "magnitudes": {".lora_up.weight": torch.eye(4), ".lora_down.weight": torch.eye(4), ".dora_scale": torch.ones(4, 1)}}[kind]  # fmt: skip
    last = list(one)[-1]
    layer = kinds.read_layer("x", one | {last: one[last] * LIMIT * size}).weight
    if size < 1:
        layer.check_finite()
        return
    with pytest.raises(TriLoRAError, match="beyond 65504"):
        layer.check_finite()


def test_an_endless_text_is_cut():
    """Words without end lose their middle, and a whole text the part between its beginning and its remedy."""
    error = TriLoRAError(f"{'k' * 100_000}.lora_up.weight is missing; copy or download it again")
    assert len(str(error)) < 250 and str(error).startswith("kkkk") and str(error).endswith(".lora_up.weight is missing; copy or download it again")
    assert len(bounded("word " * 1000 + "the remedy")) <= 1000 and bounded("word " * 1000 + "the remedy").endswith("the remedy")
    assert bounded("a short text") == "a short text"


def test_flat_factors_of_a_convolution_need_not_divide_its_channels():
    """ComfyUI's own trainer on 0.3.64 factors (out, in * kernel): the change is the flat Kronecker product in the weight's shape."""
    w1, w2, weight = draw(4, 9), draw(2, 6, seed=1), draw(8, 6, 3, 3)
    layer = read("a", {"a.lokr_w1": w1, "a.lokr_w2": w2}, weight.shape)
    torch.testing.assert_close(layer.delta(weight), torch.kron(w1, w2).reshape(weight.shape))
