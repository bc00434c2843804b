"""The contract that every registered pair of transform and residual keeps on every kind of layer.

The pairs come from the registry: a kind registered later is covered with its default options at once, and with more
once it has a line in OPTIONS.
"""

import dataclasses
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import pytest
import torch
from comfyui_trilora.training.export import export_tensors
from comfyui_trilora.trilora_ops import registry
from comfyui_trilora.trilora_ops.adapter import LayerShape
from comfyui_trilora.trilora_ops.checkpoint import split_layers
from comfyui_trilora.trilora_ops.merge import add_low_rank_
from comfyui_trilora.trilora_ops.residuals.low_rank import FixedLowRank, LowRankResidual
from comfyui_trilora.trilora_ops.transforms.channels import ChannelTransform
from torch import nn

KEY = "diffusion_model.place.weight"
# Every layer below has at least rank 5 and none more than 7: 1 is the smallest rank, 4 more than half of the largest.
RANKS = (1, 4)
# kind -> option sets to test beside the default ones, at the larger rank unless they name one
OPTIONS = {
    "lora": {"alpha": {"alpha": 0.5}},
    "trilora": {
        "alpha": {"alpha": 0.5},
        "svd": {"sigma_init": "svd"},
        "ones": {"sigma_init": "ones"},
        "full": {"core": "full", "rank_out": 3},
        "full-r1": {"core": "full", "rank": 1, "rank_out": 5, "sigma_init": "svd"},
        "full-square": {"core": "full", "sigma_init": "svd"},
        "energy": {"energy": 0.7},
        "full-energy": {"core": "full", "rank_out": 5, "energy": 0.7},
        "orthogonality": {"orthogonality": 0.25},
        "full-orthogonality": {"core": "full", "rank_out": 3, "orthogonality": 0.25},
    },
}
# the same for kinds of transforms, which have names of their own
TRANSFORM_OPTIONS = {
    "tensor_ring": {"": {}, "R2": {"ring_rank": 2}, "R2-paper": {"ring_rank": 2, "ring_init": "paper"}, "R3": {"ring_rank": 3}},
    "block_orthogonal": {"": {}, "b3": {"block": 3}},
}
# kind of residual -> the parameters whose gradient is not zero at the first step; of other kinds at least one must be
MOVES_FIRST = {"lora": {"up"}, "trilora": {"Vt"}, "tensor_ring": {"core0"}, "none": set()}
# name -> (the layer, the shape of its input)
LAYERS = {
    "linear-wide": (lambda: nn.Linear(11, 7), (2, 3, 11)),
    "linear-tall": (lambda: nn.Linear(5, 12, bias=False), (4, 5)),
    "linear-zero-weight": (lambda: nn.Linear(6, 9), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 5)),
    "conv-1x1": (lambda: nn.Conv2d(9, 6, 1), (2, 9, 3, 4)),
    "conv-3x3-stride": (lambda: nn.Conv2d(7, 5, 3, stride=2, padding=1), (2, 7, 5, 6)),
    "conv-dilated": (lambda: nn.Conv2d(3, 6, (3, 2), padding=(2, 0), dilation=(2, 1)), (2, 3, 4, 5)),
    "conv-same": (lambda: nn.Conv2d(3, 5, 3, padding="same", bias=False), (1, 3, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 5, (1, 2, 2)), (1, 3, 2, 3, 4)),
}


@dataclass(frozen=True)
class Frozen:
    """A frozen layer with an input for it, both drawn from one seed."""

    module: nn.Module
    x: torch.Tensor

    @classmethod
    def of(cls, name: str) -> "Frozen":
        make, shape = LAYERS[name]
        module, draw = make().requires_grad_(False), generator(1)
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
        if "zero-weight" in name:
            module.weight.zero_()
        return cls(module, torch.randn(shape, generator=draw))

    def build(self, method, seed: int = 2):
        return method.build(self.module, self.module.weight, generator(seed))

    def merged(self, delta: torch.Tensor) -> torch.Tensor:
        """The output with `delta` added to the weight itself."""
        weight = self.module.weight + delta.view_as(self.module.weight)
        return torch.func.functional_call(self.module, {"weight": weight}, (self.x,))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(adapter, seed: int = 3):
    """The adapter after something like a training run: every parameter has moved."""
    draw = generator(seed)
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return adapter


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= relative


