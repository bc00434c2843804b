"""Canonical form and truncation of a pair of factors, against torch.linalg on the dense product."""

import itertools
from dataclasses import replace

import pytest
import torch
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.factors import (
    LowRank,
    canonicalise,
    is_canonical,
    keep_energy,
    keep_rank,
    spectrum,
)

# (out, r, columns): wide, tall, rank 1, rank above min/2, rank above out, above columns, above both
SHAPES = [(7, 3, 12), (13, 4, 5), (6, 1, 9), (8, 7, 11), (5, 8, 12), (12, 9, 4), (3, 10, 5), (1, 2, 6)]
KINDS = ("plain", "large", "tiny", "deficient", "negative")


def draw(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair_of(shape, kind="plain", seed=0) -> LowRank:
    out, rank, columns = shape
    up, down = draw((out, rank), seed), draw((rank, columns), seed + 1)
    if kind == "deficient":  # the last direction repeats the first
        down[-1], up[:, -1] = down[0], up[:, 0]
    scale = {"large": 300.0, "tiny": 1e-4, "negative": -0.7}.get(kind, 0.7)
    return LowRank(up, down, scale)


def exact(pair: LowRank) -> torch.Tensor:
    return pair.scale * (pair.up.double() @ pair.down.double())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def with_spectrum(sigma, out=24, columns=31, seed=7) -> LowRank:
    """A pair that is not canonical but whose product has these singular values."""
    left = torch.linalg.qr(draw((out, len(sigma)), seed).double()).Q
    right = torch.linalg.qr(draw((columns, len(sigma)), seed + 1).double()).Q
    mix = torch.linalg.qr(draw((len(sigma), len(sigma)), seed + 2).double()).Q * 3
    return LowRank((left * torch.tensor(sigma, dtype=torch.double) @ mix).float(), (torch.linalg.inv(mix) @ right.t()).float())


@pytest.mark.parametrize(("shape", "kind"), list(itertools.product(SHAPES, KINDS)), ids=str)
def test_canonical_form(shape, kind):
    """The same R; orthonormal rows of Vt; sigma is R's and falls; signs are fixed; the scale is the power of two near sigma_1."""
    pair = pair_of(shape, kind)
    result = canonicalise(pair)
    out, rank, columns = shape
    assert result.up.shape == (out, min(shape)) and result.down.shape == (min(shape), columns)
    assert result.up.dtype == result.down.dtype == torch.float32
    assert relative(result.dense(), exact(pair)) <= 1e-6
    torch.testing.assert_close(result.down @ result.down.t(), torch.eye(min(shape)), atol=1e-6, rtol=0)
    sigma = torch.linalg.svdvals(exact(pair))[: min(shape)]
    torch.testing.assert_close(spectrum(result).double(), sigma, atol=1e-6 * sigma[0].item(), rtol=1e-6)
    assert (spectrum(result).diff() <= 1e-6 * sigma[0]).all()
    assert (result.down.gather(1, result.down.abs().argmax(1, keepdim=True)) > 0).all()
    assert 2**-0.5 <= sigma[0].item() / result.scale <= 2**0.5 and torch.tensor(result.scale).log2() % 1 == 0
    assert result.alpha == result.rank * result.scale
    assert is_canonical(result)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_canonical_form_is_unique(shape):
    """Two ways to write one product end in the same factors, signs included; a second pass changes only rounding."""
    pair = pair_of(shape)
    mix = torch.linalg.qr(draw((shape[1], shape[1]), 5)).Q
    other = LowRank(pair.up @ mix * -2.0, mix.t() @ pair.down, pair.scale / -2.0)
    first = canonicalise(pair)
    for second in (canonicalise(other), canonicalise(first)):
        torch.testing.assert_close(second.up, first.up, atol=2e-5, rtol=0)
        torch.testing.assert_close(second.down, first.down, atol=2e-5, rtol=0)


@pytest.mark.parametrize("zero", ["up", "down", "scale"])
def test_the_zero_product(zero):
    pair = pair_of((7, 3, 5))
    pair = replace(pair, **({"scale": 0.0} if zero == "scale" else {zero: torch.zeros_like(getattr(pair, zero))}))
    result = canonicalise(pair)
    assert not result.dense().any() and result.scale == 1.0 and result.rank == 3
    torch.testing.assert_close(result.down @ result.down.t(), torch.eye(3), atol=1e-6, rtol=0)
    assert is_canonical(result) and keep_energy(result, 0.9).rank == 1


def test_halves_are_read_exactly():
    """bf16 and fp16 factors are widened, not computed with."""
    pair = pair_of((9, 4, 6))
    for dtype in (torch.float16, torch.bfloat16):
        half = LowRank(pair.up.to(dtype), pair.down.to(dtype), pair.scale)
        assert relative(canonicalise(half).dense(), exact(half)) <= 1e-6


def test_fp16_keeps_weak_directions():
    """With the scale c every sigma down to 1e-3 of the largest survives fp16, at the usual size of a trained delta.

    Without it the entries of U * sigma fall below fp16's smallest normal number and the weak directions are noise.
    """
    sigma = [1e-2, 1e-3, 1e-4, 1e-5]
    pair = canonicalise(with_spectrum(sigma, out=320, columns=200))
    plain = LowRank(pair.up * pair.scale, pair.down)
    errors = {}
    for name, form in (("scaled", pair), ("plain", plain)):
        stored = LowRank(form.up.half().float(), form.down.half().float(), form.scale)
        difference = stored.up * stored.scale - form.up * form.scale
        errors[name] = (difference.norm(dim=0) / (form.up * form.scale).norm(dim=0)).tolist()
    assert max(errors["scaled"]) < 1e-3
    assert errors["plain"][3] > 0.02


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("shape", [(13, 5, 8), (6, 4, 9), (4, 6, 11)], ids=str)
def test_a_prefix_is_the_best_approximation(shape, keep):
    """Eckart-Young: no matrix of rank k is nearer to R than the first k directions."""
    pair = pair_of(shape)
    U, sigma, Vt = torch.linalg.svd(exact(pair), full_matrices=False)
    kept = keep_rank(canonicalise(pair), keep)
    best = U[:, :keep] * sigma[:keep] @ Vt[:keep]
    assert kept.rank == min(keep, *shape) and relative(kept.dense(), best) <= 1e-6
    error = (exact(pair) - kept.dense().double()).norm()
    assert error.item() == pytest.approx(sigma[keep:].norm().item(), rel=1e-5, abs=1e-5)
    assert kept.scale == canonicalise(pair).scale and kept.alpha == kept.rank * kept.scale


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.9, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("kind", ["plain", "tiny", "large"])
def test_energy_keeps_the_fewest_directions(kind, share):
    pair = pair_of((11, 6, 9), kind)
    energy = torch.linalg.svdvals(exact(pair))[:6].square()
    kept = keep_energy(canonicalise(pair), share).rank
    shares = energy.cumsum(0) / energy.sum()
    assert shares[kept - 1] >= share - 1e-9
    assert kept == 1 or shares[kept - 2] < share


def test_energy_at_exact_steps():
    """Equal directions each hold the same share; a share that is met exactly needs no further direction."""
    pair = LowRank(torch.eye(9, 4), torch.eye(4, 6))
    assert [keep_energy(pair, share).rank for share in (0.25, 0.26, 0.5, 0.75, 0.76, 1.0)] == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda p: keep_rank(p, 0), "keep_rank=0"), (lambda p: keep_energy(p, 0.0), "keep_energy=0.0"),
     (lambda p: keep_energy(p, 1.01), "keep_energy=1.01")],
    ids=["rank-0", "energy-0", "energy-above-1"],
)  # fmt: skip
def test_bad_truncations_are_refused(change, words):
    with pytest.raises(TriLoRAError, match=words):
        change(canonicalise(pair_of((7, 3, 5))))


@pytest.mark.parametrize("spoil", ["rows", "order"])
def test_what_is_not_canonical(spoil):
    pair = canonicalise(with_spectrum([3.0, 2.0, 0.5]))
    assert is_canonical(pair) and is_canonical(LowRank(pair.up.half(), pair.down.half(), 3.0))  # any scale
    spoiled = {
        "rows": replace(pair, down=pair.down * 1.01),
        "order": replace(pair, up=pair.up.flip(1), down=pair.down.flip(0)),
    }[spoil]
    assert not is_canonical(spoiled)


def test_the_input_is_not_changed():
    pair = pair_of((7, 3, 5))
    up, down = pair.up.clone(), pair.down.clone()
    keep_rank(canonicalise(pair), 2).up.mul_(0)
    assert torch.equal(pair.up, up) and torch.equal(pair.down, down)
