"""Learning-rate factors over a run."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine", "linear")


def rate_factor(step: int, steps: int, schedule: str, warmup: float) -> float:
    """Factor of the learning rate at `step` (0-based) of `steps`, in [0, 1].

    Rises linearly over the first warmup * steps steps, then stays ("constant") or falls to 0 at the end
    ("linear"; "cosine": half a cosine wave).
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = (step - rising) / max(1, steps - rising)
    if schedule == "constant":
        return 1.0
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
