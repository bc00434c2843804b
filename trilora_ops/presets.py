"""Pairs of transform and residual by name, and a method from such a name, two sizes and a line of options.

Everything comes from the registry at the moment of the call, so a kind registered later has its pairs too. A
configuration's SIZE names the field that its size sets, or is None where it has no size. Fields are numbers, words or
tuples of whole numbers, and have a default.
"""

from __future__ import annotations

import dataclasses

from . import registry
from .bounds import ITEM, check_length, quoted
from .errors import TriLoRAError
from .registry import Method

# the methods that have a name of their own, each W' = W0*T + R
PRESETS = {
    "TLoRA": ("tensor_ring", "tensor_ring"),
    "TLoRA*": ("tensor_ring", "lora"),
    "DoRA-like": ("diagonal", "lora"),
    "OFT-like": ("block_orthogonal", "none"),
}
_READ = {int: int, float: float, str: str, tuple: lambda text: tuple(map(int, text.split("x")))}


def pairs() -> dict[str, tuple[str, str]]:
    """Name -> (kind of transform, kind of residual): the presets, then all other pairs with a transform as "t + r"."""
    found = dict(PRESETS)
    for transform in registry.TRANSFORMS:
        for residual in registry.RESIDUALS:
            if transform != "none" and (transform, residual) not in found.values():
                found[f"{transform} + {residual}"] = (transform, residual)
    return found


def build_method(pair: str, transform_size: int = 0, rank: int = 0, options: str = "") -> Method:
    """The method of a pair.

    transform_size, rank: of transform and residual, 0 = the kind's own default; a kind without a size ignores it.
    options: "ring_init=paper, alpha=2, factors=4x8x10", by the names of the configurations' fields; a name that both
        have is written transform.name or residual.name. Raises TriLoRAError for an unknown pair, an unknown, ambiguous
        or repeated name, a value of another type, and whatever the configurations refuse.
    """
    if pair not in pairs():
        raise TriLoRAError(f"pair={quoted(pair)}: choose one of {', '.join(pairs())}")
    transform, residual = pairs()[pair]
    configs = {"transform": registry.TRANSFORMS[transform], "residual": registry.RESIDUALS[residual]}
    values: dict[str, dict] = {part: {} for part in configs}
    for part, size in (("transform", transform_size), ("residual", rank)):
        if size and configs[part].SIZE:
            values[part][configs[part].SIZE] = size
    check_length(options, "options: the text", ITEM)
    for entry in filter(None, map(str.strip, options.split(","))):
        name, equals, text = (word.strip() for word in entry.partition("="))
        part, field = _find(name if equals else entry, pair, configs)
        if not equals:
            raise TriLoRAError(f"options: {quoted(entry)} has no value; write {_written(name, field)}")
        if field.name in values[part]:
            raise TriLoRAError(f"options: {name} is given twice, where a size above 0 counts; leave one out")
        try:
            values[part][field.name] = _READ[type(field.default)](text)
        except ValueError:
            raise TriLoRAError(f"options: {quoted(entry)} cannot be read; write {_written(name, field)}") from None
    return Method(**{part: config(**values[part]) for part, config in configs.items()})


def sizes() -> dict[str, list[str]]:
    """"transform" and "residual" -> "kind: field" of every kind that has a size, for tooltips."""
    return {part: [f"{kind}: {config.SIZE}" for kind, config in kinds.items() if config.SIZE]
            for part, kinds in (("transform", registry.TRANSFORMS), ("residual", registry.RESIDUALS))}


def _find(name: str, pair: str, configs: dict[str, type]) -> tuple[str, dataclasses.Field]:
    known = {f"{part}.{field.name}": (part, field) for part, config in configs.items() for field in dataclasses.fields(config)}
    full = [key for key in known if name in (key, key.partition(".")[2])]
    if len(full) != 1:
        offered = ", ".join(_written(key, field) for key, (_, field) in known.items()) or "no options"
        problem = f"is both {' and '.join(full)}" if full else "is unknown"
        raise TriLoRAError(f"options: {quoted(name)} {problem}; {pair} has {offered}")
    return known[full[0]]


def _written(name: str, field: dataclasses.Field) -> str:
    if isinstance(field.default, tuple):
        return f"{name}={'x'.join(map(str, field.default or (4, 8, 10)))}" + ("" if field.default else " (default: chosen from the layer's size)")
    return f"{name}={field.default}"
