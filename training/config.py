"""How a run is done: one frozen, validated record."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ..trilora_ops.errors import TriLoRAError
from .schedule import SCHEDULES

TIMESTEPS = ("auto", "uniform", "logit_normal")
PRECISIONS = ("auto", "model", "bf16")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run.

    steps: optimizer steps. batch_size: samples a forward pass. accumulation: passes a step.
    learning_rate: of AdamW, at the schedule's top. schedule: "constant", "cosine" or "linear" (the last two end at 0).
    warmup: share of the steps over which the rate rises from 0. weight_decay: of AdamW, on factors but not on cores.
    grad_clip: largest global gradient norm, 0 = off.
    timesteps: how u is drawn: "uniform", "logit_normal" (sigmoid of a unit normal), or "auto" = logit_normal for flow
        models and uniform for the others. min_snr_gamma: cap of the signal-to-noise weight for eps and v models
        (`objective.loss_weight`), 0 = off. caption_dropout: share of samples trained with the empty prompt.
    seed: of every draw. checkpointing: recompute blocks in the backward pass (less memory, more time).
    prior_weight: w in loss = data + w * prior, where a regularisation set is given (DreamBooth, arXiv:2208.12242); 0 = off.
    precision: what the frozen model computes in; adapters, optimizer and loss are fp32 in any case. "model" is its own dtype,
        "bf16" is that, and "auto" is bf16 for fp32 models where the processor has instructions for it, else "model".
    """

    steps: int = 500
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    timesteps: str = "auto"
    min_snr_gamma: float = 5.0
    caption_dropout: float = 0.05
    seed: int = 0
    checkpointing: bool = False
    prior_weight: float = 1.0
    precision: str = "auto"

    def __post_init__(self):
        for field in ("steps", "batch_size", "accumulation"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise TriLoRAError(f"{field}={getattr(self, field)}: a whole number of 1 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise TriLoRAError(f"learning_rate={self.learning_rate}: a positive number; 1e-4 is a good start")
        for field in ("weight_decay", "grad_clip", "min_snr_gamma", "prior_weight"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) >= 0):
                raise TriLoRAError(f"{field}={getattr(self, field)}: a number of 0 (off) or more")
        for field in ("warmup", "caption_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise TriLoRAError(f"{field}={getattr(self, field)}: a share of at least 0 and below 1")
        for field, allowed in (("schedule", SCHEDULES), ("timesteps", TIMESTEPS), ("precision", PRECISIONS)):
            if getattr(self, field) not in allowed:
                raise TriLoRAError(f"{field}={getattr(self, field)!r}: choose one of {', '.join(allowed)}")

    def as_dict(self) -> dict:
        """Plain values, for metadata and reports."""
        return asdict(self)
