"""Picture Grid: several pictures with their labels as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy_api.latest import io
from torch import Tensor

from ..trilora_ops.errors import TriLoRAError
from . import compat

_PLACES = 9
_GAP = 0.02  # of a cell's width, between cells and around them
_TEXT = 0.055  # height of a label's letters, of a cell's width
_SMALLEST = 9  # pixels in which letters can be read


class PictureGridNode(io.ComfyNode):
    """Pixels are neither scaled nor cropped; what is smaller than its cell stands in the middle of it."""

    @classmethod
    def define_schema(cls):
        def place(number: int) -> io.Input:
            return io.Image.Input(f"picture_{number}", optional=number > 1,
                                  tooltip="A picture; of a batch all pictures, one after the other." if number == 1 else "One more picture or batch; leave out what you do not need.")

        return compat.Schema(
            node_id="TriLoRAPictureGrid",
            display_name="Picture Grid",
            category="TriLoRA/tools",
            description="Puts pictures side by side, row after row, each with its label above it: to compare adapters, strengths or blocks.",
            search_aliases=["image grid", "xy plot", "compare images", "contact sheet", "label images"],
            inputs=[
                *map(place, range(1, _PLACES + 1)),
                io.String.Input("labels", default="", multiline=True, placeholder="one line for each picture",
                                tooltip="One line for each picture, in their order; an empty line, or none, is a picture without a label."),
                io.Int.Input("columns", default=4, min=1, max=64, tooltip="Pictures in one row."),
            ],
            outputs=[io.Image.Output(display_name="picture", tooltip="All of them as one picture, for Save Image or Preview Image.")],
        )

    @classmethod
    def execute(cls, labels, columns, **places) -> io.NodeOutput:
        batches = [places[name] for name in sorted(places, key=lambda name: int(name.rpartition("_")[2])) if places[name] is not None]
        return io.NodeOutput(grid([picture for batch in batches for picture in batch], labels.splitlines(), columns)[None])


def grid(pictures: Sequence[Tensor], labels: Sequence[str], columns: int) -> Tensor:
    """Pictures (H, W, 3 or 4) in [0, 1] of any sizes -> one (H, W, 3), white between them, row by row.

    A cell is as large as the largest picture; a row is as much higher as its highest label, and not at all without one.
    Raises TriLoRAError for more labels than pictures.
    """
    if extra := " / ".join(labels[len(pictures):]).strip(" /"):
        raise TriLoRAError(f"labels: {len(labels)} lines for {len(pictures)} picture{'s' * (len(pictures) != 1)} ({extra!r} has none); write one line for each picture")
    labels = [*labels, *[""] * (len(pictures) - len(labels))]
    columns = min(columns, len(pictures))
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    gap = max(2, round(_GAP * width))
    drawn = [drawn_label(label.strip(), width) for label in labels]
    rows = []
    for start in range(0, len(pictures), columns):
        strip = max(label.shape[0] for label in drawn[start:start + columns])
        row = torch.ones((gap + strip + height, gap + columns * (width + gap), 3))
        for place, (picture, label) in enumerate(zip(pictures[start:start + columns], drawn[start:], strict=False)):
            left = gap + place * (width + gap)
            row[gap + strip - label.shape[0]:gap + strip, left:left + width] = label
            down, right = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
            row[gap + strip + down:gap + strip + down + picture.shape[0], left + right:left + right + picture.shape[1]] = picture[..., :3].float().cpu()
        rows.append(row)
    return torch.cat([*rows, torch.ones((gap, rows[0].shape[1], 3))])


def drawn_label(text: str, width: int) -> Tensor:
    """Black letters on white, (H, width, 3), in as many lines as it takes; H is 0 for no text."""
    if not text:
        return torch.ones((0, width, 3))
    from pathlib import Path

    import matplotlib
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    size = max(_SMALLEST, round(_TEXT * width))
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
    lines = wrapped(text, lambda line: font.getlength(line) <= width)
    line_height = round(1.3 * size)
    image = Image.new("RGB", (width, line_height * len(lines) + size // 3), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((width / 2, number * line_height), line, "black", font, anchor="ma")
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)


def wrapped(text: str, fits) -> list[str]:
    """Words in lines that fit; a word that fits in no line is broken where it has to be."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer):
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            lines += [""] if lines[-1] and not fits(lines[-1] + letter) else []
            lines[-1] += letter
    return lines
