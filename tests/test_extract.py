"""Extraction: the truncated SVD against torch.linalg, fits against what they must not miss, errors against the dense ones."""

import dataclasses
import itertools
from typing import ClassVar

import pytest
import torch
from comfyui_trilora.training.export import export_tensors
from comfyui_trilora.trilora_ops import registry
from comfyui_trilora.trilora_ops.adapter import LayerShape
from comfyui_trilora.trilora_ops.extract import extract_adapter, extract_low_rank, fit_transform
from comfyui_trilora.trilora_ops.factors import is_canonical
from comfyui_trilora.trilora_ops.registry import Method, read_adapter_tensors
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig
from comfyui_trilora.trilora_ops.residuals.none import NoResidualConfig
from comfyui_trilora.trilora_ops.residuals.tensor_ring import TensorRingResidualConfig
from comfyui_trilora.trilora_ops.residuals.trilora import TriLoraConfig
from comfyui_trilora.trilora_ops.transforms.block_orthogonal import BlockOrthogonalConfig
from comfyui_trilora.trilora_ops.transforms.channels import ChannelTransform
from comfyui_trilora.trilora_ops.transforms.diagonal import DiagonalConfig
from comfyui_trilora.trilora_ops.transforms.tensor_ring import TensorRingConfig

# (out, in, *kernel): linear layers tall, wide and thin, convolutions of one to three axes
SHAPES = [(24, 36), (40, 18), (3, 20), (12, 10, 3, 3), (16, 12, 1, 1), (8, 6, 5), (6, 4, 2, 3, 2)]
SPECTRA = {"flat": lambda i: torch.ones_like(i), "power": lambda i: i**-0.8, "steep": lambda i: 0.6**i, "step": lambda i: (i <= 9) + 1e-4}
TRANSFORMS = [TensorRingConfig(1), TensorRingConfig(2), DiagonalConfig(), BlockOrthogonalConfig(4)]


def draw(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def with_spectrum(out, columns, name, seed=0):
    """A matrix with the singular values SPECTRA[name](1, 2, ...)."""
    count = min(out, columns)
    sigma = SPECTRA[name](torch.arange(1.0, count + 1))
    return torch.linalg.qr(draw((out, count), seed)).Q * sigma @ torch.linalg.qr(draw((columns, count), seed + 1)).Q.t()


def optimum(delta, rank):
    """The smallest relative error that any matrix of this rank has (Eckart-Young)."""
    sigma = torch.linalg.svdvals(delta.double())
    return float((sigma[rank:].square().sum() / sigma.square().sum()).sqrt())


def dense_error(delta, found):
    return float((delta.double() - found.detach().double()).norm() / delta.double().norm())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("out", "columns", "rank"), [(24, 36, 5), (40, 18, 18), (7, 50, 30), (300, 410, 8), (620, 290, 16), (270, 900, 1)])
def test_low_rank_is_the_truncated_svd(out, columns, rank, spectrum):
    """Canonical, as near as any matrix of that rank (large ones within a hundredth of the least error), and the error is the real one."""
    delta = with_spectrum(out, columns, spectrum)
    pair, error = extract_low_rank(delta, rank, generator())
    assert pair.rank == min(rank, out, columns) and is_canonical(pair)
    best = optimum(delta, rank)
    assert error == pytest.approx(dense_error(delta, pair.dense()), rel=1e-3, abs=1e-6)
    assert best - 1e-5 <= error <= 1.01 * best + 1e-5


