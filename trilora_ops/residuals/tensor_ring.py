"""Tensor-ring residual (TLoRA, arXiv:2501.08727): R[i, j] = s * tr(B1[i1] .. BD[iD] C1[j1] .. CD[jD]).

The chains B and C multiply to (out, R^2) and (R^2, columns): the residual is a structured LoRA of rank R^2, and is used
and saved as one. A convolution's kernel axes are further cores on the input side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LayerShape
from ..errors import TriLoRAError
from ..tensorisation import check_factors, factorise, numbered_cores
from .low_rank import LowRankResidual

INITS = ("code", "mup")
SCALES = ("sqrt", "linear")


@dataclass(frozen=True)
class TensorRingResidualConfig:
    """Options of one tensor-ring residual.

    rank: R >= 1. alpha > 0 and scaling: s = alpha / sqrt(R) ("sqrt", as the authors' code does) or alpha / R ("linear").
    factors_out, factors_in: empty = chosen from the layer's sizes.
    init: the authors' code's standard deviations ("code": 1/sqrt(Jd) and sqrt(Id)/R^2) or the paper's muP rule
        ("mup": sqrt(n_out)/n_in = sqrt(R) / (size * R)). The first output core is zero in both, so R = 0.
    """

    kind: ClassVar[str] = "tensor_ring"
    TENSORS: ClassVar[tuple[str, ...]] = ("core#",)
    SIZE: ClassVar[str | None] = "rank"
    rank: int = 4
    alpha: float = 1.0
    scaling: str = "sqrt"
    init: str = "code"
    factors_out: tuple[int, ...] = ()
    factors_in: tuple[int, ...] = ()

    def __post_init__(self):
        if self.rank < 1:
            raise TriLoRAError(f"rank={self.rank}: a ring has rank 1 or more; 2 to 6 are the published choices")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise TriLoRAError(f"alpha={self.alpha}: a positive number; 1 is the published choice")
        for field, allowed in (("scaling", SCALES), ("init", INITS)):
            if getattr(self, field) not in allowed:
                raise TriLoRAError(f"{field}={getattr(self, field)!r}: choose one of {', '.join(allowed)}")

    @classmethod
    def read(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "TensorRingResidual | None":
        """What a file's tensors make on a layer of this shape; None where they are another kind's."""
        return TensorRingResidual.from_tensors(shape, tensors)

    def build(self, shape: LayerShape, weight: Tensor, generator: torch.Generator) -> "TensorRingResidual":
        """R = 0 exactly. Raises TriLoRAError for factors that do not multiply to the layer's sizes."""
        outs = check_factors(self.factors_out, shape.out, "output") if self.factors_out else factorise(shape.out)
        ins = check_factors(self.factors_in, shape.inp, "input") if self.factors_in else factorise(shape.inp)
        R = self.rank
        cores = []
        for position, size in enumerate((*outs, *ins, *shape.kernel)):
            out_side = position < len(outs)
            if self.init == "mup":
                std = math.sqrt(R) / (size * R)
            else:
                std = math.sqrt(size) / R**2 if out_side else 1 / math.sqrt(size)
            core = torch.zeros(size, R, R)
            cores.append(core if position == 0 else core.normal_(0.0, std, generator=generator))
        scale = self.alpha / (math.sqrt(R) if self.scaling == "sqrt" else R)
        return TensorRingResidual(shape, cores, len(outs), scale)


class TensorRingResidual(LowRankResidual):
    """Cores (size, R, R) in ring order: output factors, input factors, kernel axes."""

    def __init__(self, shape: LayerShape, cores: list[Tensor], out_cores: int, scale: float):
        super().__init__(shape)
        for d, core in enumerate(cores):
            self.register_parameter(f"core{d}", nn.Parameter(core))
        self.count, self.out_cores, self.scale = len(cores), out_cores, scale
        self.NO_DECAY = tuple(f"core{d}" for d in range(self.count))

    @classmethod
    def from_tensors(cls, shape: LayerShape, tensors: Mapping[str, Tensor]) -> "TensorRingResidual | None":
        """The residual of a file, or None where these are another kind's. Raises TriLoRAError for cores that form no ring."""
        cores = numbered_cores(tensors)
        if cores is None:
            return None
        for d, core in enumerate(cores):
            if core.ndim != 3 or tuple(core.shape[1:]) != (cores[0].shape[1],) * 2:
                raise TriLoRAError(f"residual.core{d} is {tuple(core.shape)}, expected (size, R, R) with one R for all cores; the file is broken")
        sizes, product, out_cores = [len(core) for core in cores], 1, 0
        while product < shape.out and out_cores < len(sizes):
            product, out_cores = product * sizes[out_cores], out_cores + 1
        out_cores = max(1, out_cores)
        if product != shape.out or out_cores == len(sizes) or math.prod(sizes[out_cores:]) != shape.columns:
            raise TriLoRAError(f"residual cores of sizes {'x'.join(map(str, sizes))} do not multiply to the layer's {shape.out} and {shape.columns}; they are another layer's")
        # a leading run of ones was the output side's padding: a chain may be cut after any core of size one
        return cls(shape, cores, out_cores, 1.0)

    def tensors(self) -> dict[str, Tensor]:
        """The cores, with the scale folded into the first."""
        cores = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return cores | {"core0": cores["core0"] * self.scale}

    def factors(self) -> tuple[Tensor, Tensor]:
        """(s * B (out, R^2), C (R^2, columns)): both chains multiplied out, which is small."""
        cores = [getattr(self, f"core{d}") for d in range(self.count)]
        left, right = chain(cores[:self.out_cores]), chain(cores[self.out_cores:])  # (out, R, R), (columns, R, R)
        return self.scale * left.flatten(1), right.transpose(1, 2).flatten(1).t()


def chain(cores: list[Tensor]) -> Tensor:
    """M[i1 .. iD] = A1[i1] A2[i2] .. AD[iD]: cores (size, R, R) -> (product of sizes, R, R), the first index slowest."""
    product = cores[0]
    for core in cores[1:]:
        product = torch.einsum("apq,bqr->abpr", product, core).flatten(0, 1)
    return product
