"""Block weights as a bare list of numbers: which lists there are for a model, and what their slots mean.

A slot names a block, a group, several of them ("TE1 TE2"), or BASE: the text encoders and all that lies outside the
numbered blocks. Sources of the lists: sd-webui-lora-block-weight (12, 17, 20, 26, 61), Inspire-Pack (12, 17, 20, 21,
27, 58), kohya sd-scripts (23, 25; svd_merge's JSON lists), Realtime-Lora (no BASE), the Flux remerger's tables. The
slots are absolute: what a file holds never moves them, and what a list leaves out has the list's `rest`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .block_selectors import quoted
from .block_syntax import BlockWeights, number, weights
from .blocks import LAYOUTS, TEXT_GROUPS, Blocks
from .errors import TriLoRAError

# the groups that carry a model's numbered blocks; all others are outside them
MAIN = {"unet": ("IN", "MID", "OUT"), "sd3": ("J",), "flux": ("D", "S"), "hunyuan_video": ("D", "S"), "wan": ("B",), "qwen_image": ("B",),
        "lumina2": ("L",), "ltx": ("B",), "auraflow": ("D", "S"), "hidream": ("D", "S"), "cosmos2": ("B",), "krea2": ("B",), "omnigen2": ("L",),
        "kandinsky5": ("V",)}


_WORD = re.compile(r"[+-]?[\d.]+(?:[eE][+-]?\d+)?|[ABRUXabrux](?:[+-][\d.]+)?")


@dataclass(frozen=True)
class List:
    """dialect: who writes it; slots: what each number is for; rest: the number of what no slot names; note: what it is."""

    dialect: str
    slots: tuple[str, ...]
    rest: float
    note: str = ""


@dataclass(frozen=True)
class Tokens:
    """What the words of a list stand for: A and B (webui's X is A), and the seed of its random numbers."""

    a: float = 1.0
    b: float = 1.0
    seed: int | None = None
    presets: Mapping[str, str] = field(default_factory=dict)

    def generator(self):
        """Raises TriLoRAError where there is no seed."""
        if self.seed is None:
            raise TriLoRAError("block weights: R and U are random numbers and need a seed; the node Block Weights has one and hands on the numbers it drew")
        import torch

        return torch.Generator().manual_seed(self.seed)


def lists_of(blocks: Blocks) -> list[List]:
    """Every list that has a meaning for these blocks."""
    main = MAIN.get(blocks.family, ())
    sizes = tuple(len(blocks.groups.get(group, ())) for group in main)
    if blocks.family == "unet":
        return _unet_lists(*sizes)
    numbered = tuple(block for group in main for block in blocks.groups.get(group, ()))
    found = [List("realtime", numbered, 1, "all numbered blocks, no BASE")] if numbered else []
    if blocks.family == "lumina2" and "NR" in blocks.groups:
        found.append(List("realtime", (*numbered, "CR", "NR", "FINAL", r"/^diffusion_model\.x_embedder/"), 1, "layers, refiners, final layer, embedder"))
    if blocks.family in ("flux", "hunyuan_video"):  # Inspire knows the paths double_blocks and single_blocks
        found.append(List("inspire", ("BASE", *numbered), 0, "BASE, doubles, singles"))
    if sizes == (19, 38):
        outside = " ".join(group for group in blocks.groups if group in ("IN", "GUID", "MOD"))
        doubles = blocks.groups["D"]
        found += [List("inspire", ("BASE", *doubles), 0, "BASE, doubles"), List("webui", ("TE1", "T5", outside, *numbered, "FINAL"), 0, "CLIP, T5, IN, doubles, singles, OUT"),
                  List("tabs", numbered, 1, "doubles and singles, no BASE"), List("tabs", doubles, 1, "doubles, no BASE")]
    return found


def _unet_lists(inputs: int, middle: int, outputs: int) -> list[List]:
    """12 input and output blocks: SD1.x, SD2; 9: SDXL and what was distilled from it."""
    def ids(group: str, *numbers: int) -> tuple[str, ...]:
        return tuple(f"{group}{n:02d}" for n in numbers)

    if (inputs, outputs) not in ((12, 12), (9, 9)):
        return []
    every_in, every_out = ids("IN", *range(inputs)), ids("OUT", *range(outputs))
    mids = ("MID0", "MID1", "MID2")
    if inputs == 12:
        plain = ("BASE", *ids("IN", 1, 2, 4, 5, 7, 8), "MID", *ids("OUT", *range(3, 12)))
        own = [List("kohya", (*every_in, "MID", *every_out), 1, "IN, MID, OUT, no BASE")]
    else:
        plain = ("BASE", *ids("IN", 4, 5, 7, 8), "MID", *ids("OUT", *range(6)))
        own = [List("kohya", ("EMB", *every_in, *mids, *every_out, "FINAL"), 1, "EMB, IN, MID0-2, OUT, FINAL"),
               List("realtime", ("TE1", "TE2", *plain[1:]), 1, "TE1, TE2 and the blocks with attention")]
    full = ("BASE", *every_in, "MID", *every_out)
    return [List("webui", plain, 0, "BASE and the blocks with attention"), List("webui", full, 0, "BASE, IN, M00, OUT"),
            List("inspire", plain, 0, "BASE and the blocks with attention"), List("inspire", ("BASE", *every_in[1:], *mids, *every_out), 0, "BASE, IN01.., MID0-2, OUT"),
            *own, List("kohya JSON", plain, 1, "BASE and the blocks with attention"), List("kohya JSON", full, 1, "BASE, IN, M00, OUT")]


def fields(text: str) -> list[str]:
    """The slots of a written list: separated by commas or line ends, a last comma is ignored."""
    found = []
    for part in text.strip().removesuffix(",").split(","):
        found += [line.strip() for line in part.split("\n") if line.strip()] or [""]
    return found


def without_label(text: str) -> tuple[str, str]:
    """(label, list) of `LABEL:list` and of `LABEL<TAB>list`; ("", text) for any other text."""
    for mark in ":\t":
        label, there, rest = text.partition(mark)
        if there and not re.search(r"[=\[{]", label) and (mark == ":" or text.count(mark) == 1):
            return label, rest
    return "", text


def looks_like_a_list(text: str) -> bool:
    """At least two slots, each a number or a token of some dialect, or several of them with spaces between."""
    slots = fields(text)
    return len(slots) > 1 and all(map(_WORD.fullmatch, (word for slot in slots for word in slot.split(" ") if word)))


def read_list(text: str, blocks: Blocks, dialect: str, tokens: Tokens) -> BlockWeights | None:
    """The reading of a bare list; None where the dialect has no list of this length for these blocks.

    Raises TriLoRAError for a slot that is no number and no token of the dialect.
    """
    if re.search(r"[=:;%@{}\[\]<>/]", text):
        return None
    words = fields(text)
    for kind in lists_of(blocks):
        if kind.dialect == dialect and len(kind.slots) == len(words):
            return spread(kind, values(words, kind, blocks, tokens), blocks)
    return None


def values(words: Sequence[str], kind: List, blocks: Blocks, tokens: Tokens) -> list[float]:
    """The numbers of a list's slots; random tokens are drawn in the order of the slots."""
    generator = None

    def draw(low: float, high: float, digits: int) -> float:
        nonlocal generator
        import torch

        generator = generator or tokens.generator()
        return round(low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item(), digits)

    def value(word: str, item: str) -> float:
        if kind.dialect == "inspire" and word in ("A", "a", "B", "b"):
            return {"A": tokens.a, "a": tokens.a / 2, "B": tokens.b, "b": tokens.b / 2}[word]
        if kind.dialect == "inspire" and word in ("R", "r", "U", "u"):
            return draw(0.0, 3.0, 2) if word in "Rr" else draw(-1.5, 1.5, 2)
        if kind.dialect == "webui" and word in ("R", "U"):
            return draw(0.0, 1.0, 3) if word == "R" else draw(-0.5, 1.5, 3)
        if kind.dialect == "webui" and word.startswith("X"):
            return round(tokens.a + number(word[1:] or "0", item), 9)
        return number(word, item)

    found = []
    for position, (slot, text) in enumerate(zip(kind.slots, words, strict=True), 1):
        item = f"slot {position} ({slot})"
        if not text:
            raise TriLoRAError(f"block weights: {item} of the list is empty; write its number, 0 for none")
        ratios = [value(word, item) for word in (text.split() if kind.dialect == "inspire" else [text])]
        if len(set(ratios)) > 1:
            raise TriLoRAError(f"block weights: {item} is {quoted(text)}, one number for each weight in the order of a file; an order of a file is no place in "
                               f"the model. Write what the numbers are meant for, for example {parts_of(slot, blocks)}")
        found.append(ratios[0])
    return found


def parts_of(slot: str, blocks: Blocks) -> str:
    """An example of a text for parts of a slot: "MID.self=0.5, MID.mlp=1"."""
    name = "TE" if slot == "BASE" else slot.split()[0]
    there = [kind for kind in ("self", "attn", "mlp", "conv", "norm") if kind in blocks.kinds]
    if name.startswith("/") or not there:
        return f"{name}=0.5"
    return ", ".join(f"{name}.{kind}={value}" for kind, value in zip(there[:3:2] if "self" in there else there[:2], ("0.5", "1"), strict=False))


def spread(kind: List, numbers: Sequence[float], blocks: Blocks) -> BlockWeights:
    """A list's numbers at its slots, `rest` elsewhere."""
    return compact(kind.rest, zip(kind.slots, numbers, strict=True), blocks)


def compact(default: float, places: Iterable[tuple[str, float]], blocks: Blocks) -> BlockWeights:
    """`default` everywhere but at `places` (slots, the last of two wins), in as few rules as there are runs of a number."""
    rules, at, encoders, texts = [], {}, {}, (*TEXT_GROUPS, *blocks.encoders)
    for slot, value in places:
        for name in outside(blocks) if slot == "BASE" else slot.split():
            if name in ("TE", *texts):
                encoders |= {group: value for group in (texts if name == "TE" else (name,))}
            else:
                at |= {block: value for block in blocks.groups.get(name, (name,))}
    there = blocks.encoders or TEXT_GROUPS
    if len({encoders.get(group, default) for group in there}) == 1:
        rules = [("TE", encoders.get(there[0], default))]
    else:
        rules = [(group, encoders.get(group, default)) for group in there]
    for group, members in blocks.groups.items():
        if group not in blocks.encoders:
            rules += runs(group, members, [at.get(block, default) for block in members])
    rules += [(name, value) for name, value in at.items() if name.startswith("/")]
    common = {value for _, value in rules}
    if len(common) == 1:
        return BlockWeights(float(*common))
    return weights(float(default), [rule for rule in rules if rule[1] != default or rule[0].startswith("/")], blocks)


def runs(group: str, members: Sequence[str], numbers: Sequence[float]) -> list[tuple[str, float]]:
    """(selector, number) of each run of equal numbers in a group; the group's name where there is only one."""
    if len(set(numbers)) == 1:
        return [(group, numbers[0])]
    found, start = [], 0
    for end in range(1, len(members) + 1):
        if end == len(members) or numbers[end] != numbers[start]:
            found.append((members[start] if end - start == 1 else f"{members[start]}-{members[end - 1]}", numbers[start]))
            start = end
    return found


def outside(blocks: Blocks) -> tuple[str, ...]:
    """What BASE means: the text encoders, and every group outside the numbered blocks."""
    return ("TE", *(group for group in blocks.groups if group not in (*MAIN.get(blocks.family, ()), *blocks.encoders)))


def lengths(blocks: Blocks) -> str:
    """The lists that there are for these blocks, in words: "17 (webui, inspire: BASE and the blocks with attention)", or ""."""
    found: dict[tuple[int, str], list[str]] = {}
    for kind in lists_of(blocks):
        found.setdefault((len(kind.slots), kind.note), []).append(kind.dialect)
    return "; ".join(f"{size} ({', '.join(names)}: {note})" for (size, note), names in sorted(found.items()))


def models_with(length: int) -> list[str]:
    """Known models that have a list of this length."""
    return [name for name, there in _lengths_of_models().items() if length in there]


@functools.cache
def _lengths_of_models() -> dict[str, set[int]]:
    return {name: {len(kind.slots) for kind in lists_of(Blocks.layout(name))} for name in LAYOUTS}
