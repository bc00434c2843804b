"""Recomputed blocks give the gradients of kept activations, in-place blocks included, and keep little."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from comfyui_trilora.training.checkpointing import checkpointed
from comfyui_trilora.training.inject import injected, needs_clones
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig
from comfyui_trilora.trilora_ops.residuals.trilora import TriLoraConfig
from torch import nn

from .toy_host import ToyHost, adapters_on, make_samples

TRILORA = TriLoraConfig(rank=2)
STYLES = {"out-of-place": {}, "in-place": {"in_place": True, "norm": False}, "overwriting": {"in_place": True}}


def loss_of(host):
    """A scalar that depends on the whole output of the model, for two fixed samples."""
    samples = make_samples(2)
    x, text = (torch.cat(parts).to(host.dtype) for parts in zip(*((s.x0, s.conditions) for s in samples), strict=True))
    out = host.model(x, torch.tensor([0.7, 2.0], dtype=host.dtype), text)
    return (out * torch.linspace(-1, 1, out.numel(), dtype=host.dtype).view(out.shape)).sum()


def gradients(host, adapters, checkpointing=False, clone_saved=False):
    """(loss, parameter name -> gradient)."""
    parameters = {f"{key}:{name}": p for key, a in adapters.items() for name, p in a.named_parameters()}
    with injected(host, adapters, checkpointing, clone_saved):
        loss = loss_of(host)
        found = torch.autograd.grad(loss, list(parameters.values()))
    return loss.item(), dict(zip(parameters, found, strict=True))


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6) and found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.any(), name
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("target", ["linear", "everything"], ids=["blocks-only", "whole-model"])
@pytest.mark.parametrize("style", STYLES)
def test_checkpointed_gradients(style, target):
    """Equal to those of the same model written out of place, without checkpointing; the first trained block included.

    With "blocks-only" the input of the first block needs no gradient, with "whole-model" it does.
    """
    reference = ToyHost(norm=STYLES[style].get("norm", True))
    host = ToyHost(**STYLES[style])
    expected = gradients(reference, adapters_on(reference, TRILORA, target))
    assert any("blocks.0" in name for name in expected[1])
    assert_same(gradients(host, adapters_on(host, TRILORA, target), checkpointing=True, clone_saved=style == "overwriting"), expected)


@pytest.mark.parametrize("target", ["linear", "everything"], ids=["blocks-only", "whole-model"])
@pytest.mark.parametrize("style", STYLES)
def test_cloned_gradients(style, target):
    """Copies of saved activations give the same gradients whether a model needs them or not."""
    reference = ToyHost(norm=STYLES[style].get("norm", True))
    host = ToyHost(**STYLES[style])
    assert_same(gradients(host, adapters_on(host, TRILORA, target), clone_saved=True), gradients(reference, adapters_on(reference, TRILORA, target)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_overwriting_is_noticed(checkpointing):
    """Without copies such a model stops with the error that the loop looks for, never with wrong gradients."""
    host = ToyHost(in_place=True)
    with pytest.raises(RuntimeError) as error:
        gradients(host, adapters_on(host, TRILORA, "linear"), checkpointing)
    assert needs_clones(error.value)
    assert not needs_clones(RuntimeError("CUDA out of memory"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_gradients_against_finite_differences(style, checkpointing):
    """In fp64, every parameter of every adapter of the model: (loss(p + h) - loss(p - h)) / 2h."""
    host = ToyHost(dtype=torch.float64, **STYLES[style])
    adapters = adapters_on(host, LoraConfig(rank=1), "attention")
    _, found = gradients(host, adapters, checkpointing, clone_saved=style != "out-of-place")
    h, count = 1e-5, 0
    with torch.no_grad(), injected(host, adapters):
        for key, adapter in adapters.items():
            for name, parameter in adapter.named_parameters():
                flat = parameter.view(-1)
                for i in range(0, len(flat), 2):
                    start, ends = flat[i].item(), []
                    for step in (h, -h):
                        flat[i] = start + step
                        ends.append(loss_of(host).item())
                    flat[i] = start
                    count += 1
                    gradient = found[f"{key}:{name}"].view(-1)[i].item()
                    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(gradient, rel=1e-5, abs=1e-7)
    assert count > 40


def saved_inside_blocks(checkpointing) -> int:
    """How many tensors autograd keeps from the first block's input to the last block's output."""
    host, saved, counts = ToyHost(), [], []
    host.model.blocks[0].register_forward_pre_hook(lambda *args: counts.append(len(saved)))
    host.model.conv_out.register_forward_pre_hook(lambda *args: counts.append(len(saved)))
    with injected(host, adapters_on(host, TRILORA, "linear"), checkpointing):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss_of(host)
    return counts[1] - counts[0]


def test_checkpointing_keeps_no_activations_of_blocks():
    assert saved_inside_blocks(checkpointing=True) == 0
    assert saved_inside_blocks(checkpointing=False) > 20


def test_one_copy_of_the_input_is_kept():
    """The copy is what the backward pass starts from; the original is free as soon as nobody else holds it."""
    linear = nn.Linear(4, 4)
    block = checkpointed(lambda x, scale: linear(x) * scale, list(linear.parameters()), nullcontext)
    x = torch.randn(3, 4) * 1.0
    gone = weakref.ref(x)
    y = block(x, 2.0)
    del x
    gc.collect()
    assert gone() is None
    y.sum().backward()
    assert linear.weight.grad.any()


@pytest.mark.parametrize("outputs", ["tensor", "tuple", "list", "none-first"])
def test_arguments_and_results_of_every_form(outputs):
    """Tensors in nested arguments and keywords are followed; integers, None and flags pass; results keep their form."""
    linear = nn.Linear(4, 4)

    def forward(pair, index, *, extra, flag):
        assert flag is True and index.dtype == torch.int64
        y = linear(pair[0][index]) * pair[1]["scale"] + extra
        return {"tensor": y, "tuple": (y, pair[0]), "list": [y, pair[0]], "none-first": (None, y)}[outputs]

    def run(call):
        torch.manual_seed(0)
        a, scale, extra = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True), torch.randn(4)
        result = call((a, {"scale": scale}), torch.tensor([2, 0]), extra=extra, flag=True)
        parts = [result] if outputs == "tensor" else [r for r in result if r is not None]
        loss = sum((r * (i + 1)).square().sum() for i, r in enumerate(parts))
        return result, torch.autograd.grad(loss, [a, scale, *linear.parameters()])

    plain, recomputed = run(forward), run(checkpointed(forward, list(linear.parameters()), nullcontext))
    assert isinstance(recomputed[0], torch.Tensor if outputs == "tensor" else tuple)
    assert [r is None for r in recomputed[0]] == [r is None for r in plain[0]]
    for found, expected in zip(recomputed[1], plain[1], strict=True):
        torch.testing.assert_close(found, expected)


def test_a_block_that_hands_on_its_own_input():
    """What a block writes in place reaches neither the caller's tensor nor the recomputation."""
    linear = nn.Linear(4, 4)

    def forward(x):
        x += linear(x * 1.0)
        return x

    x = torch.randn(3, 4)
    y = checkpointed(forward, list(linear.parameters()), nullcontext)(x)
    expected = x + linear(x)
    assert y is not x and not torch.equal(y, x)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), list(linear.parameters()))
    for one, other in zip(found, torch.autograd.grad(expected.square().sum(), list(linear.parameters())), strict=True):
        torch.testing.assert_close(one, other)


def test_blocks_without_anything_to_learn_are_left_alone():
    calls = []
    block = checkpointed(lambda x: calls.append(x) or x * 2, [], nullcontext)
    x = torch.ones(2)
    assert block(x).grad_fn is None and calls == [x]
    parameter = nn.Parameter(torch.ones(2))
    with torch.no_grad():
        assert checkpointed(lambda x: calls.append(x) or x * parameter, [parameter], nullcontext)(x).grad_fn is None
    assert calls[1] is x
