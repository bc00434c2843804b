"""The block registry: one address for every weight of a model and of its text encoders.

Read from the host's target keys alone (`diffusion_model.input_blocks.4.1.proj_in.weight` lies in IN04), never from the
spelling or the order in a file. Two axes: the block, and what the layer does in it (words of KINDS).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import accumulate

from .block_families import BESIDE, ENCODERS, FAMILIES, GENERIC, KINDS, TEXT_ENCODER, Family
from .block_layouts import LAYOUTS
from .errors import TriLoRAError
from .naming import PREFIX, split_target

__all__ = ["KINDS", "LAYOUTS", "Blocks", "Place"]
BASE = "BASE"  # what no table and no numbered list holds
EMB, VISION = "EMB", "VIS"
# the words for text encoders, in the order in which a CLIP lists them; which of a model's groups are some, it says itself
TEXT_GROUPS = ("TE1", "TE2", "T5", "LLM", "LLM2")
_OF_NORM = (".scale", ".gamma", ".beta")


@dataclass(frozen=True)
class Place:
    """Where a weight is.

    block: "IN04", "MID1", "D07", "TE1.05", "EMB", generic "layers.03"; group: "IN", "MID", "D", "TE1", "EMB", "layers".
    kinds: words of KINDS; name: the target key without its last ".weight" or ".bias".
    """

    block: str
    group: str
    kinds: frozenset[str]
    name: str


@dataclass(frozen=True)
class Blocks:
    """The blocks of one model and of its text encoders, in the order in which they run, text encoders first.

    family: of FAMILIES or "generic"; ids: every block there is; groups: "IN" -> ("IN00", ...); kinds: the words there are;
    names: of all weights, as `Place.name` has them, empty for a layout; encoders: the groups that are text encoders.
    """

    family: str
    ids: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    kinds: frozenset[str]
    names: frozenset[str] = field(repr=False, default=frozenset())
    encoders: tuple[str, ...] = ()
    _table: Family = field(repr=False, default=GENERIC)
    _encoders: dict[str, str] = field(repr=False, default_factory=dict)

    @classmethod
    def of(cls, keys: Iterable[str]) -> "Blocks":
        """From the keys of a MODEL (`diffusion_model. ...`) and, where there is one, of a CLIP, in any order."""
        keys = [key for key in keys if key.partition(".")[0] not in BESIDE]
        table = _family_of(keys)
        empty = cls(table.name, (), {}, frozenset(), _table=table, _encoders=_encoder_groups(key for key in keys if not key.startswith(PREFIX)))
        return empty._with([empty.place(key) for key in keys], {empty.place(key).group for key in keys if not key.startswith(PREFIX)})

    @classmethod
    def layout(cls, name: str) -> "Blocks":
        """Of a known model, without its keys. Raises TriLoRAError for a name that is not in LAYOUTS."""
        if name not in LAYOUTS:
            raise TriLoRAError(f"layout={name!r}: choose one of {', '.join(LAYOUTS)}")
        layout = LAYOUTS[name]
        table = next(family for family in FAMILIES if family.name == layout.family)
        places = []
        for group, count in layout.encoders.items():
            words = _words(TEXT_ENCODER) | ({"img"} if layout.vision else set())
            outside = [EMB, VISION] if layout.vision and group == "LLM" else [EMB]
            places += [Place(f"{group}.{part}", group, words, "") for part in [*(f"{n:02d}" for n in range(count)), *outside]]
        for ids in table.places:
            group, digits = ids.rstrip("#"), ids.count("#")
            numbers = [f"{n:0{digits}d}" if digits else "" for n in range(layout.blocks.get(group, 0))]
            places += [Place(group + number, group, _words(table), "") for number in numbers]
        return cls(table.name, (), {}, frozenset(), _table=table)._with(places, layout.encoders)

    def place(self, target) -> Place:
        """Where a weight is. target: the host's key, or a tuple (key, (axis, start, length)[, function]).

        Of a fused weight, whose rows are q, k, v of one length h each and then the feed-forward's, a slice has the kind of
        its rows; the whole has the kind "fused" and no other, so that neither `attn` nor `mlp` reaches half of it. A slice
        of the feed-forward begins at 3 h, which can only be taken for k or v where it is 3 h or 1.5 h long; none is.
        """
        key, rows, _ = split_target(target)
        name = key.removesuffix(".weight").removesuffix(".bias")
        if not key.startswith(PREFIX):
            return self._beside(key, name)
        group, number, path = _locate(key.removeprefix(PREFIX), self._table)
        kinds = _kinds(_layer(path), self._table)
        if group in (EMB, BASE) or (group == "IN" and not number):
            kinds |= {"emb"}
        if rows is not None and path.rpartition(".")[0].endswith("linear1") and "fused" in kinds:
            _, start, length = rows
            kinds = kinds - {"fused"} | {"attn" if start in (0, length, 2 * length) else "mlp"}
        return Place(group + number, group, kinds, name)

    def _beside(self, key: str, name: str) -> Place:
        """Of a key outside the denoiser."""
        part, _, path = key.partition(".")
        if part in BESIDE:
            return Place(BASE, BASE, frozenset(), name)
        group = self._encoders.get(part) or _encoder_group(part)
        ids, number, path = _locate(path, TEXT_ENCODER)
        kinds = _kinds(_layer(path), TEXT_ENCODER)
        if ids == VISION:
            kinds |= {"img"}
        return Place(f"{group}.{number or (VISION if ids == VISION else EMB)}", group, kinds, name)

    def _with(self, places: Collection[Place], encoders: Collection[str]) -> "Blocks":
        found: dict[str, set[str]] = {}
        kinds: frozenset[str] = frozenset()
        for place in places:
            found.setdefault(place.group, set()).add(place.block)
            kinds |= place.kinds
        if "fused" in kinds:
            kinds |= {"attn", "mlp"}  # its slices
        texts = sorted(encoders, key=lambda group: (TEXT_GROUPS.index(group) if group in TEXT_GROUPS else len(TEXT_GROUPS), group))
        order = [*texts, *(ids.rstrip("#") for ids in self._table.places), BASE]
        first = sorted(found, key=lambda group: (order.index(group) if group in order else len(order), group))
        groups = {group: tuple(sorted(found[group], key=numbers_first)) for group in first}
        return Blocks(self.family, tuple(block for ids in groups.values() for block in ids), groups, kinds,
                      frozenset(place.name for place in places if place.name), tuple(texts), self._table, self._encoders)


def _family_of(keys: Iterable[str]) -> Family:
    beginnings: set[str] = set()
    for key in keys:
        if key.startswith(PREFIX):
            path = re.sub(r"\.\d+(?=\.)", ".#", key.removeprefix(PREFIX))
            beginnings.update(accumulate(path.split("."), "{}.{}".format))
    return next((family for family in FAMILIES if family.has(beginnings)), GENERIC)


def _encoder_groups(keys: Iterable[str]) -> dict[str, str]:
    """A text encoder's name in the CLIP -> its group; a second one of a group has a number, in the names' order."""
    groups: dict[str, str] = {}
    for part in sorted({key.partition(".")[0] for key in keys if _locate(key.partition(".")[2], TEXT_ENCODER)[1]}):
        group = _encoder_group(part)
        groups[part] = f"{group}{count + 1}" if (count := sum(g.startswith(group) for g in groups.values())) else group
    return groups


def _encoder_group(part: str) -> str:
    return next(group for mark, group in ENCODERS if mark in part)


@cache
def _patterns(table: Family) -> list[tuple[re.Pattern, str, int]]:
    """(pattern of the beginning of a path, group, digits of its number), the longest path first."""
    paths = [(path, ids) for ids, paths in table.places.items() for path in paths.split()]
    return [(re.compile(re.escape(path).replace(r"\#", r"(\d+)") + r"(?:\.|$)"), ids.rstrip("#"), ids.count("#"))
            for path, ids in sorted(paths, key=lambda place: -len(place[0]))]


def _locate(path: str, table: Family) -> tuple[str, str, str]:
    """(group, number in it, the path with # for that number) of a weight."""
    for pattern, group, digits in _patterns(table):
        if match := pattern.match(path):
            return (group, match[1].zfill(digits), f"{path[:match.start(1)]}#{path[match.end(1):]}") if digits else (group, "", path)
    # the first numbered list of modules in it; a number right before the weight's own name counts a layer, no block
    if table is not TEXT_ENCODER and (match := re.match(r"(.+?)\.([0-9]+)\.(?!(?:weight|bias)$)", path)):
        return match[1], f".{(match[2].lstrip('0') or '0').zfill(2)}", f"{match[1]}.#{path[match.end(2):]}"
    return BASE, "", path


def _layer(path: str) -> str:
    return path.removesuffix(".weight").removesuffix(".bias")


@lru_cache(maxsize=4096)
def _kinds(layer: str, table: Family) -> frozenset[str]:
    """Words of KINDS for a layer's path with # for its block's number."""
    fitting = [part for part in table.kinds if f".{part}." in f".{layer}.$."]
    largest = [part for part in fitting if not any(part != other and f".{part}." in f".{other}." for other in fitting)]
    words = {word for part in largest for word in table.kinds[part].split()}
    return frozenset(words | {"norm"} if _is_norm(layer) else words)


def _is_norm(layer: str) -> bool:
    """Whether the layer itself is a normalisation, or holds the numbers of one."""
    inner = next((layer.removesuffix(end) for end in _OF_NORM if layer.endswith(end)), layer)
    for path in (layer, inner):
        _, dot, last = path.lower().rpartition(".")
        if "norm" in last or last.endswith("_ln") or (dot and last.startswith("ln_")):
            return True
    return False


def _words(table: Family) -> frozenset[str]:
    """Every word that a family's layers may have."""
    return frozenset(word for words in table.kinds.values() for word in words.split()) | {"norm", "emb"}


def numbers_first(text: str) -> list[tuple]:
    """Sorts text with its numbers as numbers, and numbers before words."""
    parts = re.split(r"([0-9]+)", text)  # words and numbers in turn; not int(), which takes no number of 5,000 digits
    return [(0, len(part.lstrip("0")), part.lstrip("0")) if number % 2 else (1, 0, part) for number, part in enumerate(parts) if part]
