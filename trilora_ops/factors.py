"""Tools on a pair of thin factors: canonical form, spectrum, truncation. Nothing of the layer's full size is formed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import TriLoRAError


@dataclass(frozen=True)
class LowRank:
    """R = scale * up * down; up: (out, r), down: (r, columns), scale unitless (alpha / r of a file)."""

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """The file's alpha = rank * scale."""
        return self.rank * self.scale

    def dense(self) -> Tensor:
        """R, (out, columns), fp32: for tests and reports, not for merging."""
        return self.scale * (self.up.float() @ self.down.float())

    def cpu(self) -> "LowRank":
        """Both factors on the CPU."""
        return replace(self, up=self.up.cpu(), down=self.down.cpu())


def canonicalise(pair: LowRank) -> LowRank:
    """The same product in SVD canonical form: R = c * (U diag(sigma) / c) * Vt.

    QR of both thin factors, SVD of the small core (in fp64), so R is kept to fp32 rounding. In the result the rows of
    `down` = Vt are orthonormal, sigma falls, the largest entry of every row of Vt is positive, and the scale c is the
    power of two nearest sigma_1 (1 for R = 0): without it fp16 would lose the weak directions. The rank is
    min(r, out, columns).
    """
    left, left_core = torch.linalg.qr(pair.up.double())
    right, right_core = torch.linalg.qr(pair.down.double().t())
    U, sigma, Vt = torch.linalg.svd(pair.scale * left_core @ right_core.t(), full_matrices=False)
    U, Vt = left @ U, Vt @ right.t()
    largest = Vt.gather(1, Vt.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    scale = _power_of_two(float(sigma[0]))
    return LowRank((U * sign.t() * sigma / scale).float(), (Vt * sign).float(), scale)


def spectrum(pair: LowRank) -> Tensor:
    """Singular values of R in canonical form: the column norms of up times the scale, (r,), falling."""
    return pair.up.float().norm(dim=0) * pair.scale


def is_canonical(pair: LowRank, tolerance: float = 1e-3) -> bool:
    """Whether `pair` has orthonormal rows in `down`, falling sigma and a power-of-two scale, to a dtype's rounding."""
    down = pair.down.float()
    gram = down @ down.t() - torch.eye(pair.rank, device=down.device)
    norms = pair.up.float().norm(dim=0)
    falling = bool(torch.all(norms[1:] <= norms[:-1] * (1 + tolerance)))
    return falling and float(gram.abs().max()) <= tolerance * 8 and math.frexp(pair.scale)[0] == 0.5


def keep_rank(pair: LowRank, rank: int) -> LowRank:
    """The first `rank` directions of a canonical pair: the best approximation of that rank (Eckart-Young).

    The scale stays c, so a file's alpha becomes rank * c. rank >= the pair's rank returns the pair.
    """
    if rank < 1:
        raise TriLoRAError(f"keep_rank={rank}: keep at least 1 direction")
    return replace(pair, up=pair.up[:, :rank], down=pair.down[:rank])


def keep_energy(pair: LowRank, share: float) -> LowRank:
    """The fewest leading directions of a canonical pair with sum(sigma^2) >= share of the whole; share in (0, 1]."""
    if not 0 < share <= 1:
        raise TriLoRAError(f"keep_energy={share}: a share above 0 and at most 1")
    kept = spectrum(pair).double().square().cumsum(0)
    return keep_rank(pair, int(torch.searchsorted(kept, kept[-1] * share * (1 - 1e-12))) + 1)


def _power_of_two(value: float) -> float:
    return 2.0 ** round(math.log2(value)) if value > 0 else 1.0
