"""Adapters from a difference of weights: truncated SVD, and least-squares fits of any registered pair W0 (T - I) + R.

Converting one method into another is the same thing: the difference is then what the first adapter does to a base.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .adapter import Adapter, LayerShape
from .factors import LowRank, canonicalise
from .registry import Method
from .residuals.low_rank import FixedLowRank
from .singular_values import Subspace, rank_for_energy, truncated_svd
from .transforms.none import NoTransform

_CHUNK = 8  # L-BFGS iterations between two looks at the error
_GAIN = 1e-3  # a chunk that lowers the error by a smaller share is the last
_CHUNKS = 15
_ALONE = 3  # chunks over the transform alone
_ROUNDING = 1e-5  # relative error below which fp32 products tell no better from worse


def extract_low_rank(delta: Tensor, rank: int, generator: torch.Generator, energy: float = 0.0) -> tuple[LowRank, float]:
    """(R in canonical form, |delta - R|_F / |delta|_F): the best approximation of that rank (Eckart-Young).

    delta: (out, columns), not zero; rank >= 1, more than the matrix has means all of it. energy in (0, 1]: the smallest
    rank whose R holds that share of |delta|_F^2, at most `rank`; 0 = `rank` itself. The error is the dense one.
    """
    delta = delta.float()
    U, sigma, Vt = truncated_svd(delta, rank, generator)
    keep = rank_for_energy(sigma, delta, energy) if energy else len(sigma)
    pair = canonicalise(LowRank(U[:, :keep] * sigma[:keep], Vt[:keep]))
    return pair, relative_error(delta, pair)


def relative_error(delta: Tensor, pair: LowRank) -> float:
    """|delta - R|_F / |delta|_F, with |delta|_F > 0."""
    return float(torch.addmm(delta.float(), pair.up, pair.down, alpha=-pair.scale).norm() / delta.norm())


def fit_transform(weight: Tensor, delta: Tensor, method: Method, generator: torch.Generator, energy: float = 0.0,
                  check: Callable[[], None] = lambda: None) -> tuple[Adapter, float]:
    """(adapter, relative error) that makes |W0 (T - I) + R - delta|_F small, for any registered pair.

    weight: W0, (out, in, *kernel); delta: (out, columns), not zero; energy: as in `extract_low_rank`, for the rank of a
    low-rank residual; check: called between stages, may raise to stop. L-BFGS over the pair's own parameters from the
    pair's own start, T = I. A low-rank residual is not iterated over: for every T the best R is known, the truncated SVD
    of what T leaves, and its gradient is that of a fixed R. So the result is never worse than the plain SVD of
    `delta`. The problem is not convex: what is found need not be the best there is.
    """
    shape = LayerShape(weight.shape[0], weight.shape[1], tuple(weight.shape[2:]))
    flat = weight.reshape(shape.out, -1).float()
    rank = low_rank_of(method.residual)
    transform = method.transform.build(shape, weight, generator).to(weight.device)
    if rank:
        return _fit_beside_svd(shape, transform, flat, delta, rank, generator, energy, check)
    residual = method.residual.build(shape, weight, generator).to(weight.device)
    adapter = Adapter(shape, transform, residual)
    error = _minimise(lambda: adapter.delta(flat) - delta, list(adapter.parameters()), delta.norm(), check, _CHUNKS)
    return adapter, error


def extract_adapter(weight: Tensor, delta: Tensor, method: Method, generator: torch.Generator, energy: float = 0.0,
                    check: Callable[[], None] = lambda: None) -> tuple[Adapter, float]:
    """(adapter, relative error) of a layer by whichever way suits the method: SVD without a transform, else a fit.

    Arguments as in `fit_transform`.
    """
    if method.transform.kind != "none":
        return fit_transform(weight, delta, method, generator, energy, check)
    shape = LayerShape(weight.shape[0], weight.shape[1], tuple(weight.shape[2:]))
    # a structured residual is saved as a plain pair of its rank: the best pair of that rank takes its place
    rank = low_rank_of(method.residual) or method.residual.build(shape, weight, generator).rank
    pair, error = extract_low_rank(delta, rank, generator, energy)
    return Adapter(shape, NoTransform(), FixedLowRank(shape, pair)), error


def low_rank_of(residual) -> int:
    """The rank of a residual's configuration where its files can hold any pair of that rank, else 0."""
    if residual.TENSORS != ("up", "down", "scale") or not hasattr(residual, "rank"):
        return 0
    return min(residual.rank, getattr(residual, "rank_out", 0) or residual.rank)


def _fit_beside_svd(shape, transform, flat, delta, rank, generator, energy, check) -> tuple[Adapter, float]:
    parameters, size = list(transform.parameters()), delta.norm()
    best, error = extract_low_rank(delta, rank, generator, energy)
    start = [parameter.detach().clone() for parameter in parameters]

    def left() -> Tensor:
        return delta - transform.delta(flat)

    @torch.no_grad()
    def residual_error() -> tuple[LowRank, float]:
        matrix = left()
        if not matrix.any():
            return LowRank(torch.zeros_like(best.up), best.down, 1.0), 0.0
        pair, missed = extract_low_rank(matrix, best.rank, generator)
        return pair, missed * float(matrix.norm() / size)

    # where T does most of the work, the first R is mostly wrong and hard to leave: of two starts the better one
    _minimise(left, parameters, size, check, _ALONE)
    if residual_error()[1] >= error:
        _write(parameters, start)
    subspace = Subspace(delta, best.rank, generator)
    with torch.no_grad():
        for _ in range(3):
            subspace.improve(left())

    def misfit() -> Tensor:
        matrix = left()
        with torch.no_grad():
            U, sigma, Vt = subspace.improve(matrix)
        return torch.addmm(matrix, U * sigma, Vt, alpha=-1)

    _minimise(misfit, parameters, size, check, _CHUNKS)
    pair, fitted = residual_error()
    if fitted < error:
        best, error = pair, fitted
    else:
        _write(parameters, start)
    return Adapter(shape, transform, FixedLowRank(shape, best)), error


@torch.no_grad()
def _write(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _minimise(misfit: Callable[[], Tensor], parameters: list[Tensor], size: Tensor, check: Callable[[], None], chunks: int) -> float:
    """The relative error |misfit| / size that L-BFGS reaches; stops where a chunk of iterations no longer helps."""
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()  # the optimizer writes through flat views
    optimizer = torch.optim.LBFGS(parameters, max_iter=_CHUNK, history_size=20, line_search_fn="strong_wolfe",
                                  tolerance_grad=0.0, tolerance_change=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (misfit() / size).square().sum()
        loss.backward()
        if loss < _ROUNDING**2:
            raise _Reached
        return loss

    error = float("inf")
    with torch.enable_grad():
        for _ in range(chunks):
            check()
            before, kept = error, [parameter.detach().clone() for parameter in parameters]
            try:
                optimizer.step(closure)
                error = float(misfit().detach().norm() / size)
            except _Reached:
                return float(misfit().detach().norm() / size)
            except torch.linalg.LinAlgError:  # a step to infinity
                error = float("nan")
            if not error < before:
                _write(parameters, kept)
                return float(misfit().detach().norm() / size)
            if not error < before * (1 - _GAIN):
                break
    return error


class _Reached(Exception):
    """The error is down to rounding."""
