"""Training sizes: every image keeps its aspect ratio at about the same area, in steps the model can take."""

from __future__ import annotations

import math

STEP = 64  # pixels: 8 of the autoencoder times 8 of a U-Net's three halvings


def bucket_size(width: int, height: int, resolution: int, step: int = STEP) -> tuple[int, int]:
    """(width, height) in pixels nearest to the image's aspect ratio with an area of at most resolution^2.

    Both are multiples of `step` and at least `step`; of the sizes that fit the largest with the nearest ratio wins. An
    upright image gets the size of the same image lying, turned.
    """
    if height > width:
        return bucket_size(height, width, resolution, step)[::-1]
    ratio = width / height
    ideal = math.sqrt(resolution * resolution * ratio)
    best = None
    for w in {max(step, math.floor(ideal / step) * step), max(step, math.ceil(ideal / step) * step)}:
        h = max(step, round(w / ratio / step) * step)
        while w * h > resolution * resolution and h > step:
            h -= step
        if w * h > resolution * resolution and w > step:
            continue
        score = (abs(math.log(w / h / ratio)), -w * h)
        if best is None or score < best[0]:
            best = (score, (w, h))
    return best[1] if best else (step, step)


def crop_loss(width: int, height: int, bucket: tuple[int, int]) -> float:
    """Share of the image that is cut away when it is scaled to cover `bucket` and cropped at the centre, in [0, 1)."""
    scale = max(bucket[0] / width, bucket[1] / height)
    return 1.0 - bucket[0] * bucket[1] / (width * scale * height * scale)
