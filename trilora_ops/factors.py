"""Tools on a pair of thin factors: canonical form, spectrum, truncation, reweighting, sums. Nothing of the layer's full size is formed."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """Singular values of R in canonical form: the column norms of up times the scale's size, (r,), falling."""
    return pair.up.float().norm(dim=0) * abs(pair.scale)


def is_canonical(pair: LowRank, tolerance: float = 1e-3) -> bool:
    """Whether a prefix of `pair` is its best approximation: orthonormal rows in `down`, falling sigma, to a dtype's rounding."""
    down = pair.down.float()
    gram = down @ down.t() - torch.eye(pair.rank, device=down.device)
    norms = pair.up.float().norm(dim=0)
    falling = bool(torch.all(norms[1:] <= norms[:-1] * (1 + tolerance)))
    return falling and float(gram.abs().max()) <= tolerance * 8


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


def reweight(pair: LowRank, power: float = 1.0, cap: float = 0.0, gains: Sequence[float] | None = None) -> LowRank:
    """A canonical pair with another spectrum, sorted again: sigma' = g * min(sigma_1 (sigma / sigma_1)^power, cap sigma_1).

    power: 1 = as it is, below 1 lifts the weak directions, above 1 lowers them, sigma_1 stays; cap: largest share of
    sigma_1 that any direction keeps, in (0, 1], 0 = none; gains: factors of the first directions (the rest keep 1), where
    0 removes one and a negative one turns it round. Directions at fp32's rounding of sigma_1 are noise and stay as
    they are, so that a power below 1 lifts none of it. Raises TriLoRAError for a negative power or a cap outside [0, 1].
    """
    if not 0 <= power < math.inf:
        raise TriLoRAError(f"power={power}: an exponent of at least 0; 1 leaves the spectrum as it is")
    if not 0 <= cap <= 1:
        raise TriLoRAError(f"cap={cap}: a share of the strongest direction, above 0 and at most 1, or 0 for none")
    if not all(map(math.isfinite, gains or ())):
        raise TriLoRAError(f"gains={list(gains)}: finite factors; 1 leaves a direction as it is")
    if power == 1 and cap in (0, 1) and gains is None:
        return pair
    up = pair.up.double() * pair.scale
    sigma = up.norm(dim=0)
    share = sigma / sigma[0].clamp_min(torch.finfo(torch.float64).tiny)
    real = share > torch.finfo(torch.float32).eps
    wanted = torch.where(real, share.pow(power), share).clamp_max(cap if cap else 1.0)
    factor = torch.where(real, wanted / share, 1.0)
    for direction, gain in enumerate(list(gains or ())[: pair.rank]):
        factor[direction] *= gain
    order = (sigma * factor.abs()).argsort(descending=True, stable=True)
    up = (up * factor)[:, order]
    scale = _power_of_two(float(up[:, 0].norm()))
    return LowRank((up / scale).float(), pair.down[order].float(), scale)


def weighted_sum(parts: Sequence[tuple[LowRank, float]], rank: int | None = None) -> LowRank:
    """sum_i w_i R_i in canonical form, exact to fp32 rounding: the factors are concatenated and re-factored.

    parts: pairs of one (out, columns), each with its weight, which may be negative. The rank is
    min(sum r_i, out, columns); `rank` keeps that many directions, the best approximation of the sum.
    Raises TriLoRAError for no parts or parts of different shapes.
    """
    shapes = {(pair.up.shape[0], pair.down.shape[1]) for pair, _ in parts}
    if len(shapes) != 1:
        raise TriLoRAError(f"weighted_sum: its parts are {sorted(shapes) or 'none'}, expected one shape (out, columns); they belong to different layers")
    up = torch.cat([pair.up.double() * (pair.scale * weight) for pair, weight in parts], dim=1)
    total = canonicalise(LowRank(up, torch.cat([pair.down.double() for pair, _ in parts])))
    return total if rank is None else keep_rank(total, rank)


def fold_scale(pair: LowRank) -> LowRank:
    """The same product with scale 1, for files that hold no alpha, both factors balanced so that halves lose nothing.

    Every direction is scaled by a power of two of its own, up_i by 2^(e - a) and down_i by 2^a, until both have a
    norm near sqrt(sigma_i): exact for a scale that is a power of two (as in canonical form), else one rounding of up.
    """
    up, down = pair.up.double() * pair.scale, pair.down.double()
    ratio = up.norm(dim=0) / down.norm(dim=1)
    usable = torch.isfinite(ratio) & (ratio > 0)
    shift = torch.where(usable, ratio.where(usable, torch.ones_like(ratio)).log2().div(2).round().exp2(), 1.0)
    return LowRank((up / shift).float(), (down * shift[:, None]).float(), 1.0)


def _power_of_two(value: float) -> float:
    return 2.0 ** round(math.log2(value)) if value > 0 else 1.0
