"""Leading singular values and directions: exact where that is cheap, elsewhere by randomised subspace iteration with a check.

Halko et al., arXiv:0909.4061. The estimates never exceed the true values and rise with every power iteration.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT_BELOW = 256  # smaller side up to which a full decomposition costs milliseconds
_OVERSAMPLE = 12
_VALUES = 0.01  # largest relative change of a value between two successive estimates
_DOUBLINGS = 5  # of the power iterations, before the full decomposition
_ERROR = 1e-3  # of the squared error: a power iteration that gains less is the last
_ITERATIONS = 24


class Subspace:
    """Leading directions of a matrix, kept between calls: of one that changes slowly a call follows the change."""

    def __init__(self, matrix: Tensor, rank: int, generator: torch.Generator):
        width = min(rank + _OVERSAMPLE, *matrix.shape)
        self.rank = min(rank, width)
        self.right = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)

    def improve(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(U, sigma, Vt) after one more power iteration on `matrix`; shapes as in `truncated_svd`."""
        left = torch.linalg.qr(matrix @ self.right).Q
        self.right, core = torch.linalg.qr(matrix.t() @ left)
        U, sigma, Vt = torch.linalg.svd(core.t())
        return left @ U[:, :self.rank], sigma[:self.rank], Vt[:self.rank] @ self.right.t()


def top_singular_values(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """sigma_1 >= ... >= sigma_count of `weight`.

    weight: (out, columns), any dtype; count <= min(out, columns) -> (count,) fp32 on the weight's device. Of large matrices
    within about a hundredth: power iterations are doubled until none of the values moves by more.
    """
    matrix = weight.detach().float()
    if not _is_exact(matrix, count):
        subspace, previous = Subspace(matrix, count, generator), None
        for iterations in (2**i for i in range(_DOUBLINGS)):
            for _ in range(max(1, iterations // 2)):
                _, sigma, _ = subspace.improve(matrix)
            if previous is not None and torch.all((sigma - previous).abs() <= _VALUES * sigma):
                return sigma
            previous = sigma
    return torch.linalg.svdvals(matrix)[:count]


def truncated_svd(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(U (out, r), sigma (r,) falling, Vt (r, columns)) of an fp32 matrix, r = min(rank, out, columns).

    Of large matrices power iterations are added until the error left, |M|_F^2 - sum sigma^2, falls by less than a thousandth
    of itself: what counts here is the approximation, which a few wrong directions at its end hardly change.
    """
    rank = min(rank, *matrix.shape)
    if not _is_exact(matrix, rank):
        subspace, whole, kept = Subspace(matrix, rank, generator), matrix.double().square().sum(), 0.0
        for _ in range(_ITERATIONS):
            U, sigma, Vt = subspace.improve(matrix)
            before, kept = kept, sigma.double().square().sum()
            if kept - before <= _ERROR * (whole - kept).clamp_min(0) + 1e-7 * kept:
                return U, sigma, Vt
    U, sigma, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank], sigma[:rank], Vt[:rank]


def rank_for_energy(sigma: Tensor, weight: Tensor, share: float) -> int:
    """Smallest r with sum(sigma_1..r ^2) >= share * |W0|_F^2, at most len(sigma).

    sigma: (cap,) leading singular values of weight; share in (0, 1] -> r in [1, cap].
    """
    kept = sigma.double().square().cumsum(0)
    wanted = share * weight.detach().double().square().sum()
    enough = torch.nonzero(kept >= wanted.to(kept) * (1 - 1e-6))
    return int(enough[0]) + 1 if len(enough) else len(sigma)


def _is_exact(matrix: Tensor, count: int) -> bool:
    smaller = min(matrix.shape)
    return smaller <= _EXACT_BELOW or count + _OVERSAMPLE >= smaller // 2
