"""What a run's own numbers say against it, in sentences with what to change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch

from ..trilora_ops.adapter import Adapter
from ..trilora_ops.factors import LowRank
from ..trilora_ops.files.numbers import LIMIT
from .config import TrainingConfig
from .loop import Progress

_WORSE = 0.01  # a rise of the loss by a smaller share is no reason to speak
_FORGOTTEN = 0.1  # of the regularisation set's, which rises a little in every run
_NOTHING = 1e-5  # of the loss, in every draw
_SKIPPED = 0.05  # share of steps
_ROWS = 64  # of a product that are formed at once
_BLOCKS = 8  # named in one sentence


@torch.no_grad()
def diverged(adapters: Mapping[str, Adapter], config: TrainingConfig) -> str | None:
    """A sentence about adapters with values that no file and no model can take; None where there are none."""
    broken = [key for key, adapter in adapters.items() if not _is_usable(adapter)]
    if not broken:
        return None
    return (
        f"the training has diverged: {len(broken)} of {len(adapters)} layers hold NaN, infinite values, or a change beyond "
        f"{LIMIT:g}, which fp16 cannot hold ({broken[0]}); lower learning_rate (it was {config.learning_rate:g}), for example to a tenth"
    )


def _is_usable(adapter: Adapter) -> bool:
    if not all(bool(torch.isfinite(p).all()) for p in adapter.parameters()):
        return False
    pair = adapter.residual.low_rank()
    return pair is None or _largest(pair) <= LIMIT


def _largest(pair: LowRank) -> float:
    """At least max |scale * up @ down|; exact where the product of norms is beyond the limit. NaN where it overflows."""
    bound = float(pair.up.norm(dim=1).max() * pair.down.norm(dim=0).max()) * abs(pair.scale)
    if bound <= LIMIT:
        return bound
    largest = torch.stack([(rows @ pair.down).abs().max() for rows in pair.up.split(_ROWS)])
    return float(largest.max()) * abs(pair.scale)


@torch.no_grad()
def moves(adapter: Adapter) -> bool:
    """Whether T x + R x differs from x, for an x drawn at random: exactly, in fp32."""
    shape = adapter.shape
    device = next((p.device for p in adapter.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, shape.inp, *(1 for _ in shape.kernel)), generator=generator).to(device)
    if not torch.allclose(adapter.transform.act(x), x, rtol=1e-6, atol=1e-6):
        return True
    pair = adapter.residual.low_rank()
    if pair is None:
        return False
    probe = torch.randn((shape.columns,), generator=generator).to(device)
    return bool((pair.up @ (pair.down @ probe)).any())


def unmoved(adapters: Mapping[str, Adapter], block_of: Callable[[str], str]) -> str | None:
    """A sentence about the adapters that are as they were at the start; None where all have moved.

    block_of: target key -> the name of the block that it lies in.
    """
    still = [key for key, adapter in adapters.items() if not moves(adapter)]
    if not still:
        return None
    if len(still) == len(adapters):
        return (
            f"the adapter did not move: none of its {len(still)} layers changed; raise learning_rate or steps, and "
            "look whether a node before this one changes how the model computes"
        )
    blocks = Counter(map(block_of, still))
    named = [f"{block} ({count})" for block, count in list(blocks.items())[:_BLOCKS]]
    more = f" and {len(blocks) - _BLOCKS} more blocks" if len(blocks) > _BLOCKS else ""
    return (
        f"{len(still)} of {len(adapters)} layers never moved: {', '.join(named)}{more}; no gradient reaches them, so leave "
        "them out with a Block Plan, or take what changes the attention of this model off it"
    )


def judge(
    adapters: Mapping[str, Adapter],
    block_of: Callable[[str], str],
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    progress: Progress,
    config: TrainingConfig,
) -> list[str]:
    """All that speaks against a run; arguments as of `unmoved` and `doubts`."""
    still, found = unmoved(adapters, block_of), doubts(before, after, progress, config)
    if still is None:
        return found
    return [still, *(text for text in found if "next to nothing" not in text)]


def doubts(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], progress: Progress, config: TrainingConfig
) -> list[str]:
    """Sentences about losses and skipped steps.

    before, after: losses on fixed noise, draw by draw, of the data and, where there is one, of the regularisation set.
    """
    found = []
    if not all(math.isfinite(_mean(losses)) for losses in after):
        found.append(
            "the loss is not a number after the last step, so the adapter is of no use; lower learning_rate, or set precision to bf16"
        )
    elif _rose(before[0], after[0], _WORSE):
        found.append(
            f"the training made it worse: loss on fixed noise {_mean(before[0]):.4f} before, {_mean(after[0]):.4f} after; lower "
            f"learning_rate (it was {config.learning_rate:g}), for example to a tenth"
        )
    elif all(abs(b - a) <= _NOTHING * _mean(before[0]) for a, b in zip(before[0], after[0], strict=True)):
        found.append(
            f"the training changed next to nothing: loss on fixed noise {_mean(before[0]):.6f} before, {_mean(after[0]):.6f} after; "
            f"raise learning_rate (it was {config.learning_rate:g}) or steps"
        )
    elif len(before) > 1 and _rose(before[1], after[1], _FORGOTTEN):
        found.append(
            f"the model has forgotten something of what it shall keep: loss of the regularisation set {_mean(before[1]):.4f} before, "
            f"{_mean(after[1]):.4f} after; raise prior_weight (it was {config.prior_weight:g})"
        )
    if progress.skipped > _SKIPPED * progress.done:
        found.append(
            f"{progress.skipped} of {progress.done} steps were skipped, because loss or gradient was not finite; lower "
            "learning_rate, or set precision to bf16"
        )
    return found


def _rose(before: Sequence[float], after: Sequence[float], share: float) -> bool:
    """Whether the mean is higher by more than this share of it, and by more than the draws' own scatter explains."""
    rise = [b - a for a, b in zip(before, after, strict=True)]
    return _mean(rise) > max(share * _mean(before), 2 * _error(rise))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    mean, count = _mean(values), len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, count - 1) / count)
