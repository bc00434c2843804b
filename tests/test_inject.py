"""Adapters on a frozen model for a while: frozen backward passes, what is differentiated, and leaving no trace."""

import pytest
import torch
from comfyui_trilora.training.cpu_products import CpuProducts
from comfyui_trilora.training.frozen import can_freeze, frozen_forward
from comfyui_trilora.training.inject import injected
from comfyui_trilora.training.plan import adaptable, build_adapters, parameter_count
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.registry import Method
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig
from torch import nn

from .toy_host import ToyHost, adapters_on, make_samples, overridden, parameters_of

LORA = LoraConfig(rank=2)
SIGMA = torch.tensor([0.7, 2.0])
# name -> (layer, input shape): non-square, strided, padded, dilated and grouped in every number of axes
FROZEN = {
    "linear": (lambda: nn.Linear(5, 8), (2, 3, 5)),
    "linear-no-bias": (lambda: nn.Linear(8, 5, bias=False), (4, 8)),
    "conv1d-stride": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 8)),
    "conv2d-1x1": (lambda: nn.Conv2d(3, 7, 1), (2, 3, 4, 5)),
    "conv2d-stride-padding": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 6, 7)),
    "conv2d-dilation": (lambda: nn.Conv2d(3, 5, (3, 2), padding=(2, 0), dilation=(2, 3)), (1, 3, 7, 8)),
    "conv2d-groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False), (2, 6, 5, 4)),
    "conv2d-no-padding": (lambda: nn.Conv2d(3, 5, 3, stride=3), (2, 3, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 5, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), (1, 2, 3, 5, 4)),
}


def batch():
    samples = make_samples(2)
    return torch.cat([s.x0 for s in samples]), SIGMA, torch.cat([s.conditions for s in samples])


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_backward_is_autograds(name):
    """dL/dx of a layer whose weights were made in inference mode, where autograd itself refuses; nothing is kept for it."""
    make, shape = FROZEN[name]
    with torch.inference_mode():
        torch.manual_seed(1)
        frozen = make().requires_grad_(False)
    plain = make().requires_grad_(False)
    plain.load_state_dict({k: v.clone() for k, v in frozen.state_dict().items()})
    x = torch.randn(shape).requires_grad_()
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        frozen(x).sum().backward()
    host = ToyHost()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen_forward(frozen, frozen.forward, host.frozen_weight, CpuProducts())(x * 1.0)
    torch.testing.assert_close(y, plain(x))
    assert can_freeze(frozen)
    assert [t.shape for t in kept if t.numel() > 1] in ([], [x.shape])  # of the multiplication alone
    probe = torch.randn(y.shape)
    (found,) = torch.autograd.grad(y, x, probe)
    (expected,) = torch.autograd.grad(plain(x), x, probe)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert host.fetched == [frozen]


@pytest.mark.parametrize(
    ("module", "frozen"),
    [(nn.Linear(2, 3), True), (nn.Conv1d(2, 3, 1), True), (nn.ConvTranspose2d(2, 3, 2), False), (nn.Conv2d(2, 3, 3, padding_mode="reflect", padding=1), False),
     (nn.Conv2d(2, 3, 3, padding="same"), False), (nn.LayerNorm(3), False)],
    ids=["linear", "conv", "transposed", "reflecting", "same", "norm"],
)  # fmt: skip
def test_which_layers_can_be_frozen(module, frozen):
    assert can_freeze(module) is frozen


def test_other_calls_reach_the_layer_itself():
    """With further arguments, and where the products are not ours, the layer's own forward runs."""
    layer = nn.Linear(3, 4).requires_grad_(False)
    seen = []

    def forward(x, *args, **kwargs):
        seen.append((args, kwargs))
        return layer(x)

    call = frozen_forward(layer, forward, ToyHost().frozen_weight, CpuProducts())
    call(torch.ones(2, 3, requires_grad=True), 1, scale=2)
    layer.double()
    call(torch.ones(2, 3, dtype=torch.float64))
    assert seen == [((1,), {"scale": 2}), ((), {})]


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_forward_that_is_not_the_layers_own_is_called(differentiated):
    """Another extension's, or an outer injection's: what it does beside multiplying is not lost."""
    layer = nn.Linear(3, 4).requires_grad_(False)
    own, x = layer.forward, torch.randn(2, 3).requires_grad_(differentiated)
    layer.forward = lambda x: 2 * own(x) + 1
    call = frozen_forward(layer, layer.forward, ToyHost().frozen_weight, CpuProducts())
    torch.testing.assert_close(call(x), 2 * own(x) + 1)