def configurations(kinds: dict[str, type], options_of: dict) -> dict[str, object]:
    """Name -> configuration, for every kind: the default at every rank of RANKS, and its options."""
    found = {}
    for kind, config in kinds.items():
        ranked = "rank" in {field.name for field in dataclasses.fields(config)}
        for rank in RANKS if ranked else ():
            found[f"{kind}-r{rank}"] = config(rank=rank)
        for name, options in options_of.get(kind, {} if ranked else {"": {}}).items():
            found[f"{kind}-{name}".strip("-")] = config(**({"rank": RANKS[-1]} if ranked else {}) | options)
    return found


def methods() -> dict[str, registry.Method]:
    """Name -> method: every pair of kinds that the registry holds now, and each kind's options beside the simplest partners."""
    transforms, residuals = configurations(registry.TRANSFORMS, TRANSFORM_OPTIONS), configurations(registry.RESIDUALS, OPTIONS)
    simple = {config.kind: name for name, config in reversed(residuals.items())}  # each kind's first entry
    pairs = [(t, r) for t in transforms for r in residuals if transforms[t].kind == "none" or r in simple.values()]
    return {f"{t}+{r}": registry.Method(residuals[r], transforms[t]) for t, r in pairs
            if (transforms[t].kind, residuals[r].kind) != ("none", "none")}


def law_identity_at_start(method, frozen):
    """A new adapter leaves the layer's output as it is, bit by bit, in fp32 and in bf16, and its delta is exactly 0."""
    adapter = frozen.build(method)
    assert torch.equal(adapter(frozen.x, frozen.module), frozen.module(frozen.x))
    assert not adapter.delta(frozen.module.weight).any()
    half, x = frozen.module.bfloat16(), frozen.x.bfloat16()
    y = adapter(x, half)
    assert y.dtype == torch.bfloat16 and torch.equal(y, half(x))


def law_forward_is_merged_weight(method, frozen):
    """f(T x) + R x on activations equals the layer with W' = W0 T + R as its weight."""
    adapter = trained(frozen.build(method))
    delta = adapter.delta(frozen.module.weight)
    assert delta.shape == (adapter.shape.out, adapter.shape.columns) and delta.abs().max() > 1e-3
    assert_close(adapter(frozen.x, frozen.module), frozen.merged(delta))


def law_gradients_reach_everything(method, frozen):
    """At the first step only the factors beside a zero one move; from the second step on all of them do."""
    adapter = frozen.build(method)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    probe = torch.randn(frozen.module(frozen.x).shape, generator=generator(4))
    for step in range(2):
        optimizer.zero_grad()
        ((adapter(frozen.x, frozen.module) * probe).sum() + adapter.penalty()).backward()
        moving = {name for name, p in adapter.named_parameters() if p.grad.any()}
        names = {name for name, _ in adapter.named_parameters()}
        residual = {name.removeprefix("residual.") for name in moving if name.startswith("residual.")}
        if not frozen.module.weight.any():  # W0 T = 0 whatever T is
            names = {name for name in names if name.startswith("residual.")}
        if step == 1:
            assert moving == names
        elif getattr(method.residual, "orthogonality", 0):
            assert "residual.U" in moving
        else:
            assert residual == MOVES_FIRST.get(method.residual.kind, residual) and moving
        optimizer.step()


