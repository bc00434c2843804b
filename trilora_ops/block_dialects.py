"""What people have in their notes, read as block weights: one reader for each form that a program writes.

A reader returns None where the text has not its form; it raises where the form is its own and the content is not. The
numbers mean what they mean in that program, at absolute places: Inspire's n-th block is the n-th of a whole model, not
of a file, and what a list leaves out has one number (0; 1 where the program leaves unlisted blocks alone).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from . import block_diffusers, block_kohya, block_tags, block_vectors
from .block_changes import split_changes, with_changes
from .block_selectors import quoted
from .block_syntax import CHARACTERS, BlockWeights, items, read_native, weights
from .block_vectors import Tokens
from .blocks import TEXT_GROUPS, Blocks, Place
from .bounds import check_length, read_json
from .errors import TriLoRAError

DIALECTS = {
    "auto": "every dialect that can read the text for this model; an error where two of them differ",
    "native": "the canonical text: default=1, IN04-IN08=0.5, OUT.cross=0, TE1=0.8",
    "webui": "lists of 12, 17, 20, 26 or 61 numbers with R, U, X; NAME:list; lbw=...:x=... (sd-webui-lora-block-weight)",
    "inspire": "lists of 12, 17, 20, 21, 27 or 58 numbers with A, B, R, U; LABEL:list; %default=1,in1-3=0.5; LBW=...;A=...;B=...; (Inspire-Pack)",
    "kohya": "lists of 25 or 23, JSON lists, down_lr_weight=..., train_double_block_indices=..., network_reg_dims=... (sd-scripts)",
    "realtime": "lists without BASE; %default=1.0, te1=0.5, in7-8=1.2, double7-12=1.2, layer18-25=1.2 (Realtime-Lora)",
    "diffusers": 'the dictionary of set_adapters: {"text_encoder": 0.5, "unet": {"down": 0.9}}',
    "tabs": "number, name and list with tabs between them (the Flux remerger)",
}


_SHOWN = 3  # faults that an error repeats
_LONGEST_LINE = 700  # of a reading that an error repeats, which is the longest that a list has


def read(text: str, blocks: Blocks, dialect: str, *, a: float, b: float, seed: int | None, presets: Mapping[str, str]) -> BlockWeights:
    """See `block_syntax.parse`."""
    if dialect not in DIALECTS:
        raise TriLoRAError(f"dialect={quoted(dialect)}: choose one of {', '.join(DIALECTS)}")
    if not text.strip():
        return BlockWeights(1.0)
    check_length(text, "block weights: the text")
    tokens = Tokens(a, b, seed, presets)
    if text.strip() in presets:
        return _preset(text.strip(), blocks, dialect, tokens)
    text = text.strip().translate(CHARACTERS)
    begin, changes = split_changes(text, presets)
    if changes:
        return with_changes(read(begin, blocks, dialect, a=a, b=b, seed=seed, presets=presets), changes, blocks)
    readings, faults = _readings(text, blocks, dialect, tokens)
    if not readings:
        raise TriLoRAError(_faults(faults) if faults else _no_reading(text, blocks, dialect, presets))
    return _the_one(text, readings, blocks, dialect)


def _readings(text: str, blocks: Blocks, dialect: str, tokens: Tokens) -> tuple[list[tuple[str, BlockWeights]], dict[str, str]]:
    """(reader, reading) of those that read the text, and fault -> reader of those whose form it has."""
    found, faults = [], {}
    for name, reader in READERS:
        if dialect in ("auto", name.split()[0]):
            try:
                reading = reader(text, blocks, tokens)
            except TriLoRAError as fault:
                faults.setdefault(str(fault), name)
            else:
                found += [(name, reading)] if reading else []
    return found, faults


def _faults(faults: Mapping[str, str]) -> str:
    if len(faults) == 1:
        return next(iter(faults))
    shown = list(faults.items())[:_SHOWN]
    return "block weights: no dialect can read the text:" + "".join(f"\n  {name}: {fault.removeprefix('block weights: ')}" for fault, name in shown)


def _preset(name: str, blocks: Blocks, dialect: str, tokens: Tokens) -> BlockWeights:
    """A preset is read as its own text would be, which names no preset; where the chosen dialect is not that of the preset, by any."""
    text = tokens.presets[name].strip().translate(CHARACTERS)
    try:
        if dialect != "auto":
            readings, _ = _readings(text, blocks, dialect, replace(tokens, presets={}))
            if readings:
                return _the_one(text, readings, blocks, dialect)
        if block_vectors.looks_like_a_list(text):  # as in the files of presets, where no list is kohya's
            text = f"{name}:{text}"
        return read(text, blocks, "auto", a=tokens.a, b=tokens.b, seed=tokens.seed, presets={})
    except TriLoRAError as fault:
        raise TriLoRAError(f"preset {quoted(name)}: {str(fault).removeprefix('block weights: ')}") from None


def _the_one(text: str, readings: list[tuple[str, BlockWeights]], blocks: Blocks, dialect: str) -> BlockWeights:
    """What all readings say. Raises TriLoRAError that shows them where two differ, and what makes it clear."""
    different: list[tuple[list[str], BlockWeights]] = []
    for name, reading in readings:
        names = next((names for names, other in different if _same(reading, other, blocks)), None)
        if names is None:
            different.append(([name], reading))
        else:
            names.append(name)
    if len(different) > 1:
        shown = "\n".join(f"  {', '.join(dict.fromkeys(names))}: {_cut(reading.text())}" for names, reading in different)
        count = Counter(program for names, _ in different for program in {name.split()[0] for name in names})
        clear = [name for name, meanings in count.items() if meanings == 1] if dialect == "auto" else []
        choice = f"Choose the dialect {' or '.join(clear)} in Block Weights, or write" if clear else "Write"
        raise TriLoRAError(f"block weights: {quoted(text)} has {len(different)} meanings for this model:\n{shown}\n"
                           f"{choice} the line that you mean, as it stands behind its colon.")
    return readings[0][1]


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..."


def _same(first: BlockWeights, second: BlockWeights, blocks: Blocks) -> bool:
    """Whether two readings give one number everywhere, in text encoders that are not connected too."""
    if first == second:
        return True
    if not all(selector.is_whole for reading in (first, second) for selector, _ in reading.rules):
        return False
    places = [Place(block, group, frozenset(), "") for group, members in blocks.groups.items() for block in members]
    places += [Place(group, group, frozenset(), "") for group in TEXT_GROUPS if group not in blocks.groups]
    return all(first.at(place) == second.at(place) for place in places)


def _no_reading(text: str, blocks: Blocks, dialect: str, presets: Mapping[str, str]) -> str:
    lists = block_vectors.lengths(blocks)
    example = f"write default=1, {_example(blocks)}=0.5"
    takes = f"This model ({blocks.family}) takes lists of {lists}; or {example}" if lists else f"No list has a meaning for this model ({blocks.family}); {example}"
    written = quoted(text)
    if text.startswith("@"):
        return f"block weights: {written} stands for the lines of a test, of which each is a text of its own; it can only stand in Block Weights"
    label, bare = block_vectors.without_label(text)
    if block_tags.is_elemental(text):
        return f"block weights: {written} is {block_tags.elemental_rule(blocks)}"
    if block_vectors.looks_like_a_list(bare):
        size = len(block_vectors.fields(bare))
        if dialect == "auto" and label and any(kind.dialect == "kohya" and len(kind.slots) == size for kind in block_vectors.lists_of(blocks)):
            return (f"block weights: {size} numbers with a name are no list for this model: kohya alone has one of {size}, and kohya's lists have no names. "
                    f"Choose the dialect kohya if it is a preset and kohya's, leave out the name if it stands here; or {example}")
        return f"block weights: {size} numbers are no list{'' if dialect == 'auto' else f' of dialect {dialect}'} for this model{_whose(size, blocks, dialect)}. {takes}"
    from difflib import get_close_matches  # for an error only

    spellings = {name.lower(): name for name in presets}
    near = [spellings[name] for name in get_close_matches(text[:60].lower(), list(spellings), 4, 0.4)]
    offered = f"; presets near it: {', '.join(near)}" if near else ""
    if dialect != "auto":
        return f"block weights: {written} is no preset and no text of dialect {dialect} for this model{offered}; {dialect} means {DIALECTS[dialect]}"
    return f"block weights: {written} is no preset and has no form that block weights are written in{offered}. {takes}"


def _whose(size: int, blocks: Blocks, dialect: str) -> str:
    """Of which other dialect or which models a list of that length is, for an error."""
    others = dict.fromkeys(kind.dialect for kind in block_vectors.lists_of(blocks) if len(kind.slots) == size and kind.dialect in DIALECTS)
    if dialect != "auto" and others:
        locon = "; inspire's for LoCon files has 27: no IN00, and three MID" if (dialect, size) == ("inspire", 26) else ""
        return f", but one of {' and '.join(others)}{locon}"
    names = ", ".join(block_vectors.models_with(size))
    return f"; they are one for {names}" if names else ""


def _example(blocks: Blocks) -> str:
    main = block_vectors.MAIN.get(blocks.family, [group for group in blocks.groups if group not in blocks.encoders and blocks.groups[group][0][-1].isdigit()])
    return blocks.groups[main[0]][-1] if main and main[0] in blocks.groups else "TE"


def _native(text: str, blocks: Blocks, tokens: Tokens) -> BlockWeights | None:
    if text[0] in "{[%@" or "=" not in text or block_tags.is_tag(text) or block_kohya.arguments(text):
        return None
    return read_native(text, blocks)


def _list(dialect: str) -> Callable:
    def reader(text: str, blocks: Blocks, tokens: Tokens) -> BlockWeights | None:
        label, text = block_vectors.without_label(text)
        if label and dialect == "kohya":  # which has no names
            return None
        return block_vectors.read_list(text, blocks, dialect, tokens)
    return reader


_INSPIRE = {"in": "IN", "mid": "MID", "out": "OUT", "double": "D", "single": "S"}


def _inspire_spec(position: int) -> Callable:
    """`%default=1,base=0.5,in1-3=0,out2=0.5`: numbers count from 1 through the blocks of a list (0: of a plain file, -1: LoCon)."""
    def reader(text: str, blocks: Blocks, tokens: Tokens) -> BlockWeights | None:
        lists = [kind for kind in block_vectors.lists_of(blocks) if kind.dialect == "inspire"]
        if not text.startswith("%") or not lists:
            return None
        given = [(name.lower(), value) for name, value in items(text[1:])]
        default = _last(given, "default", 1.0)
        places = [("BASE", _last(given, "base", default))]
        for name, value in given:
            if name in ("default", "base"):
                continue
            word = re.fullmatch(r"(in|mid|out|double|single)(?:(\d{1,9})(?:-(\d{1,9}))?)?", name)
            group = _INSPIRE[word[1]] if word else ""
            if group not in block_vectors.MAIN[blocks.family]:
                raise TriLoRAError(f"block weights: {quoted(name)} in {quoted(text)} is none of Inspire's words for this model")
            numbered = [slot for slot in lists[position].slots if slot.startswith(group)]
            first, last = (int(word[2]), int(word[3] or word[2])) if word[2] else (1, len(numbered))
            if not 1 <= first <= last <= len(numbered):
                raise TriLoRAError(f"block weights: {quoted(name)} in {quoted(text)}: Inspire counts {word[1]}1 to {word[1]}{len(numbered)} here, "
                                   f"which are {', '.join(numbered)}")
            places += [(block, value) for block in numbered[first - 1 : last]] if word[2] else [(group, value)]
        return block_vectors.compact(default, places, blocks)
    return reader


def _last(given: list[tuple[str, float]], name: str, default: float) -> float:
    return next((value for word, value in reversed(given) if word == name), default)


_REALTIME = {"double": "D", "single": "S", "layer": "L", "block": "B", "in": "IN", "mid": "MID", "out": "OUT", "te": "TE"}


def _realtime_named(text: str, blocks: Blocks, tokens: Tokens) -> BlockWeights | None:
    """`%default=1.0, te1=0.5, in7-8=1.2, other=0`: the model's own numbers, from 0."""
    if "=" not in text or text[0] in "{[@/" or block_tags.is_tag(text) or block_kohya.arguments(text):
        return None
    default, places = 1.0, []
    for name, value in items(text.removeprefix("%")):
        word = re.fullmatch(r"(double|single|layer|block|in|mid|out|te)(\d+(?:-\d+)?)?", name.lower())
        if name.lower() == "default":
            default = value
        elif name.lower() == "other":
            places += [(group, value) for group in block_vectors.outside(blocks) if group != "TE"]
        elif word and _REALTIME[word[1]] in (*blocks.groups, "TE"):
            places.append((_REALTIME[word[1]] + (word[2] or ""), value))
        elif text.startswith("%"):
            raise TriLoRAError(f"block weights: {quoted(name)} in {quoted(text)} is no word for this model; it has {', '.join(blocks.groups)}")
        else:
            return None
    return weights(default, places, blocks)


