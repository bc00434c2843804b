"""Which of a file's layers have a place in a model, and why the others have none: from names and shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .block_names import blocks_in_file
from .blocks import TEXT_GROUPS, Blocks
from .errors import TriLoRAError
from .file_origin import family_told
from .files.kinds import Found, read_layer
from .key_names import LONGEST, Spellings, form, grouped, is_text, size_at, size_told
from .message_words import SHOWN, counted, short, some
from .naming import split_target

_LEAST = 0.5  # share of the denoiser's layers that must have a place


@dataclass(frozen=True)
class Diagnosis:
    """A file against a model.

    name: the file's; model: what the model is called; tensors: every layer's name in the file -> its tensors by ending;
    sizes: layer -> (rows, columns) of its weight, None where unknown; placed: layer -> target; renamed: those of them that
    are found under another name than the model knows; twice: layers without a place that are other names of a weight for
    which the file has another layer -> that weight; extra: keys of no layer; misfits: layer -> (its size, the weight's);
    read: layer -> what its tensors make, or why they make nothing.
    """

    name: str
    model: str
    tensors: Mapping[str, Mapping[str, Tensor]]
    sizes: Mapping[str, tuple[int, int] | None]
    placed: Mapping[str, object]
    renamed: Mapping[str, object]
    twice: Mapping[str, object]
    extra: tuple[str, ...]
    misfits: Mapping[str, tuple]
    read: Mapping[str, Found | TriLoRAError]
    spellings: Spellings
    has_clip: bool

    @property
    def layers(self) -> Collection[str]:
        """Names of all layers, in the file's order."""
        return self.sizes.keys()

    @cached_property
    def left(self) -> tuple[str, ...]:
        """Layers without a place, in the file's order."""
        return tuple(layer for layer in self.layers if layer not in self.placed)

    @cached_property
    def left_text(self) -> tuple[str, ...]:
        """Those of them that are a text encoder's."""
        return tuple(layer for layer in self.left if is_text(layer))

    def refusal(self) -> str:
        """Why the file cannot be used with this model, "" where it can.

        No layer has a place; a layer that would have one is not whole; a layer is of another size than its weight; or
        fewer than half of the layers for the denoiser have a place. A text encoder's layers never keep the others from
        being used.
        """
        if not self.layers:
            none = f"none of its {counted(len(self.extra), 'tensor')} is part of an adapter's layer"
            return f"{self.name}: {none} ({some(self.extra)}); choose a LoRA file"
        if self.broken:
            return f"{self.name}: {self.broken}"
        if self.misfits:
            more = len(self.misfits) - 1
            others = f", and {more} more of {counted(len(self.layers), 'layer')} do not fit" if more else ""
            return f"{self.name}: {self._about()}; {self._misfit()}{others}; it was made for another model"
        own = [layer for layer in self.layers if not is_text(layer)]
        lost = [layer for layer in own if layer not in self.placed]
        if self.placed and len(lost) <= (1 - _LEAST) * len(own):
            return ""
        text = f"{counted(len(self.left_text), 'layer')} for a text encoder"
        remedy = "; it is another model's" if self.has_clip else ": connect CLIP"
        if self.twice and all(layer in self.twice for layer in lost):
            return f"{self.name}: {self._said_twice()}; keep one of them, or merge them"
        if not own:
            return f"{self.name}: none of its layers is for the model, and {text} ({some(self.left_text, 1)}){remedy}"
        found = "none" if len(lost) == len(own) else f"only {len(own) - len(lost)}"
        return (
            f"{self.name}: {found} of its {counted(len(own), 'layer')} found a place in this model ({some(lost, 1)}); "
            f"{self._about()}; {self._nearest(lost[0])}it was made for another model, or its names are spelled in a way "
            f"that is not known here; choose the model it was made for"
            + (f"; {text}{remedy}" if self.left_text else "")
        )

    def notice(self, unread: Sequence[str] = ()) -> str:
        """What was left out, in a line, "" where nothing was. unread: keys of layers that were not taken there."""
        parts, text = [], () if self.has_clip else self.left_text
        aside = {*text, *self.twice}
        if own := [layer for layer in self.left if layer not in aside]:
            nearest = self.spellings.nearest(own[0])
            parts.append(
                f"{len(own)} of {counted(len(self.layers), 'layer')} left out, for which this model ({self.model}) has "
                f"no place: {some(own)}" + (f" (nearest to {short(own[0])}: {', '.join(nearest)})" if nearest else "")
            )
            if whole := self._whole_blocks():
                parts.append(f"nothing of these blocks was used: {some(whole, 12)}")
        if self.twice:
            parts.append(self._said_twice())
        if text := [layer for layer in text if layer not in self.twice]:
            parts.append(f"{counted(len(text), 'layer')} for a text encoder left out, since no CLIP is connected")
        if rest := [*self.extra, *unread]:
            parts.append(f"{counted(len(rest), 'tensor')} of no layer of the model left out: {some(rest)}")
        return f"{self.name}: {'; '.join(parts)}" if parts else ""

    def report(self) -> dict[str, str]:
        """All of it, subject -> text: where the layers went, and what is nearest to those that have no place."""
        found = f"{len(self.placed)} of {counted(len(self.layers), 'layer')} found a place"
        facts = {"model": self.model, "found": found}
        if self.renamed:
            first, target = next(iter(self.renamed.items()))
            same = f"{short(first)} is {split_target(target)[0].removesuffix('.weight')}"
            facts["other names"] = f"{len(self.renamed)} of them under names that only one weight can have: {same}"
        if self.misfits:
            facts["other sizes"] = f"{counted(len(self.misfits), 'layer')}; {self._misfit()}"
        facts["blocks"] = in_runs(self.by_block)
        if self.twice:
            facts["second names"] = self._said_twice()
        if self.left:
            facts["left out"] = some(self.left)
        if self.left_text and not self.has_clip:
            facts["text encoder"] = f"{counted(len(self.left_text), 'layer')}, for which CLIP must be connected"
        asked = [layer for layer in self.left if layer not in self.twice and (self.has_clip or not is_text(layer))]
        for number, layer in enumerate(asked[:SHOWN], 1):
            nearest = ", ".join(self.spellings.nearest(layer)) or "nothing is like it"
            facts[f"nearest {number}"] = f"{short(layer)}: {nearest}"
        return facts

    @cached_property
    def by_block(self) -> dict[str, tuple[int, int]]:
        """Block -> (layers that have a place, all), in the model's order; of layers without one as their names tell."""
        blocks, told = Blocks.of(self.spellings.weights), blocks_in_file(layer[:LONGEST] for layer in self.left)
        counts: dict[str, tuple[int, int]] = {}
        for layer in self.layers:
            here = layer in self.placed
            block = (blocks.place(self.placed[layer]) if here else told[layer[:LONGEST]]).block
            found, count = counts.get(block, (0, 0))
            counts[block] = found + here, count + 1
        order = {block: number for number, block in enumerate(blocks.ids)}
        return dict(sorted(counts.items(), key=lambda item: order.get(item[0], len(order))))

    @cached_property
    def broken(self) -> str:
        """What is wrong with the first layer whose name, spelled otherwise, is one of the model's; "" where nothing is."""
        for layer in self.left:
            if form(layer) in self.spellings.targets:
                if isinstance(error := self.read[layer], TriLoRAError):
                    return str(error)
        return ""

    def layer(self, name: str) -> Found:
        """What a layer's tensors make. Raises TriLoRAError, naming a key, where they make nothing, see `read_layer`."""
        found = self.read[name]
        if isinstance(found, TriLoRAError):
            raise TriLoRAError(str(found))
        return found

    def _said_twice(self) -> str:
        first = split_target(next(iter(self.twice.values())))[0].removesuffix(".weight")
        left = f"{counted(len(self.twice), 'layer')} left out, because the file has another for the same place"
        return f"{left}: {some(self.twice)}, of {first}{' and others' * (len(set(self.twice.values())) > 1)}"

    def _whole_blocks(self) -> list[str]:
        beside = () if self.has_clip else TEXT_GROUPS  # those are said in one number
        lost = [block for block, (found, _) in self.by_block.items() if not found and block[-1:].isdigit()]
        return [block for block in lost if block.partition(".")[0] not in beside]

    def _misfit(self) -> str:
        layer, (got, expected) = next(iter(self.misfits.items()))
        return f"its layer for {split_target(self.placed[layer])[0]} is {got}, expected {expected}"

    def _about(self) -> str:
        told = family_told(self.sizes)
        names = f"its names are those of {told}" if told else "its names leave open for which model"
        return f"{names}, and this model is {self.model}"

    def _nearest(self, layer: str) -> str:
        nearest = self.spellings.nearest(layer)
        return f"nearest to {short(layer)}: {', '.join(nearest)}; " if nearest else ""


def examine(
    name: str, tensors: Mapping[str, Tensor], spellings: Spellings, model: str = "", has_clip: bool = False
) -> Diagnosis:
    """Find the place of every layer of a file.

    name: the file's; tensors: its own by key; spellings: of the model and of the text encoder that is connected;
    model: what the model is called.
    """
    layers, extra = grouped(tensors, spellings)
    read = {layer: _read(layer, found) for layer, found in layers.items()}
    sizes = {layer: size_told(found) if isinstance(found, Found) else None for layer, found in read.items()}
    placed = {layer: spellings.names[layer] for layer in layers if layer in spellings.known}
    unknown = {layer: size for layer, size in sizes.items() if layer not in placed}
    renamed = spellings.certain(unknown, set(placed.values())) if unknown else {}
    meant = spellings.meant(unknown) if len(renamed) < len(unknown) else {}
    twice = {layer: target for layer, target in meant.items() if layer not in renamed}
    misfits = {}
    for layer, target in placed.items():
        own = size_at(target, spellings.weights)
        if sizes[layer] and own and own != sizes[layer]:
            misfits[layer] = sizes[layer], own
    places = placed | renamed
    return Diagnosis(name, model, layers, sizes, places, renamed, twice, extra, misfits, read, spellings, has_clip)


def _read(layer: str, tensors: Mapping[str, Tensor]) -> Found | TriLoRAError:
    try:
        return read_layer(layer, tensors)
    except TriLoRAError as error:
        return error


def in_runs(counts: Mapping[str, tuple[int, ...]]) -> str:
    """Blocks with their counts, those that follow each other with the same ones as "D00-D18 8 of 8"."""
    runs: list[list] = []
    for block, count in counts.items():
        group = block.rstrip("0123456789")
        if runs and runs[-1][2] == count and runs[-1][0].rstrip("0123456789") == group != block:
            runs[-1][1] = block
        else:
            runs.append([block, block, count])
    named = ((first if first == last else f"{first}-{last}", count) for first, last, count in runs)
    return ", ".join(f"{name} {' of '.join(map(str, count))}" for name, count in named)
