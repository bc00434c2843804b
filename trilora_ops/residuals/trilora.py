"""TriLoRA: R = s * U * C * Vt with all three factors trained (Feng et al., section 3.3, eq. 5; general C from Figure 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LayerShape
from ..errors import TriLoRAError
from ..singular_values import rank_for_energy, top_singular_values
from .lora import check_rank_and_alpha
from .low_rank import FixedLowRank, LowRankResidual, check_rank

CORES = ("diagonal", "full")
SIGMA_INITS = ("svd_relative", "svd", "ones")


@dataclass(frozen=True)
class TriLoraConfig:
    """Options of one TriLoRA layer.

    rank: r1 >= 1, the rows of Vt. rank_out: r2, the columns of U; 0 means r1; only `core="full"` allows r2 != r1.
    alpha: numerator of s = alpha / min(r1, r2); 0 means s = 1.
    core: "diagonal" (C = diag(sigma), eq. 5) or "full" (C is r2 x r1, Figure 1).
    sigma_init: C starts from W0's top singular values: "svd" as they are, "svd_relative" divided by the largest, or
        "ones", which a weight of zeros gets in any case. All three leave R = 0 at the start, since Vt is zero; they set how fast the first steps move.
    energy: 0 uses `rank` everywhere; a share in (0, 1] takes per layer the smallest r with
        sum(sigma_1..r ^2) >= energy * |W0|^2, `rank` being the cap ("Compact SVD determines the number of features").
    orthogonality: weight of the penalty |UtU - I|^2 + |VVt - I|^2 (the paper enforces none: 0).
    """

    kind: ClassVar[str] = "trilora"
    TENSORS: ClassVar[tuple[str, ...]] = ("up", "down", "scale")
    SIZE: ClassVar[str | None] = "rank"
    rank: int = 16
    alpha: float = 0.0
    core: str = "diagonal"
    rank_out: int = 0
    sigma_init: str = "svd_relative"
    energy: float = 0.0
    orthogonality: float = 0.0

    def __post_init__(self):
        check_rank_and_alpha(self.rank, self.alpha)
        for field, value, allowed in (("core", self.core, CORES), ("sigma_init", self.sigma_init, SIGMA_INITS)):
            if value not in allowed:
                raise TriLoRAError(f"{field}={value!r}: choose one of {', '.join(allowed)}")
        if self.rank_out < 0:
            raise TriLoRAError(f"rank_out={self.rank_out}: use 0 (same as rank) or a rank of 1 or more")
        if self.core == "diagonal" and self.rank_out not in (0, self.rank):
            raise TriLoRAError(
                f"rank_out={self.rank_out} with rank={self.rank}: a diagonal core is square; set rank_out to 0 or core to full"
            )
        if not 0 <= self.energy <= 1:
            raise TriLoRAError(f"energy={self.energy}: a share between 0 (fixed rank) and 1")
        if not self.orthogonality >= 0:
            raise TriLoRAError(f"orthogonality={self.orthogonality}: a weight of 0 or more")

    @classmethod
    def read(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "FixedLowRank | None":
        """What a file's tensors make on a layer of this shape; None where they are another kind's."""
        return FixedLowRank.from_tensors(shape, tensors)

    def build(self, shape: LayerShape, weight: Tensor, generator: torch.Generator) -> "TriLoraResidual":
        """U ~ N(0, 1/r2^2), Vt = 0, C from W0's spectrum, so R = 0 exactly.

        weight: W0, (out, in, *kernel), any dtype. Raises TriLoRAError for a rank above the layer's.
        """
        rank = check_rank(self.rank, shape)
        rank_out = check_rank(self.rank_out or self.rank, shape, "rank_out")
        sigma = None
        if self.energy > 0 or self.sigma_init != "ones":
            flat = weight.reshape(shape.out, -1)
            sigma = top_singular_values(flat, min(rank, rank_out), generator)
            if self.energy > 0:
                rank = rank_for_energy(sigma, flat, self.energy)
                rank_out = min(rank_out, rank) if self.core == "full" else rank
        smallest = min(rank, rank_out)
        start = torch.ones(smallest)
        if self.sigma_init != "ones":
            start = sigma[:smallest].cpu()
            if start[0] == 0:  # a zero weight: with C = 0 beside Vt = 0 no factor would ever get a gradient
                start = torch.ones(smallest)
            elif self.sigma_init == "svd_relative":
                start = start / start[0]
        core = start
        if self.core == "full":
            core = torch.zeros(rank_out, rank)
            core.diagonal()[:] = start
        up = torch.empty(shape.out, rank_out).normal_(0.0, 1.0 / rank_out, generator=generator)
        scale = (self.alpha or smallest) / smallest
        return TriLoraResidual(shape, up, core, torch.zeros(rank, shape.columns), scale, self.orthogonality)


class TriLoraResidual(LowRankResidual):
    """R = s * U * C * Vt; U: (out, r2), C: (r,) diagonal or (r2, r1), Vt: (r1, columns)."""

    # decay pulls sigma to zero and with it the gradients of both other factors
    NO_DECAY: ClassVar[tuple[str, ...]] = ("C",)

    def __init__(self, shape: LayerShape, U: Tensor, C: Tensor, Vt: Tensor, scale: float, orthogonality: float = 0.0):
        super().__init__(shape)
        self.U, self.C, self.Vt = nn.Parameter(U), nn.Parameter(C), nn.Parameter(Vt)
        self.scale, self.orthogonality = scale, orthogonality

    def factors(self) -> tuple[Tensor, Tensor]:
        """(s * U * C, Vt): the core is folded into U, which is smaller than the activations it would meet."""
        up = self.U * (self.C * self.scale) if self.C.ndim == 1 else self.U @ (self.C * self.scale)
        return up, self.Vt

    def penalty(self) -> Tensor:
        """orthogonality * (|UtU - I|_F^2 + |Vt V - I|_F^2), fp32 scalar."""
        if not self.orthogonality:
            return super().penalty()
        left = self.U.t() @ self.U - torch.eye(self.U.shape[1], device=self.U.device)
        right = self.Vt @ self.Vt.t() - torch.eye(self.Vt.shape[0], device=self.Vt.device)
        return self.orthogonality * (left.square().sum() + right.square().sum())
