"""Tensor-ring matrix: a full-rank T from small cores (TLoRA, arXiv:2501.08727).

    T[i1..iD, j1..jD] = tr(A1[i1, j1] A2[i2, j2] ... AD[iD, jD]),  Ad: (Jd, Jd, R, R)

For R = 1 it is the Kronecker product A1 x A2 x A3. Indices are C-ordered: i1 is the slowest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LayerShape
from ..errors import TriLoRAError
from ..tensorisation import check_factors, factorise, numbered_cores
from .channels import ChannelTransform

INITS = ("auto", "paper", "asym")
_ASYM_STD = 0.1


@dataclass(frozen=True)
class TensorRingConfig:
    """Options of one tensor-ring transform.

    ring_rank: R >= 1. factors: of the input size, empty = chosen from it (`tensorisation.factorise`).
    ring_init: "paper" (every slice I/R, Proposition 1), "asym" (an exact identity whose slices differ), or "auto" =
        paper for R = 1, else asym: with equal slices every gradient is equal too, and the ring stays a Kronecker product.
    identity_penalty: weight of sum_d |Ad - Ad at the start|_F^2, the squared form of the paper's R_I.
    orthogonal_penalty: weight of |T Tt - I|_F^2 / J.
    """

    kind: ClassVar[str] = "tensor_ring"
    TENSORS: ClassVar[tuple[str, ...]] = ("core#",)
    SIZE: ClassVar[str | None] = "ring_rank"
    ring_rank: int = 1
    factors: tuple[int, ...] = ()
    ring_init: str = "auto"
    identity_penalty: float = 0.0
    orthogonal_penalty: float = 0.0

    def __post_init__(self):
        if self.ring_rank < 1:
            raise TriLoRAError(f"ring_rank={self.ring_rank}: a ring has rank 1 or more; 1 or 2 are the published choices")
        if self.ring_init not in INITS:
            raise TriLoRAError(f"ring_init={self.ring_init!r}: choose one of {', '.join(INITS)}")
        for field in ("identity_penalty", "orthogonal_penalty"):
            if not getattr(self, field) >= 0:
                raise TriLoRAError(f"{field}={getattr(self, field)}: a weight of 0 or more")

    @classmethod
    def read(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "TensorRing | None":
        """What a file's tensors make on a layer of this shape; None where they are another kind's."""
        return TensorRing.from_tensors(shape, tensors)

    def build(self, shape: LayerShape, weight: Tensor, generator: torch.Generator) -> "TensorRing":
        """T = I, exactly but for R >= 3 with "paper" (fp32 rounding). Raises TriLoRAError for factors of another size."""
        factors = check_factors(self.factors, shape.inp, "input") if self.factors else factorise(shape.inp)
        init = ("paper" if self.ring_rank == 1 else "asym") if self.ring_init == "auto" else self.ring_init
        cores = paper_cores(factors, self.ring_rank) if init == "paper" else asym_cores(factors, self.ring_rank, generator)
        return TensorRing(shape, cores, self.identity_penalty, self.orthogonal_penalty)


class TensorRing(ChannelTransform):
    """T as a ring of cores (Jd, Jd, R, R), fp32; the full matrix is never formed."""

    # decay pulls T to zero, not to I
    NO_DECAY: ClassVar[tuple[str, ...]]

    def __init__(self, shape: LayerShape, cores: list[Tensor], identity_penalty: float = 0.0, orthogonal_penalty: float = 0.0):
        super().__init__(shape)
        for d, core in enumerate(cores):
            self.register_parameter(f"core{d}", nn.Parameter(core))
            self.register_buffer(f"start{d}", core.clone(), persistent=False)
        self.count = len(cores)
        self.NO_DECAY = tuple(f"core{d}" for d in range(self.count))
        self.identity_penalty, self.orthogonal_penalty = identity_penalty, orthogonal_penalty

    @property
    def cores(self) -> list[Tensor]:
        """The trained cores in ring order."""
        return [getattr(self, f"core{d}") for d in range(self.count)]

    @classmethod
    def from_tensors(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "TensorRing | None":
        """The transform of a file, or None where these are another kind's. Raises TriLoRAError for cores that form no ring."""
        cores = numbered_cores(tensors)
        if cores is None:
            return None
        for d, core in enumerate(cores):
            if core.ndim != 4 or core.shape[0] != core.shape[1] or tuple(core.shape[2:]) != tuple(cores[0].shape[2:]) or core.shape[2] != core.shape[3]:
                raise TriLoRAError(f"transform.core{d} is {tuple(core.shape)}, expected (J, J, R, R) with one R for all cores; the file is broken")
        check_factors(tuple(core.shape[0] for core in cores), shape.inp, "input")
        return cls(shape, cores)

    def rows(self, x: Tensor, transposed: bool = False) -> Tensor:
        """T x (or Tt x) for every row of x, (n, J) -> (n, J)."""
        cores = [core.transpose(0, 1) for core in self.cores] if transposed else self.cores
        return ring_product(cores, x)

    def penalty(self) -> Tensor:
        """Weighted sum of both regularisers, fp32 scalar."""
        total = super().penalty()
        if self.identity_penalty:
            total = total + self.identity_penalty * sum((getattr(self, f"core{d}") - getattr(self, f"start{d}")).square().sum()
                                                        for d in range(self.count))
        if self.orthogonal_penalty:
            eye = torch.eye(self.shape.inp, device=self.core0.device)
            total = total + self.orthogonal_penalty * (self.rows(self.rows(eye), transposed=True) - eye).square().sum() / len(eye)
        return total