def law_strength_is_linear(method, frozen):
    """The file's layer merged at strength lambda adds lambda times the delta: nothing at 0, the opposite at -1."""
    adapter = trained(frozen.build(method))
    delta = adapter.delta(frozen.module.weight).view_as(frozen.module.weight)
    if method.form == "transform":  # merged as W + strength * delta, which `law_file_keeps_delta` pins down
        return
    pair = file_layer(adapter).pair
    for strength in (-1.0, 0.0, 0.5, 1.0, 2.0):
        weight = add_low_rank_(frozen.module.weight.clone(), [(pair, strength)])
        if strength == 0:
            assert torch.equal(weight, frozen.module.weight)
        else:
            assert (weight - frozen.module.weight - strength * delta).abs().max() <= 1e-5 * delta.abs().max()


def law_file_keeps_delta(method, frozen):
    """Export writes one layer whose delta, read back, is the adapter's: in canonical form, or as transform and residual."""
    adapter = trained(frozen.build(method))
    if method.form == "transform":
        name = KEY.removesuffix(".weight")
        tensors, ranks = export_tensors({KEY: adapter}, "generic", [KEY])
        parts = registry.collect_tensors(tensors, name)
        assert sorted(tensors) == sorted(f"{name}.{part}.{n}" for part, found in zip(("transform", "residual"), parts, strict=True) for n in found)
        assert all(registry.is_known(part, found) for part, found in zip(("transform", "residual"), parts, strict=True))
        assert_close(registry.read_adapter_tensors(adapter.shape, *parts).delta(frozen.module.weight), adapter.delta(frozen.module.weight))
        return
    layer = file_layer(adapter)
    assert layer.kernel == tuple(frozen.module.weight.shape[2:])
    assert_close(layer.pair.dense(), adapter.delta(frozen.module.weight))


def file_layer(adapter):
    """The adapter's one layer, as a reader of the exported file finds it."""
    tensors, ranks = export_tensors({KEY: adapter}, "generic", [KEY])
    layers, rest = split_layers(tensors)
    assert list(layers) == list(ranks) == [KEY.removesuffix(".weight")] and not rest
    return layers[KEY.removesuffix(".weight")]


def law_penalty(method, frozen):
    """0 unless asked for; `orthogonality` weighs the squared distance of both Gram matrices from the identity."""
    adapter = trained(frozen.build(method))
    weight = getattr(method.residual, "orthogonality", 0.0)
    expected = 0.0
    if weight:
        for gram in (adapter.residual.U.t() @ adapter.residual.U, adapter.residual.Vt @ adapter.residual.Vt.t()):
            expected += weight * torch.linalg.matrix_norm(gram.double() - torch.eye(len(gram))).square().item()
        assert expected > 0.01
    assert adapter.penalty().item() == pytest.approx(expected, rel=1e-5)


def law_same_seed_same_start(method, frozen):
    """The start depends on the generator alone, and building touches no global random state."""
    torch.manual_seed(5)
    first = frozen.build(method).state_dict()
    torch.manual_seed(6)
    before = torch.get_rng_state()
    second = frozen.build(method).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def law_parameters(method, frozen):
    """Every parameter is an fp32 master that is trained, and in exactly one group of the optimizer."""
    adapter = frozen.build(method)
    decay, keep = adapter.parameter_groups()
    assert sorted(map(id, decay + keep)) == sorted(map(id, adapter.parameters())) and decay + keep
    assert all(p.dtype == torch.float32 and p.requires_grad for p in decay + keep)


