"""Leading singular values of a frozen weight: exact where that is cheap, randomised with a check elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_BELOW = 256  # smaller side up to which a full decomposition costs milliseconds
OVERSAMPLE = 12
TOLERANCE = 0.01  # largest relative change of a value between two successive estimates


def top_singular_values(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """sigma_1 >= ... >= sigma_count of `weight`.

    weight: (out, columns), any dtype; count <= min(out, columns) -> (count,) fp32 on the weight's device.
    Large matrices use randomised subspace iteration (Halko et al., arXiv:0909.4061, through `torch.svd_lowrank`): the
    estimates never exceed the true values and rise with every power iteration, so iterations are added until none of
    them moves by more than `TOLERANCE`.
    """
    matrix = weight.detach().float()
    smaller = min(matrix.shape)
    if smaller <= EXACT_BELOW or count + OVERSAMPLE >= smaller // 2:
        return torch.linalg.svdvals(matrix)[:count]
    seed = int(torch.randint(0, 2**31 - 1, (1,), generator=generator, device=generator.device))
    previous = _randomised(matrix, count, 1, seed)
    for iterations in (2, 4, 8, 16):
        estimate = _randomised(matrix, count, iterations, seed)
        if torch.all((estimate - previous).abs() <= TOLERANCE * estimate):
            return estimate
        previous = estimate
    return torch.linalg.svdvals(matrix)[:count]


def rank_for_energy(sigma: Tensor, weight: Tensor, share: float) -> int:
    """Smallest r with sum(sigma_1..r ^2) >= share * |W0|_F^2, at most len(sigma).

    sigma: (cap,) leading singular values of weight; share in (0, 1] -> r in [1, cap].
    """
    kept = sigma.double().square().cumsum(0)
    wanted = share * weight.detach().double().square().sum()
    enough = torch.nonzero(kept >= wanted.to(kept) * (1 - 1e-6))
    return int(enough[0]) + 1 if len(enough) else len(sigma)


def _randomised(matrix: Tensor, count: int, iterations: int, seed: int) -> Tensor:
    # svd_lowrank draws from the global generator: fork it, so that the caller's stream and ours stay apart
    gpus = range(torch.cuda.device_count()) if matrix.device.type == "cuda" else ()
    with torch.random.fork_rng(devices=list(gpus)):
        # torch.manual_seed starts every GPU's stream anew: fine where all are forked, not for a matrix on the CPU
        (torch.manual_seed if gpus else torch.default_generator.manual_seed)(seed)
        return torch.svd_lowrank(matrix, q=count + OVERSAMPLE, niter=iterations)[1][:count]