def test_the_gradient_through_a_replaced_forward_is_its_own():
    """As of a LoRA that another extension computes beside the weight; all of its tensors were made in inference mode."""
    with torch.inference_mode():
        layer, down, up = nn.Linear(5, 4).requires_grad_(False), torch.randn(2, 5), torch.randn(4, 2)
    own, x, probe = layer.forward, torch.randn(3, 5).requires_grad_(), torch.randn(3, 4)
    layer.forward = lambda x: own(x) + nn.functional.linear(nn.functional.linear(x, down), up)
    call = frozen_forward(layer, layer.forward, ToyHost().frozen_weight, CpuProducts())
    y = call(x)
    (found,) = torch.autograd.grad(y, x, probe)
    torch.testing.assert_close(found, probe @ (layer.weight + up @ down).clone())


class Opaque(torch.autograd.Function):
    """A kernel without a backward pass."""

    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.T


@pytest.mark.parametrize("kernel", [Opaque.apply, torch.no_grad()(lambda x, weight: x @ weight.T)])
def test_a_replaced_forward_without_a_backward_pass_has_that_of_the_weight(kernel):
    """As of layers that multiply in fp8."""
    layer = nn.Linear(5, 4, bias=False).requires_grad_(False)
    layer.forward = lambda x: kernel(x, layer.weight)
    x, probe = torch.randn(3, 5).requires_grad_(), torch.randn(3, 4)
    y = frozen_forward(layer, layer.forward, ToyHost().frozen_weight, CpuProducts())(x)
    torch.testing.assert_close(torch.autograd.grad(y, x, probe)[0], probe @ layer.weight)


def test_without_a_gradient_to_pass_on_there_is_no_graph():
    """The layers below the first trained block: the same numbers as above it, and nothing of them kept."""
    layer = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    call, x = frozen_forward(layer, layer.forward, ToyHost().frozen_weight, CpuProducts()), torch.randn(2, 3, 5, 6)
    y = call(x)
    assert y.grad_fn is None and torch.equal(y, call(x.clone().requires_grad_()).detach())
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("inference", [False, True], ids=["normal", "inference-weights"])
def test_the_model_computes_with_its_adapters(inference):
    """Injected = the model with every delta added to its weights; a fresh adapter changes nothing but rounding."""
    host = ToyHost(norm=False, inference=inference)
    inputs = batch()
    with torch.no_grad():
        base = host.model(*inputs)
        with injected(host, build_adapters(host, Method(LORA), "everything", 0)):
            torch.testing.assert_close(host.model(*inputs), base, rtol=1e-5, atol=1e-6)
        adapters = adapters_on(host, LORA)
        weights = {k.removeprefix("diffusion_model."): host.weight(k) + a.delta(host.weight(k)).view_as(host.weight(k)) for k, a in adapters.items()}
        expected = torch.func.functional_call(host.model, weights, inputs)
    with injected(host, adapters):
        found = host.model(*inputs)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max() and (found - base).abs().max() > 0.01
    found.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters_of(adapters))
    with torch.no_grad():
        assert torch.equal(host.model(*inputs), base)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_nothing_below_the_first_adapter_is_differentiated(first, checkpointing):
    """Below it activations carry no graph and the backward pass asks for no weight; above it, it asks for every one."""
    host = ToyHost()
    adapters = {k: a for k, a in adapters_on(host, LORA).items() if k.startswith(f"diffusion_model.blocks.{first}.attn.out")}
    assert len(adapters) == 1
    traced = {}
    with injected(host, adapters, checkpointing):
        for number, block in enumerate(host.blocks()):
            block.register_forward_hook(lambda module, args, out, number=number: traced.update({number: (args[0].grad_fn, out[0].grad_fn)}))
        host.model(*batch()).sum().backward()
    for number in range(3):
        assert (traced[number][0] is not None) is (number > first) and (traced[number][1] is not None) is (number >= first)
    names = {id(m): name for name, m in host.model.named_modules()}
    asked = {names[id(m)] for m in host.fetched}
    above = {"conv_out"} | {f"blocks.{n}.attn.{part}" for n in range(first + 1, 3) for part in ("q", "out")}
    # mlp acts on the text, which needs no gradient; but whatever leaves a checkpointed block counts as differentiated
    passed_on = {f"blocks.{n}.mlp" for n in range(first + 1, 3)} if checkpointing else set()
    again = {f"blocks.{first}.{part}" for part in ("attn.q", "attn.out", "mlp")} if checkpointing else set()  # computed, not differentiated
    assert above <= asked <= above | passed_on | again