@pytest.mark.parametrize(("out", "columns"), [(30, 44), (280, 330)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_energy_is_the_smallest_rank_that_holds_it(out, columns, energy):
    """The cap included: it is never exceeded."""
    delta = with_spectrum(out, columns, "power")
    sigma = torch.linalg.svdvals(delta.double()).square()
    needed = int((sigma.cumsum(0) < energy * sigma.sum() * (1 - 1e-6)).sum()) + 1
    for cap in (3, 20):
        assert extract_low_rank(delta, cap, generator(), energy)[0].rank == min(needed, cap)


def test_the_same_seed_gives_the_same_adapter_and_the_global_stream_stays():
    delta, before = with_spectrum(300, 290, "power"), torch.get_rng_state()
    first, second = (extract_low_rank(delta, 6, generator(4))[0] for _ in range(2))
    assert torch.equal(first.up, second.up) and torch.equal(first.down, second.down)
    method, weight = Method(LoraConfig(2), TensorRingConfig(2)), draw((24, 36), 5)
    fits = [fit_transform(weight, draw((24, 36), 6), method, generator(4))[0] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(fits[0].parameters(), fits[1].parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: f"{t.kind}{getattr(t, 'ring_rank', '')}")
@pytest.mark.parametrize("residual", [LoraConfig(2), TriLoraConfig(2)], ids=["lora", "trilora"])
def test_a_fit_is_never_worse_than_the_svd_of_its_residual(shape, transform, residual):
    """On differences that are nothing like a transform, whatever the layer; and the error is the real one."""
    weight = draw(shape, 1)
    delta = 0.1 * draw((shape[0], weight[0].numel()), 2)
    adapter, error = fit_transform(weight, delta, Method(residual, transform), generator())
    assert error <= optimum(delta, 2) + 1e-5
    assert error == pytest.approx(dense_error(delta, adapter.delta(weight)), rel=1e-3, abs=1e-5)
    assert adapter.residual.rank <= 2


def planted(transform, shape, rank, seed=3, spread=0.02):
    """(W0, delta, the same delta's best error by SVD alone) of a pair whose every parameter moved a little from T = I."""
    weight = with_spectrum(shape[0], torch.Size(shape[1:]).numel(), "power", seed).view(shape)
    T = transform.build(LayerShape(shape[0], shape[1], tuple(shape[2:])), weight, generator(seed))
    for number, parameter in enumerate(T.parameters()):
        parameter.data += spread * draw(parameter.shape, seed + number)
    delta = T.delta(weight.flatten(1)).detach()
    if rank:
        factor = draw((rank, delta.shape[1]), seed + 51)
        delta = delta + 0.3 * delta.norm() * (draw((shape[0], rank), seed + 50) @ factor) / (len(delta) * delta.shape[1] * rank) ** 0.5
    return weight, delta


@pytest.mark.parametrize("shape", [(60, 48), (48, 64), (24, 16, 3, 3)], ids=str)
@pytest.mark.parametrize(("transform", "reached"), [(TensorRingConfig(1), 1e-4), (DiagonalConfig(), 1e-4), (BlockOrthogonalConfig(8), 1e-3)],
                         ids=["tensor_ring", "diagonal", "block_orthogonal"])
@pytest.mark.parametrize("residual", [NoResidualConfig(), LoraConfig(2)], ids=["alone", "lora"])
def test_a_planted_pair_is_found(transform, reached, residual, shape):
    """A difference that the pair can hold exactly is recovered, where the SVD alone misses most of it."""
    weight, delta = planted(transform, shape, getattr(residual, "rank", 0))
    _, error = fit_transform(weight, delta, Method(residual, transform), generator(99))
    assert error <= reached
    assert optimum(delta, 2) > 0.2


def test_a_planted_ring_of_rank_two_is_found_in_part():
    """Its cores have many forms and the way to them is slow: what the fit reaches is a fraction of the SVD's error."""
    weight, delta = planted(TensorRingConfig(2), (60, 48), 2)
    _, error = fit_transform(weight, delta, Method(LoraConfig(2), TensorRingConfig(2)), generator(99))
    assert error <= 0.5 * optimum(delta, 2)


class Shift(ChannelTransform):
    """T x = x + g * roll(x, 1), a kind that no file of the pack knows."""

    def __init__(self, shape, g):
        super().__init__(shape)
        self.g = torch.nn.Parameter(g)

    def rows(self, x, transposed=False):
        return x + self.g * x.roll(-1 if transposed else 1, dims=1)


@dataclasses.dataclass(frozen=True)
class ShiftConfig:
    kind: ClassVar[str] = "shift"
    TENSORS: ClassVar[tuple[str, ...]] = ("g",)

    @classmethod
    def read(cls, shape, tensors):
        return Shift(shape, tensors["g"]) if set(tensors) == {"g"} else None

    def build(self, shape, weight, generator):
        return Shift(shape, torch.zeros(1))


def test_a_kind_registered_later_is_fitted():
    weight = draw((20, 30), 1)
    delta = 0.3 * weight.roll(-1, dims=1)  # W0 (T - I) with g = 0.3
    for residual in (NoResidualConfig(), LoraConfig(1)):
        adapter, error = fit_transform(weight, delta, Method(residual, ShiftConfig()), generator())
        assert error <= 1e-4 and adapter.transform.g.item() == pytest.approx(0.3, abs=1e-4)


PAIRS = [(t, r) for t, r in itertools.product(registry.TRANSFORMS, registry.RESIDUALS) if (t, r) != ("none", "none")]


@pytest.mark.parametrize("shape", [(20, 30), (12, 10, 3, 3)], ids=str)
@pytest.mark.parametrize(("transform", "residual"), PAIRS)
def test_every_registered_pair_gives_a_file_of_that_error(transform, residual, shape):
    """Extracted, exported, read back: the file's difference has the stated error, never above 1, and never above the SVD's."""
    options = {"rank": 2} if "rank" in {f.name for f in dataclasses.fields(registry.RESIDUALS[residual])} else {}
    method = Method(registry.RESIDUALS[residual](**options), registry.TRANSFORMS[transform]())
    weight = draw(shape, 1)
    delta = 0.1 * draw((shape[0], weight[0].numel()), 2) + 0.05 * weight.flatten(1)
    adapter, error = extract_adapter(weight, delta, method, generator())
    tensors, _ = export_tensors({"diffusion_model.x.weight": adapter}, "generic", ["diffusion_model.x.weight"])
    if transform == "none":
        up, down, alpha = (tensors[f"diffusion_model.x.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
        found = (up.flatten(1) @ down.flatten(1)) * (alpha / len(down))
    else:
        parts = [{key.rpartition(".")[2]: t for key, t in tensors.items() if f".{part}." in key} for part in ("transform", "residual")]
        found = read_adapter_tensors(LayerShape(shape[0], shape[1], tuple(shape[2:])), *parts).delta(weight)
    assert error == pytest.approx(dense_error(delta, found), rel=1e-3) and error < 1
    if residual in ("lora", "trilora") or transform == "none":
        assert error <= optimum(delta, 4 if residual == "tensor_ring" else 2) + 1e-5


def test_a_rank_larger_than_the_layer_means_all_of_it():
    delta = draw((4, 9))
    for method in (Method(TriLoraConfig(64)), Method(LoraConfig(64), DiagonalConfig())):
        adapter, error = extract_adapter(draw((4, 9), 1), delta, method, generator())
        assert adapter.residual.rank == 4 and error <= 1e-5


@pytest.mark.parametrize("residual", [LoraConfig(8), TriLoraConfig(8)])
def test_energy_sets_the_rank_beside_a_transform_too(residual):
    weight, delta = draw((30, 24), 1), with_spectrum(30, 24, "steep")
    adapter, error = fit_transform(weight, delta, Method(residual, DiagonalConfig()), generator(), energy=0.9)
    assert 1 < adapter.residual.rank < 8 and error**2 <= 0.1 + 1e-5


def test_from_a_transform_to_low_rank_and_back():
    """Converting is extracting: of a TLoRA's difference the best TriLoRA, and of that difference the TLoRA again."""
    weight, delta = planted(TensorRingConfig(1), (60, 48), 2)
    low_rank, error = extract_adapter(weight, delta, Method(TriLoraConfig(6)), generator())
    assert error == pytest.approx(optimum(delta, 6), rel=1e-3)
    whole, _ = extract_adapter(weight, delta, Method(TriLoraConfig(48)), generator())
    again, error = extract_adapter(weight, whole.delta(weight), Method(LoraConfig(2), TensorRingConfig(1)), generator())
    assert error <= 1e-4 and dense_error(delta, again.delta(weight)) <= 1e-4
    assert dense_error(delta, low_rank.delta(weight)) > 0.1


def test_a_fit_can_be_stopped():
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        fit_transform(draw((12, 10)), draw((12, 10), 1), Method(TensorRingResidualConfig(2), TensorRingConfig(1)), generator(), check=stop)