def ring_product(cores: list[Tensor], x: Tensor) -> Tensor:
    """y[i1..iD] = sum_j tr(A1[i1,j1] .. AD[iD,jD]) x[j1..jD], one mode at a time.

    cores: (Jd, Jd, R, R); x: (n, J) -> (n, J). Costs J * sum(Jd) products a row for R = 1.
    """
    n, R, last = x.shape[0], cores[0].shape[2], cores[-1]
    if R == 1:
        return _kronecker_product([core[:, :, 0, 0] for core in cores], x)
    if len(cores) == 1:  # a ring of one closes on itself
        return x @ last.diagonal(dim1=2, dim2=3).sum(-1).t()
    # With the rows of x laid last every mode is a product of a small matrix with long contiguous ones. y's axes: what is
    # done (i1, then p, the ring's other open end, then i2 ..), this core's left rank q, what is left (.., n)
    first, left = cores[0], x.shape[1] // cores[0].shape[0]
    y = first.permute(0, 2, 3, 1).reshape(-1, len(first)) @ x.t().reshape(len(first), -1)  # (i1 p q, j1) x (j1, rest)
    done = len(first) * R
    for core in cores[1:-1]:
        left //= len(core)
        mode = core.permute(0, 3, 2, 1).reshape(len(core) * R, -1)  # (i s, q j)
        y = torch.matmul(mode, y.reshape(done, R * len(core), left * n))
        done *= len(core)
    y = y.reshape(len(first), R, -1, R * len(last), n)  # i1, p, i2 .., (s j), n
    modes = last.permute(3, 0, 2, 1).reshape(R, len(last), -1)  # p, i, (s j)
    y = sum(torch.matmul(modes[p], y[:, p]) for p in range(R))
    return y.reshape(-1, n).t().contiguous()  # another memory order would make the layer round differently, and T = I inexact


def _kronecker_product(factors: list[Tensor], x: Tensor) -> Tensor:
    # from the last mode, which is contiguous, to the first: no axis is ever moved
    y, inner = x, 1
    for A in reversed(factors):
        y = y.reshape(-1, len(A)) @ A.t() if inner == 1 else torch.matmul(A, y.reshape(-1, len(A), inner))
        inner *= len(A)
    return y.reshape(x.shape)


def paper_cores(factors: tuple[int, ...], rank: int) -> list[Tensor]:
    """Ad[:, :, r, r'] = I / R for all slices (Proposition 1): T = I."""
    return [(torch.eye(size) / rank)[:, :, None, None].repeat(1, 1, rank, rank) for size in factors]


def asym_cores(factors: tuple[int, ...], rank: int, generator: torch.Generator) -> list[Tensor]:
    """T = I exactly, with slices that differ, so that training can leave rank 1.

    The (0, 0) slices are I and carry the identity. A1 has nothing else, so the trace only sees row 0 of what follows;
    later cores have zeros in the rest of row 0 and noise in the other rows.
    """
    cores = []
    for d, size in enumerate(factors):
        core = torch.zeros(size, size, rank, rank)
        core[:, :, 0, 0] = torch.eye(size)
        if d > 0 and rank > 1:
            core[:, :, 1:, :] = torch.empty(size, size, rank - 1, rank).normal_(0.0, _ASYM_STD, generator=generator)
        cores.append(core)
    return cores