LAWS = {name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")}


CASES = [pytest.param(method, layer, id=f"{name}-{layer}") for name, method in methods().items() for layer in LAYERS
         if not (method.residual.kind == "none" and "zero-weight" in layer)]  # W0 T - W0 = 0 there, which leaves no law to test


@pytest.mark.parametrize(("method", "layer"), CASES)
@pytest.mark.parametrize("law", LAWS)
def test_contract(law, method, layer):
    LAWS[law](method, Frozen.of(layer))


def test_the_contract_is_not_empty():
    assert len(LAWS) >= 8 and len(LAYERS) >= 6
    assert {m.residual.kind for m in methods().values()} >= {"lora", "trilora"}
    for layer in LAYERS:
        shape = LayerShape.of(Frozen.of(layer).module)
        assert RANKS[0] == 1 and max(RANKS) > shape.rank_max / 2 and shape.out != shape.columns


class ToyResidual(LowRankResidual):
    """R = left * right with a zero `right`; `flaw` breaks one law."""

    def __init__(self, shape, left, flaw):
        super().__init__(shape)
        self.left, self.right = nn.Parameter(left), nn.Parameter(torch.zeros(2, shape.columns))
        self.flaw = flaw
        if flaw == "start":
            self.right.data += 1e-6
        if flaw == "unused":
            self.other = nn.Parameter(torch.ones(3))

    def factors(self):
        return self.left, self.right + (0 * self.other.sum() if self.flaw == "unused" else 0)

    def delta(self):
        return super().delta() * (1.001 if self.flaw == "delta" else 1)

    def low_rank(self):
        pair = super().low_rank()
        return dataclasses.replace(pair, scale=1.001) if self.flaw == "file" else pair

    def penalty(self):
        return self.left.square().sum() if self.flaw == "penalty" else super().penalty()


@dataclass(frozen=True)
class ToyConfig:
    kind: ClassVar[str] = "toy"
    TENSORS: ClassVar[tuple[str, ...]] = ("up", "down", "scale")
    flaw: str = ""

    @classmethod
    def read(cls, shape, tensors):
        return FixedLowRank.from_tensors(shape, tensors)

    def build(self, shape, weight, generator):
        draw = None if self.flaw == "unseeded" else generator
        return ToyResidual(shape, torch.randn(shape.out, 2, generator=draw), self.flaw)


class ToyTransform(ChannelTransform):
    """T x = x + g * roll(x, 1)."""

    def __init__(self, shape, g):
        super().__init__(shape)
        self.g = nn.Parameter(g)

    def rows(self, x, transposed=False):
        return x + self.g * x.roll(-1 if transposed else 1, dims=1)


@dataclass(frozen=True)
class ToyTransformConfig:
    kind: ClassVar[str] = "toy"
    TENSORS: ClassVar[tuple[str, ...]] = ("g",)

    @classmethod
    def read(cls, shape, tensors):
        return ToyTransform(shape, tensors["g"]) if set(tensors) == {"g"} else None

    def build(self, shape, weight, generator):
        return ToyTransform(shape, torch.zeros(1))


@pytest.mark.parametrize("part", ["residual", "transform"])
def test_a_kind_registered_later_is_covered(monkeypatch, part):
    kinds, config = {"residual": (registry.RESIDUALS, ToyConfig), "transform": (registry.TRANSFORMS, ToyTransformConfig)}[part]
    monkeypatch.setitem(kinds, "toy", config)
    mine = [method for method in methods().values() if getattr(method, part).kind == "toy"]
    assert len(mine) >= 4
    for method, layer, law in product(mine, LAYERS, LAWS.values()):
        if "zero-weight" not in layer:
            law(method, Frozen.of(layer))


@pytest.mark.parametrize(
    ("flaw", "law"),
    [("start", "identity_at_start"), ("delta", "forward_is_merged_weight"), ("unused", "gradients_reach_everything"),
     ("file", "file_keeps_delta"), ("file", "strength_is_linear"), ("penalty", "penalty"), ("unseeded", "same_seed_same_start")],
)  # fmt: skip
@pytest.mark.parametrize("layer", ["linear-wide", "conv-3x3-stride"])
def test_the_contract_sees_a_planted_flaw(flaw, law, layer):
    with pytest.raises(AssertionError):
        LAWS[law](registry.Method(ToyConfig(flaw)), Frozen.of(layer))