def _tabs(text: str, blocks: Blocks, tokens: Tokens) -> BlockWeights | None:
    """`1<TAB>name<TAB>1,1,...`, without the number, or the list alone."""
    columns = text.split("\t")
    return block_vectors.read_list(columns[-1], blocks, "tabs", tokens) if len(columns) <= 3 else None


def _kohya_json(text: str, blocks: Blocks, tokens: Tokens) -> BlockWeights | None:
    if not text.startswith("["):
        return None
    try:
        numbers = read_json(text)
    except ValueError as error:
        raise TriLoRAError(f"block weights: {quoted(text)} is no JSON list ({error})") from None
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in numbers):
        raise TriLoRAError(f"block weights: {quoted(text)} holds something else than numbers")
    return block_vectors.read_list(",".join(map(str, numbers)), blocks, "kohya JSON", tokens)


# in the order in which a reading is preferred among equal ones
READERS: tuple[tuple[str, Callable[[str, Blocks, Tokens], BlockWeights | None]], ...] = (
    ("native", _native), ("inspire", _list("inspire")), ("webui", _list("webui")), ("inspire", block_tags.inspire), ("webui", block_tags.webui), ("inspire", _inspire_spec(0)),
    ("inspire (LoCon files)", _inspire_spec(-1)), ("kohya", _list("kohya")), ("kohya", _kohya_json), ("kohya", block_kohya.read),
    ("realtime", _list("realtime")), ("realtime", _realtime_named), ("diffusers", block_diffusers.read), ("tabs", _tabs),
)
