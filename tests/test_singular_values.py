"""Leading singular values, exact and randomised, and the rank that holds a share of the energy."""

import pytest
import torch
from comfyui_trilora.trilora_ops.singular_values import Subspace, rank_for_energy, top_singular_values

OUT, COLUMNS, COUNT = 600, 900, 16
INDEX = torch.arange(OUT, dtype=torch.float64)
SPECTRA = {
    "flat-noise": None,  # a Gaussian matrix: the slowest case for subspace iteration
    "equal": torch.ones(OUT, dtype=torch.float64),
    "slow": 1 / (1 + INDEX).sqrt(),
    "fast": 0.7**INDEX,
    "spike": torch.where(INDEX < 3, 50.0, 1.0).double(),
}


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def orthogonal(rows, columns, seed):
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)).Q


@pytest.fixture(scope="module")
def bases():
    return orthogonal(OUT, OUT, 1), orthogonal(COLUMNS, OUT, 2)


def matrix_of(name, bases):
    """(the matrix in fp32, its leading singular values)."""
    if SPECTRA[name] is None:
        matrix = torch.randn(OUT, COLUMNS, generator=generator(4))
        return matrix, torch.linalg.svdvals(matrix)[:COUNT]
    left, right = bases
    return (left * SPECTRA[name] @ right.t()).float(), SPECTRA[name][:COUNT].float()


@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("name", SPECTRA)
def test_large_matrices(name, tall, bases, monkeypatch):
    """Within 1 % of the exact values, falling, seeded by the generator, the global stream untouched."""
    matrix, exact = matrix_of(name, bases)
    matrix = matrix.t() if tall else matrix
    calls = []
    improve = Subspace.improve
    monkeypatch.setattr(Subspace, "improve", lambda *a: calls.append(a) or improve(*a))
    before = torch.get_rng_state()
    found = top_singular_values(matrix, COUNT, generator())
    assert calls and torch.equal(torch.get_rng_state(), before)
    assert found.shape == (COUNT,) and found.dtype == torch.float32 and (found.diff() <= 0).all()
    assert ((found - exact).abs() / exact).max() <= 0.01
    torch.manual_seed(99)
    assert torch.equal(top_singular_values(matrix, COUNT, generator()), found)


@pytest.mark.parametrize(
    ("shape", "count"),
    [((5, 9), 3), ((256, 300), 16), ((300, 20), 20), ((11, 7), 7), ((300, 270), 130)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_small_matrices_and_large_counts_are_exact(shape, count, dtype):
    matrix = torch.randn(shape, generator=generator()).to(dtype)
    draw = generator()
    before = draw.get_state()
    found = top_singular_values(matrix, count, draw)
    torch.testing.assert_close(found, torch.linalg.svdvals(matrix.float())[:count])
    assert found.dtype == torch.float32 and torch.equal(draw.get_state(), before)


@pytest.mark.parametrize(
    ("sigma", "share", "rank"),
    [([4.0, 2.0, 1.0], 0.5, 1), ([4.0, 2.0, 1.0], 0.77, 2), ([4.0, 2.0, 1.0], 20 / 21, 2), ([4.0, 2.0, 1.0], 0.96, 3),
     ([4.0, 2.0, 1.0], 1.0, 3), ([1.0, 1.0, 1.0, 1.0], 0.5, 2), ([3.0], 1.0, 1), ([0.0, 0.0], 0.5, 1)],
)  # fmt: skip
def test_rank_for_energy(sigma, share, rank):
    weight = torch.zeros(7, 5)
    weight.diagonal()[: len(sigma)] = torch.tensor(sigma)
    assert rank_for_energy(torch.tensor(sigma), weight, share) == rank


def test_the_energy_is_that_of_the_whole_weight():
    """The share counts what lies beyond the computed values too; where the cap cannot reach it, the cap is taken."""
    weight = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    assert rank_for_energy(torch.tensor([4.0, 2.0]), weight, 0.78) == 2  # sigma_1 has 16/21 of the whole, 16/20 of the two
    assert rank_for_energy(torch.tensor([4.0, 2.0]), weight, 0.96) == 2
    assert rank_for_energy(torch.tensor([4.0]), weight, 0.5) == 1
