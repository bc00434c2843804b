"""Presets from text files that people have, and the test lines of Inspire-Pack."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .block_selectors import quoted
from .block_tags import elemental_rule, is_elemental
from .block_vectors import fields, lists_of, looks_like_a_list, models_with, parts_of
from .blocks import Blocks
from .bounds import FILE, check_count, check_length
from .errors import TriLoRAError

# Inspire's lists for SDXL (plain, LoCon), SD1.x (plain, LoCon) and Flux (doubles, all)
_INSPIRE = (12, 17, 20, 21, 27, 58)
_LONGEST_NAME = 100
_MOST = 5000  # presets of a file
_SHOWN = 5  # faults that an error names
_TITLES = ("preset_name", "preset_weights")  # SuperMerger's first line


@dataclass(frozen=True)
class PresetLine:
    """A line of a file of presets; line counts from 1."""

    name: str
    text: str
    line: int


def file_lines(text: str) -> list[str]:
    """The lines of a file, which end as files of Linux, Windows or old Macs have it and at no other character; the browser counts the same."""
    return re.split(r"\r\n|\r|\n", text.removeprefix("\ufeff"))


def read_presets(text: str) -> dict[str, str]:
    """Name -> text of a file of presets. Raises what `preset_lines` raises."""
    return {preset.name: preset.text for preset in preset_lines(text)}


def preset_lines(text: str) -> list[PresetLine]:
    """The presets of a file: a line each, `NAME:text in any dialect`, `number<TAB>name<TAB>list` or SuperMerger's `name<TAB>list`.

    Blank lines, lines that begin with #, test lines (@) and SuperMerger's titles are left out. Raises TriLoRAError that names every line that
    is no preset, has a name that an earlier one has with another text, or a list of a length that no model has.
    """
    check_length(text, "presets: the file", FILE)
    found: dict[str, PresetLine] = {}
    faults = []
    for number, line in enumerate(file_lines(text), 1):
        if not line.strip() or line.lstrip()[0] in "#@":
            continue
        name, weights = _columns(line)
        if (name, weights) == _TITLES:
            continue
        preset = PresetLine(name.strip(), weights.strip(), number)
        fault = _fault(preset, found)
        if fault:
            faults.append(f"line {number}: {fault}")
        else:
            found.setdefault(preset.name, preset)
    if faults:
        more = f"; and {len(faults) - _SHOWN} more lines" if len(faults) > _SHOWN else ""
        raise TriLoRAError("presets: " + "; ".join(faults[:_SHOWN]) + more)
    check_count(len(found), "presets: names", _MOST)
    return list(found.values())


def _columns(line: str) -> tuple[str, str]:
    """(name, weights) of a line."""
    columns = line.strip().split("\t")
    if len(columns) == 3:
        return columns[1], columns[2]
    if len(columns) == 2 and ":" not in columns[0]:
        return columns[0], columns[1]
    return line.partition(":")[::2]


def _fault(preset: PresetLine, earlier: dict[str, PresetLine]) -> str:
    if not preset.name or not preset.text:
        return "no preset; write NAME:weights, such as FACE:default=0, OUT03-OUT05=1"
    if len(preset.name) > _LONGEST_NAME:
        return f"the name {quoted(preset.name)} has {len(preset.name):,} characters; at most {_LONGEST_NAME} are read"
    if is_elemental(preset.text):
        return f"{quoted(preset.name)} is {elemental_rule()}"
    same = earlier.get(preset.name)
    if same and same.text != preset.text:
        return f"{quoted(preset.name)} has another meaning in line {same.line}; rename one of them"
    if looks_like_a_list(preset.text) and not models_with(len(fields(preset.text))):
        return f"{quoted(preset.name)} has {len(fields(preset.text))} numbers, and no model has such a list"
    return ""


def lines_of_test(text: str, blocks: Blocks) -> list[tuple[str, str]]:
    """(label, Inspire list) of each line of a test.

    `@NAME:n`: n lines, each with A in one slot of n and 0 in the others. Raises TriLoRAError for an n of which Inspire has
    no list (some of the lines that circulate leave out BASE in their counts), and for `@NAME:n,s,b`, which stands for s
    single weights within slot b in the order of a file.
    """
    found = re.fullmatch(r"@[^:]*:\s*(\d{1,9})\s*(?:,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*)?", text.strip())
    sizes = [len(kind.slots) for kind in lists_of(blocks) if kind.dialect == "inspire"]
    known = sorted({*_INSPIRE, *sizes})
    if not found:
        rule = f"write @NAME:{sizes[0]} for a test of {sizes[0]} slots, one run for each" if sizes else "Inspire has no lists for this model, so there are none"
        raise TriLoRAError(f"block weights: {quoted(text)} is no test line; {rule}")
    size = int(found[1])
    if size not in known:
        counted = f"; with BASE, which is slot 1, it would be {size + 1}" if size + 1 in known else ""
        raise TriLoRAError(f"block weights: {quoted(text)}: no list of Inspire's has {size} slots, they have {', '.join(map(str, known))}{counted}")
    if found[2]:
        raise TriLoRAError(_within_a_slot(text, size, int(found[2]), int(found[3]), blocks))
    return [(f"B{slot}", ",".join("A" if slot == other else "0" for other in range(1, size + 1))) for slot in range(1, size + 1)]


def _within_a_slot(text: str, size: int, inner: int, slot: int, blocks: Blocks) -> str:
    """Why a test of single weights is not run."""
    if not 1 <= slot <= size or not inner:
        return f"block weights: {quoted(text)}: slot {slot} of a list of {size} does not exist, or has no places; slots count from 1, which is BASE"
    kind = next((kind for kind in lists_of(blocks) if kind.dialect == "inspire" and len(kind.slots) == size), None)
    if kind is None:
        return f"block weights: {quoted(text)}: this model has no list of {size} slots"
    place = kind.slots[slot - 1]
    return (f"block weights: {quoted(text)} tests {inner} weights of slot {slot} ({place}) one by one in the order of a file, and an order of a file is no place in "
            f"the model; write @NAME:{size} for a test of all slots, or a text for each part of this one: default=0, {parts_of(place, blocks)}")