@pytest.mark.parametrize("ending", ["normal", "exception", "interrupt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_left_as_found(ending, checkpointing):
    host = ToyHost()
    own = host.model.blocks[1].mlp.forward
    host.model.blocks[1].mlp.forward = own  # a forward that somebody else has put there
    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    assert overridden(host.model) == ["blocks.1.mlp"]
    reason = {"normal": None, "exception": ValueError(), "interrupt": KeyboardInterrupt()}[ending]
    try:
        with injected(host, adapters_on(host, LORA), checkpointing):
            assert len(overridden(host.model)) == len(host.layers()) + (3 if checkpointing else 0)
            host.model(*batch()).sum().backward()
            if reason is not None:
                raise reason
    except BaseException as error:  # noqa: B036 - the interrupt is what is tested
        assert error is reason
    assert overridden(host.model) == ["blocks.1.mlp"] and host.model.blocks[1].mlp.__dict__["forward"] is own
    assert all(torch.equal(v, before[k]) for k, v in host.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in host.model.parameters())


def test_an_interrupt_while_injecting_leaves_nothing_either():
    class Stubborn(nn.Linear):
        def __setattr__(self, name, value):
            if name == "forward":
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    host = ToyHost()
    host.model.blocks[1].mlp = Stubborn(6, 6)
    with pytest.raises(KeyboardInterrupt), injected(host, adapters_on(host, LORA)):
        pass
    assert overridden(host.model) == []


def test_injections_nest():
    """Two sets of adapters on one model add up, and come off in turn."""
    host = ToyHost(norm=False)
    inputs, adapters = batch(), adapters_on(host, LORA, "attention")
    halves = [{k: a for i, (k, a) in enumerate(adapters.items()) if i % 2 == half} for half in (0, 1)]
    with torch.no_grad():
        with injected(host, adapters):
            expected = host.model(*inputs)
        with injected(host, halves[0]), injected(host, halves[1]):
            torch.testing.assert_close(host.model(*inputs), expected)
        assert overridden(host.model) == []


def test_the_plan():
    """Layers in the model's order, each drawing from a generator of its own; grouped convolutions are left out."""
    host = ToyHost()
    adapters = build_adapters(host, Method(LORA), "attention", 3)
    assert list(adapters) == [f"diffusion_model.blocks.{n}.attn.{part}.weight" for n in range(3) for part in ("q", "out")]
    assert parameter_count(adapters) == 6 * 2 * (6 + 9)
    again, other = (build_adapters(host, Method(LORA), "attention", seed) for seed in (3, 4))
    downs = [a.residual.down for a in adapters.values()]
    assert all(torch.equal(a.residual.down, d) for a, d in zip(again.values(), downs, strict=True))
    assert not any(torch.equal(a.residual.down, d) for a, d in zip(other.values(), downs, strict=True))
    assert not torch.equal(downs[0], downs[2])
    host.model.grouped = nn.Conv2d(4, 4, 3, groups=2)
    assert "diffusion_model.grouped.weight" in host.layers() and "diffusion_model.grouped.weight" not in adaptable(host)


def test_a_rank_above_a_layer_names_the_layer():
    with pytest.raises(TriLoRAError, match=r"layer diffusion_model.blocks.0.attn.q.weight: rank=7 is larger than the layer"):
        build_adapters(ToyHost(), Method(LoraConfig(rank=7)), "attention", 0)
