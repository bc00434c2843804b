"""Adding low-rank parts onto a weight in place, in every memory layout that a weight or a slice of one can have."""

import itertools

import pytest
import torch
from comfyui_trilora.trilora_ops.factors import LowRank, canonicalise, keep_rank
from comfyui_trilora.trilora_ops.merge import add_low_rank_

SHAPES = {"linear": (10, 14), "conv-1x1": (10, 14, 1, 1), "conv-3x2": (10, 14, 3, 2), "conv1d": (10, 14, 3), "conv3d": (10, 14, 1, 2, 3)}
# layout -> (base weight -> the view that is written); channels-last only where there are two or three kernel axes
LAYOUTS = {
    "whole": lambda w: w,
    "rows": lambda w: w.narrow(0, 3, 5),
    "columns": lambda w: w.narrow(1, 4, 7),
    "rows-and-columns": lambda w: w.narrow(0, 3, 5).narrow(1, 4, 7),
    "one-row": lambda w: w.narrow(0, 9, 1),
    "one-column": lambda w: w.narrow(1, 0, 1),
}
MEMORY = {4: torch.channels_last, 5: torch.channels_last_3d}
CASES = [
    pytest.param(shape, layout, memory, id=f"{shape}-{layout}-{memory}")
    for shape, layout, memory in itertools.product(SHAPES, LAYOUTS, ("contiguous", "channels_last"))
    if memory == "contiguous" or len(SHAPES[shape]) in MEMORY
]


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def base_weight(shape, memory, dtype=torch.float32):
    weight = draw(SHAPES[shape], 1).to(dtype)
    return weight.contiguous(memory_format=MEMORY[weight.ndim]) if memory == "channels_last" else weight


def parts_for(view, count):
    columns = view[0].numel()
    return [(LowRank(draw((view.shape[0], 2 + i), 2 + i), draw((2 + i, columns), 12 + i), 0.5 + i), 0.8 - 0.7 * i) for i in range(count)]


def merged(view, parts):
    """W + sum of strength * R, in fp64 on flattened axes."""
    total = sum(strength * pair.scale * (pair.up.double() @ pair.down.double()) for pair, strength in parts)
    return view.double() + total.view(view.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("shape", "layout", "memory"), CASES)
def test_add_low_rank(shape, layout, memory, count, dtype):
    """The view gets its parts in its own memory; nothing else of the base changes."""
    base = base_weight(shape, memory, dtype)
    before, place, strides = base.clone(), base.data_ptr(), base.stride()
    view = LAYOUTS[layout](base)
    parts = parts_for(view, count)
    expected = merged(view, parts)
    result = add_low_rank_(view, parts)
    assert result is view and base.data_ptr() == place and base.stride() == strides
    error = (view.double() - expected).abs().max() / expected.abs().max()
    assert error <= (1e-6 if dtype == torch.float32 else 0.02)
    assert (view != LAYOUTS[layout](before)).float().mean() > 0.9
    LAYOUTS[layout](base).copy_(LAYOUTS[layout](before))
    assert torch.equal(base, before)


def test_there_are_cases():
    assert len(CASES) == len(LAYOUTS) * (len(SHAPES) + 3)


def test_the_order_of_parts_does_not_matter():
    weight = base_weight("linear", "contiguous")
    parts = parts_for(weight, 4)
    one, other = (add_low_rank_(weight.clone(), order) for order in (parts, parts[::-1]))
    torch.testing.assert_close(one, other)


def test_factors_that_are_slices_and_transposes():
    """Truncated, half-precision and transposed factors merge like their plain copies."""
    weight = base_weight("conv-3x2", "channels_last")
    pair = keep_rank(canonicalise(parts_for(weight, 3)[2][0]), 2)
    strided = LowRank(pair.up.t().contiguous().t(), pair.down.t().contiguous().t(), pair.scale)
    expected = merged(weight, [(pair, 0.5)])
    for form in (pair, strided):
        torch.testing.assert_close(add_low_rank_(weight.clone(memory_format=torch.preserve_format), [(form, 0.5)]).double(), expected, rtol=0, atol=1e-5)
    half = LowRank(pair.up.half(), pair.down.half(), pair.scale)
    torch.testing.assert_close(add_low_rank_(weight.clone(), [(half, 0.5)]).double(), merged(weight, [(half, 0.5)]), rtol=0, atol=1e-5)


def test_inference_weights():
    """The host's loaders make weights in inference mode; they are merged there."""
    with torch.inference_mode():
        weight = draw((6, 9), 1)
        parts = parts_for(weight, 2)
        expected = merged(weight, parts)
        add_low_rank_(weight, parts)
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(10, 60), (60, 10)], ids=str)
def test_scales_far_apart_in_half_precision(shape):
    """Scales go into the smaller factor relative to the largest: neither 1e6 nor 1e-6 times a factor leaves fp16's range."""
    weight = draw(shape, 1)
    pairs = [LowRank(draw((shape[0], 3), i).half(), draw((3, shape[1]), i + 5).half(), scale) for i, scale in enumerate((2.0**17, 2.0**15, 2.0**10))]
    parts = [(pair, 1e-6) for pair in pairs]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
        expected = merged(weight.to(dtype), parts)
        found = add_low_rank_(weight.to(dtype).clone(), parts)
        assert (found.double() - expected).abs().max() / expected.abs().max() <= tolerance


def test_factors_of_several_dtypes_and_equal_scales():
    """Files come in fp16, bf16, fp32 and fp8; equal scales need no factor of their own."""
    weight = draw((10, 14), 1)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn)
    pairs = [LowRank(draw((10, 2), i).to(dtype), draw((2, 14), i + 9).to(dtype), 0.5) for i, dtype in enumerate(dtypes)]
    for strengths in ((1.0,) * 4, (1.0, 0.5, -1.0, 0.0)):
        parts = list(zip(pairs, strengths, strict=True))
        torch.testing.assert_close(add_low_rank_(weight.clone(), parts).double(), merged(weight, parts), rtol=0, atol=1e-5)
