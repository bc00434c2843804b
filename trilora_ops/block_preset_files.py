"""Presets from text files that people have, and the test lines of Inspire-Pack."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .block_selectors import quoted
from .block_vectors import fields, looks_like_a_list, models_with
from .errors import TriLoRAError

# Inspire's lists for SDXL (plain, LoCon), SD1.x (plain, LoCon) and Flux (doubles, all)
_INSPIRE = (12, 17, 20, 21, 27, 58)


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
    """The presets of a file: a line each, `NAME:text in any dialect` or `number<TAB>name<TAB>list`.

    Blank lines, lines that begin with # and test lines (@) are left out. Raises TriLoRAError that names every line that
    is no preset, has a name that an earlier one has with another text, or a list of a length that no model has.
    """
    found: dict[str, PresetLine] = {}
    faults = []
    for number, line in enumerate(file_lines(text), 1):
        if not line.strip() or line.lstrip()[0] in "#@":
            continue
        columns = line.strip().split("\t")
        name, weights = (columns[1], columns[2]) if len(columns) == 3 else line.partition(":")[::2]
        preset = PresetLine(name.strip(), weights.strip(), number)
        fault = _fault(preset, found)
        if fault:
            faults.append(f"line {number}: {fault}")
        else:
            found.setdefault(preset.name, preset)
    if faults:
        raise TriLoRAError("presets: " + "; ".join(faults))
    return list(found.values())


def _fault(preset: PresetLine, earlier: dict[str, PresetLine]) -> str:
    if not preset.name or not preset.text:
        return "no preset; write NAME:weights, such as FACE:default=0, OUT03-OUT05=1"
    if all(re.fullmatch(r"[^:=]*:[^:=]*:[^:=]*", rule) for rule in preset.text.split(",")):
        return (f"{preset.name!r} is one of webui's elemental presets (blocks:words of keys:number), which are not read; write it with the words of Block "
                "Weights, such as IN05-OUT05.attn=1")
    same = earlier.get(preset.name)
    if same and same.text != preset.text:
        return f"{preset.name!r} has another meaning in line {same.line}; rename one of them"
    if looks_like_a_list(preset.text) and not models_with(len(fields(preset.text))):
        return f"{preset.name!r} has {len(fields(preset.text))} numbers, and no model has such a list"
    return ""


def lines_of_test(text: str) -> list[tuple[str, str]]:
    """(label, Inspire list) of each line of a test.

    `@NAME:n`: n lines, each with A in one slot of n and 0 in the others; `@NAME:n,s,b`: s lines with A in one of the s
    places within slot b, slot 1 being BASE. Raises TriLoRAError for an n of which Inspire has no list, and a slot that
    the list has not: some of the lines that circulate leave out BASE in their counts.
    """
    found = re.fullmatch(r"@[^:]*:\s*(\d{1,9})\s*(?:,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*)?", text.strip())
    if not found:
        raise TriLoRAError(f"block weights: {quoted(text)} is no test line; write @NAME:17, or @NAME:17,12,8 for 12 places within slot 8")
    size = int(found[1])
    if size not in _INSPIRE:
        counted = f"; with BASE, which is slot 1, it would be {size + 1}" if size + 1 in _INSPIRE else ""
        raise TriLoRAError(f"block weights: {quoted(text)}: no list of Inspire's has {size} slots, they have {', '.join(map(str, _INSPIRE))}{counted}")
    if not found[2]:
        return [(f"B{slot}", ",".join("A" if slot == other else "0" for other in range(1, size + 1))) for slot in range(1, size + 1)]
    inner, slot = int(found[2]), int(found[3])
    if not 1 <= slot <= size or not inner:
        raise TriLoRAError(f"block weights: {quoted(text)}: slot {slot} of a list of {size} does not exist, or has no places; slots count from 1, which is BASE")
    one_hot = [" ".join("A" if place == other else "0" for other in range(inner)) for place in range(inner)]
    return [(f"B{slot}.{place}", ",".join(places if slot == other else "0" for other in range(1, size + 1))) for place, places in enumerate(one_hot, 1)]
