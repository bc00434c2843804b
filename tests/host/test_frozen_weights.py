"""The weight that a backward pass fetches is the one the host's own layer multiplied by, for every kind of base."""

import comfy.ops
import pytest
import torch
import torch.nn.functional as F

OUT, INP = 7, 12


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain():
    return comfy.ops.disable_weight_init.Linear(INP, OUT), torch.float32, None


def cast_from(dtype):
    layer = comfy.ops.manual_cast.Linear(INP, OUT, dtype=dtype)
    return layer, dtype, None


def scaled_fp8():
    """0.3.64's layers for `*_fp8_scaled` checkpoints: the forward pass multiplies by `scale_weight` itself."""
    layer = comfy.ops.scaled_fp8_ops(override_dtype=torch.float8_e4m3fn).Linear(INP, OUT)
    layer.reset_parameters()
    return layer, torch.float8_e4m3fn, 0.37


KINDS = {"fp32": plain, "fp16": lambda: cast_from(torch.float16), "bf16": lambda: cast_from(torch.bfloat16),
         "fp8": lambda: cast_from(torch.float8_e4m3fn)}
if hasattr(comfy.ops, "scaled_fp8_ops"):
    KINDS["scaled-fp8"] = scaled_fp8


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_gradient_is_that_of_the_effective_weight(pack_module, kind):
    """grad_x = grad_y * W with W as used, on a weight made in inference mode; and `ComfyHost.weight` reads the same W."""
    frozen, compat = pack_module("training.frozen"), pack_module("nodes.compat")
    products = pack_module("training.cpu_products").CpuProducts()
    with torch.inference_mode():
        layer, dtype, scale = KINDS[kind]()
        layer.weight = torch.nn.Parameter(draw(OUT, INP, seed=1).to(dtype), requires_grad=False)
        layer.bias = torch.nn.Parameter(draw(OUT, seed=2), requires_grad=False)
        effective = layer.weight.float().clone()
        if scale is not None:
            layer.scale_weight = torch.nn.Parameter(torch.tensor(scale), requires_grad=False)
            effective *= scale
    effective, bias = effective.clone(), layer.bias.float().clone()
    x, probe = draw(3, INP, seed=3).requires_grad_(), draw(3, OUT, seed=4)
    y = frozen.frozen_forward(layer, layer.forward, compat.frozen_weight, products)(x)
    torch.testing.assert_close(y, F.linear(x, effective, bias), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad((y * probe).sum(), x)
    torch.testing.assert_close(grad, probe @ effective, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), compat.frozen_weight(layer, torch.empty(0)) as weight:
        torch.testing.assert_close(weight, effective, rtol=1e-6, atol=0)
