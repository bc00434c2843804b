"""One alpha for all layers of a file.

Every layer could have its own: delta = alpha / rank * up * down. But diffusers takes the commonest alpha of a file in
kohya's keys for all of its attention layers (the keys of the others it builds for them name no module), and so scales
them wrongly wherever alphas differ; files of trainers have one alpha throughout, and there it is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from .factors import LowRank, spectrum

# largest column of any up: products of activations with up, which some tools scale afterwards, stay far from fp16's 65504,
# and what is 10^-4 of the file's largest singular value is still held to about 0.2 % in fp16
LARGEST = 64.0


def one_alpha(pairs: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The same products, all with one alpha = scale * rank; unchanged where they have one already.

    pairs: layer name -> canonical pair. alpha is the largest rank times a power of two, chosen so that the columns of
    `up` have norms of at most about LARGEST; for equal ranks the change is exact, else it rounds `up` once.
    """
    if len({pair.alpha for pair in pairs.values()}) < 2:
        return dict(pairs)
    sigma = max(float(spectrum(pair).max()) for pair in pairs.values())
    power = 2.0 ** round(math.log2(sigma)) if sigma else 1.0
    alpha = max(pair.rank for pair in pairs.values()) * power / LARGEST
    return {name: _with_scale(pair, alpha / pair.rank) for name, pair in pairs.items()}


def _with_scale(pair: LowRank, scale: float) -> LowRank:
    return replace(pair, up=(pair.up.double() * (pair.scale / scale)).float(), scale=scale)
