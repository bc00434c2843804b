"""Reweighting, weighted sums and scale folding of factors, against the same operations on the dense product."""

import itertools
import math

import pytest
import torch
from comfyui_trilora.tests.test_factors import KINDS, SHAPES, draw, exact, pair_of, relative, with_spectrum
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.factors import (
    LowRank,
    canonicalise,
    fold_scale,
    is_canonical,
    reweight,
    spectrum,
    weighted_sum,
)

SIGMA = [8.0, 4.0, 1.0, 0.25]


def dense_with(pair: LowRank, change) -> torch.Tensor:
    """U f(sigma) Vt of the dense product, in fp64."""
    U, sigma, Vt = torch.linalg.svd(exact(pair), full_matrices=False)
    return U[:, : pair.rank] * change(sigma[: pair.rank]) @ Vt[: pair.rank]


@pytest.mark.parametrize(("shape", "kind"), list(itertools.product(SHAPES, KINDS)), ids=str)
def test_weight_one_changes_nothing(shape, kind):
    pair = canonicalise(pair_of(shape, kind))
    assert reweight(pair) is pair
    again = reweight(pair, gains=[1.0])
    assert torch.equal(again.down, pair.down) and again.scale == pair.scale
    torch.testing.assert_close(again.up, pair.up, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("power", [0.0, 0.5, 0.8, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_power_is_on_the_share_of_the_strongest(shape, power):
    pair = canonicalise(pair_of(shape))
    result = reweight(pair, power)
    assert relative(result.dense(), dense_with(pair, lambda s: s[0] * (s / s[0]) ** power)) <= 2e-6
    assert is_canonical(result)
    torch.testing.assert_close(spectrum(result)[0], spectrum(pair)[0])


@pytest.mark.parametrize("cap", [1.0, 0.6, 0.5, 0.03, 0.001])
def test_a_cap_is_a_share_of_the_strongest(cap):
    pair = canonicalise(with_spectrum(SIGMA))
    result = reweight(pair, cap=cap)
    expected = torch.tensor([min(s, cap * 8) for s in SIGMA])
    torch.testing.assert_close(spectrum(result), expected, rtol=1e-5, atol=1e-6)
    assert relative(result.dense(), dense_with(pair, lambda s: s.clamp_max(cap * 8))) <= 2e-6
    assert is_canonical(result) and 2**-0.5 <= cap * 8 / result.scale <= 2**0.5


def test_the_cap_comes_after_the_power():
    result = reweight(canonicalise(with_spectrum(SIGMA)), power=2.0, cap=0.1)
    torch.testing.assert_close(spectrum(result), torch.tensor([0.8, 0.8, 0.125, 0.0078125]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gains", [[0.0], [1, 10], [0.5, -1.0, 3.0], [1, 1, 1, 1, 100], [0, 0, 0, 0]], ids=str)
def test_gains_are_one_for_each_direction(gains):
    """The result is sorted anew; a negative gain turns its direction round; what has no gain keeps its own size."""
    pair = canonicalise(with_spectrum(SIGMA))
    result = reweight(pair, gains=gains)
    factors = torch.tensor(([*gains, 1, 1, 1, 1])[:4], dtype=torch.float64)
    expected = dense_with(pair, lambda s: s * factors)
    assert (result.dense().double() - expected).norm() <= 1e-5
    found = spectrum(result)
    torch.testing.assert_close(found.double(), (torch.tensor(SIGMA, dtype=torch.float64) * factors.abs()).sort(descending=True).values, rtol=1e-5, atol=1e-5)
    assert is_canonical(result)


def test_noise_is_not_lifted():
    """A repeated direction leaves an empty one at rounding's size; a power below 1 would make it visible."""
    pair = canonicalise(pair_of((13, 4, 9), "deficient"))
    assert spectrum(pair)[-1] < 1e-6 * spectrum(pair)[0]
    assert spectrum(reweight(pair, 0.1))[-1] < 1e-6 * spectrum(pair)[0] < spectrum(reweight(pair, 0.1))[-2]


def test_the_zero_product_stays_zero():
    zero = canonicalise(LowRank(torch.zeros(5, 2), draw((2, 7))))
    result = reweight(zero, 0.5, 0.5, [2.0])
    assert not result.dense().any() and result.scale == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [({"power": -1.0}, "power=-1.0"), ({"power": math.inf}, "power=inf"), ({"cap": 1.5}, "cap=1.5"), ({"cap": -0.1}, "cap=-0.1")],
    ids=["power", "infinite", "above", "below"],
)
def test_bad_weights_are_refused(change, words):
    with pytest.raises(TriLoRAError, match=words):
        reweight(canonicalise(pair_of((7, 3, 5))), **change)


def parts_of(out, columns, ranks, seed=0):
    weights = [1.0, -0.6, 0.0, 2.5]
    return [(pair_of((out, rank, columns), kind, seed + 10 * i), weights[i]) for i, (rank, kind) in enumerate(zip(ranks, ("plain", "large", "tiny", "negative"), strict=False))]


@pytest.mark.parametrize(("out", "columns", "ranks"), [(13, 9, (2, 3)), (9, 13, (4, 5, 6)), (6, 50, (1, 1)), (5, 4, (8, 2)), (30, 11, (1, 7, 2, 20))])
def test_a_sum_is_the_dense_sum(out, columns, ranks):
    """Of any ranks and weights, the rank above either size among them; in canonical form; its prefix the best of that rank."""
    parts = parts_of(out, columns, ranks)
    dense = sum(weight * exact(pair) for pair, weight in parts)
    total = weighted_sum(parts)
    assert total.rank == min(sum(ranks), out, columns) and is_canonical(total)
    assert relative(total.dense(), dense) <= 1e-6
    U, sigma, Vt = torch.linalg.svd(dense, full_matrices=False)
    for keep in (1, 2, 100):
        kept = weighted_sum(parts, keep)
        assert kept.rank == min(keep, total.rank)
        assert relative(kept.dense(), U[:, :keep] * sigma[:keep] @ Vt[:keep]) <= 1e-5


def test_a_sum_of_one_is_its_canonical_form():
    pair = pair_of((7, 3, 11), "negative")
    total, expected = weighted_sum([(pair, 1.0)]), canonicalise(pair)
    torch.testing.assert_close(total.up, expected.up, atol=1e-5, rtol=0)
    torch.testing.assert_close(total.down, expected.down, atol=1e-5, rtol=0)


def test_opposites_cancel():
    pair = pair_of((7, 3, 11))
    assert weighted_sum([(pair, 0.5), (canonicalise(pair), -0.5)]).dense().norm() <= 1e-6 * pair.dense().norm()


@pytest.mark.parametrize(("parts", "words"), [([], "none"), ([(7, 5), (7, 6)], r"\(7, 5\), \(7, 6\)")], ids=["none", "sizes"])
def test_bad_sums_are_refused(parts, words):
    with pytest.raises(TriLoRAError, match=words):
        weighted_sum([(pair_of((out, 2, columns)), 1.0) for out, columns in parts])


@pytest.mark.parametrize(("shape", "kind"), list(itertools.product(SHAPES, KINDS)), ids=str)
def test_folding_the_scale_is_exact(shape, kind):
    """Only powers of two move between the factors, so not one mantissa changes; both factors end at one size."""
    pair = canonicalise(pair_of(shape, kind))
    folded = fold_scale(pair)
    assert folded.scale == 1.0
    for direction in range(pair.rank):
        up, down = pair.up[:, direction] * pair.scale, pair.down[direction]
        shift = (folded.down[direction] / down)[down != 0].unique()
        assert shift.numel() == 1 and torch.frexp(shift).mantissa == 0.5
        assert torch.equal(folded.up[:, direction] * shift, up)
        if up.norm() > 0:
            assert 0.5 <= folded.up[:, direction].norm() / folded.down[direction].norm() <= 2


def test_folded_halves_are_as_good_as_scaled_ones():
    """fp16 factors without an alpha give the very delta of fp16 factors with one, and keep weaker directions besides."""
    pair = canonicalise(with_spectrum([1e-2, 1e-3, 1e-4], out=320, columns=200))
    halves = [LowRank(form.up.half().float(), form.down.half().float(), form.scale) for form in (pair, fold_scale(pair))]
    assert torch.equal(halves[0].dense(), halves[1].dense()) or relative(halves[1].dense(), halves[0].dense().double()) <= 1e-6
    weak = canonicalise(with_spectrum([1e-1, 1e-6], out=320, columns=200))
    error = {}
    for name, form in (("scaled", weak), ("folded", fold_scale(weak))):
        up, down = form.up.half().float()[:, 1:] * form.scale, form.down.half().float()[1:]
        error[name] = relative(up @ down, (form.up[:, 1:].double() * form.scale) @ form.down[1:].double())
    assert error["folded"] < 2e-3 < error["scaled"]


def test_a_scale_that_is_no_power_of_two_is_folded_to_rounding():
    pair = pair_of((9, 4, 6), "negative")
    assert relative(fold_scale(pair).dense(), exact(pair)) <= 1e-6
    assert not fold_scale(LowRank(torch.zeros(5, 2), draw((2, 3)))).dense().any()
