"""In which order samples are seen: shuffled epochs of batches whose members can share a forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from .host import Sample


def batches(samples: Sequence[Sample], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of indices; every epoch shows each sample `repeats` times, in a new order.

    A batch holds samples of one signature (latent size and kind of conditions); the last of a signature may be smaller.
    """
    groups: dict[object, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.signature] += [index] * sample.repeats
    while True:
        epoch = []
        for members in groups.values():
            order = [members[i] for i in torch.randperm(len(members), generator=generator)]
            epoch += [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        for i in torch.randperm(len(epoch), generator=generator):
            yield epoch[i]


def by_signature(samples: Sequence[Sample]) -> list[list[int]]:
    """Positions of `samples` grouped by signature, in order of first appearance."""
    groups: dict[object, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        groups[sample.signature].append(position)
    return list(groups.values())
