"""A frozen layer's products on a CPU: the layer's own results in every way of computing them, in fp32 and bf16."""

import pytest
import torch
from comfyui_trilora.training import cpu_products
from comfyui_trilora.training.cpu_products import CpuProducts
from torch import nn

# name -> (layer, input shape), on both sides of every choice that `cpu_products` makes
LAYERS = {
    "linear": (lambda: nn.Linear(5, 8), (2, 3, 5)),
    "linear-no-bias": (lambda: nn.Linear(9, 4, bias=False), (7, 9)),
    "linear-many-rows": (lambda: nn.Linear(5, 8), (3, 100, 5)),
    "linear-many-rows-back": (lambda: nn.Linear(7, 6, bias=False), (3, 200, 7)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, padding=1), (1, 3, 6, 7)),
    "conv-batch": (lambda: nn.Conv2d(3, 5, 3, padding=1, bias=False), (3, 3, 4, 5)),
    "conv-1x1": (lambda: nn.Conv2d(6, 7, 1), (2, 6, 4, 5)),
    "conv-stride": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 9, 8)),
    "conv-all": (lambda: nn.Conv2d(4, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 3)), (2, 4, 7, 9)),
    "conv-rest-of-stride": (lambda: nn.Conv2d(3, 5, 2, stride=3), (2, 3, 7, 9)),
    "conv-many-positions": (lambda: nn.Conv2d(3, 5, 3, padding=1), (2, 3, 12, 13)),
    "conv-many-positions-stride": (lambda: nn.Conv2d(3, 5, 3, stride=2, dilation=2), (2, 3, 30, 31)),
}


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(name, stored=torch.float32):
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    return make().requires_grad_(False).to(stored), shape


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32-weights", "bf16-weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_input_gradient_are_the_layers_own(name, dtype, stored, pieces, monkeypatch):
    """Against fp64 on the same rounded inputs, within the rounding of the dtype; pieces: as a layer that is cast in parts."""
    layer, shape = layer_of(name, stored)
    if pieces:
        monkeypatch.setattr(cpu_products, "_PIECE", 2 * layer.weight[0].numel() + 1)
    products, x = CpuProducts(), draw(*shape, seed=2).to(dtype)
    assert products.take(layer, x)
    exact = layer_of(name, stored)[0].to(dtype).double()
    wanted_x = x.double().requires_grad_()
    wanted = exact(wanted_x)
    probe = draw(*wanted.shape, seed=3).to(dtype)
    (wanted_grad,) = torch.autograd.grad(wanted, wanted_x, probe.double())
    found = products.output(layer, x, layer.weight)
    found_grad = products.input_gradient(layer, probe, layer.weight, x.shape)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for one, other in ((found, wanted), (found_grad, wanted_grad)):
        assert one.dtype == dtype and one.shape == other.shape and one.is_contiguous()
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("name", ["linear", "conv", "conv-many-positions"])
def test_the_cast_weight_of_one_layer_is_not_the_next_ones(name):
    """One piece of memory serves all layers: results made with it stay as they are, and the stored weight does too."""
    layer, shape = layer_of(name)
    other = layer_of(name)[0]
    with torch.no_grad():
        other.weight.mul_(-2.0)
    kept, products, x = layer.weight.clone(), CpuProducts(), draw(*shape, seed=2).bfloat16()
    first = products.output(layer, x, layer.weight)
    before = first.clone()
    second = products.output(other, x, other.weight)
    assert torch.equal(first, before) and not torch.equal(first, second) and torch.equal(layer.weight, kept)
    assert torch.equal(products.output(layer, x, layer.weight), before)


@pytest.mark.parametrize(
    ("layer", "x", "why"),
    [(nn.Conv2d(4, 4, 3, groups=2), torch.zeros(1, 4, 5, 5), "groups"), (nn.Conv1d(2, 3, 1), torch.zeros(1, 2, 5), "one axis"),
     (nn.Conv3d(2, 3, 1), torch.zeros(1, 2, 3, 3, 3), "three axes"), (nn.Linear(3, 4).half(), torch.zeros(2, 3), "fp16 weights"),
     (nn.Linear(3, 4), torch.zeros(2, 3).half(), "fp16 input"), (nn.Linear(3, 4), torch.zeros(2, 3, device="meta"), "device")],
)  # fmt: skip
def test_other_layers_are_left_to_themselves(layer, x, why):
    assert not CpuProducts.take(layer, x), why


def test_a_layer_whose_bias_is_patched_on_its_way_is_left_to_itself():
    layer = nn.Linear(3, 4)
    layer.bias_function = [lambda bias: bias + 1]
    assert not CpuProducts.take(layer, torch.zeros(2, 3))
