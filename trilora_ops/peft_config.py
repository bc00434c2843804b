"""The configuration that peft and diffusers keep beside an adapter's tensors.

peft writes it to `adapter_config.json` beside `adapter_model.safetensors`; diffusers writes it into the file's metadata,
`lora_adapter_metadata`, one set of fields for each part of the model ("unet.lora_alpha"). What its fields mean for the
tensors is in `peft_tuners`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .bounds import FILE, PATTERNS, check_count, read_json
from .errors import TriLoRAError
from .patterns import Pattern

IN_METADATA = "lora_adapter_metadata"
BESIDE = {"adapter_model.safetensors": "adapter_config.json"}
WRAPPER = "base_model.model."  # what peft puts before every module's name
_MOST_PARTS = 16
_DEEPEST = 64  # dots in a pattern's name
_LONGEST = 1000  # letters of a module's name that expressions are matched with
# a part of the configuration is one if it has at least one of these
_FIELDS = {"peft_type", "lora_alpha", "alpha"}


@dataclass(frozen=True)
class Component:
    """The configuration of one part of a model.

    prefix: how the names of its layers begin in the file, "unet." and the like, or "" for all of the file; fields: those of
    peft's configuration class.
    """

    prefix: str
    fields: Mapping

    @property
    def tuner(self) -> str:
        """peft's name of the kind of adapter, LoRA where none is given."""
        return shown(self.fields.get("peft_type") or "LORA").upper()

    def module(self, name: str) -> str:
        """A layer's name in the file as peft's patterns see it."""
        return name.removeprefix(self.prefix).removeprefix(WRAPPER)

    def numbers(self, field: str, patterns: str = "") -> Callable[[str], float]:
        """Function: a layer's name in the file -> its number, that of `field` but where one of `patterns` says another.

        patterns: a field of pattern -> number; the first that names the layer holds. Raises TriLoRAError, also from the
        function, where it is no positive number, or a pattern cannot be read.
        """
        exceptions = Exceptions(self.fields.get(patterns) if patterns else None, f"{self.prefix}{patterns}")
        default = self.fields.get(field)
        return lambda layer: _positive(exceptions.of(self.module(layer), default), f"{self.prefix}{field}")


class Exceptions:
    """What peft's `alpha_pattern` and `rank_pattern` say of single modules: names or regular expressions (`patterns`), found at
    the end of a module's name, behind a dot or from its start; the first that fits holds."""

    def __init__(self, patterns, field: str):
        """Raises TriLoRAError for what is no object of patterns, and for an expression that is not read."""
        if patterns is not None and not isinstance(patterns, dict):
            raise TriLoRAError(f"{field}={shown(patterns)}: expected names of modules with their numbers; the file is broken")
        self._values = list((patterns or {}).values())
        # a name -> its place among the patterns: at the end of a module's name, or all of it
        self._ends: dict[str, int] = {}
        self._whole: dict[str, int] = {}
        self._expressions: list[tuple[int, Pattern]] = []
        for place, pattern in enumerate(patterns or ()):
            literal = pattern.removeprefix("^")
            if re.fullmatch(r"[\w.]+", literal):
                (self._ends if literal == pattern else self._whole).setdefault(literal, place)
                continue
            check_count(len(self._expressions) + 1, f"{field}: expressions", PATTERNS)
            try:
                self._expressions.append((place, Pattern(rf"(.*\.)?({pattern})")))
            except TriLoRAError as error:
                raise TriLoRAError(f"{field}={shown(pattern)}: {error}; save the adapter with each layer's alpha in its tensors instead") from None

    def of(self, module: str, default):
        """The value for a module."""
        parts = module.split(".")
        ends = (".".join(parts[start:]) for start in range(max(0, len(parts) - _DEEPEST), len(parts)))
        places = [self._ends[end] for end in (module, *ends) if end in self._ends]
        if module in self._whole:
            places.append(self._whole[module])
        best = min(places, default=len(self._values))
        if self._expressions and len(module) > _LONGEST:
            raise TriLoRAError(f"{shown(module)}: a name of {len(module):,} letters, which no expression is matched with; the file is broken")
        best = next((place for place, pattern in self._expressions if place < best and pattern.fullmatch(module)), best)
        return self._values[best] if best < len(self._values) else default


def read_config(path: Path, metadata: Mapping[str, str]) -> list[Component]:
    """What belongs to a file, a part whose layers' names begin with another's prefix first; [] where there is nothing.

    Raises TriLoRAError if it is no JSON object.
    """
    text, place = metadata.get(IN_METADATA), IN_METADATA
    beside = path.parent / BESIDE.get(path.name, "")
    try:
        if text is None and beside.is_file():
            place = beside.name
            with beside.open("rb") as file:
                text = file.read(FILE + 1).decode("utf-8-sig")
        config = read_json(text) if text is not None else {}
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}")
    except (ValueError, RecursionError, OSError) as error:
        raise TriLoRAError(f"{place}: expected a JSON object with the adapter's configuration, got {error}; "
                           "without it the adapter's scale is unknown; copy or download it again") from None
    return _components(config)


def component_of(name: str, components: list[Component]) -> Component | None:
    """The configuration that a layer's name in the file falls under, None where there is none."""
    return next((component for component in components if name.startswith(component.prefix)), None)


def shown(value, longest: int = 40) -> str:
    """A value of a file for a message, cut where it is very long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def _components(config: Mapping) -> list[Component]:
    parts: dict[str, dict] = {}
    for key, value in config.items():
        head, dot, field = key.rpartition(".")
        parts.setdefault(head + dot, {})[field] = value
    found = [Component(prefix, fields) for prefix, fields in parts.items() if _FIELDS & fields.keys()]
    if len(found) > _MOST_PARTS:
        raise TriLoRAError(f"a configuration of {len(found)} parts of a model: at most {_MOST_PARTS} are read; the file is broken")
    return sorted(found, key=lambda component: len(component.prefix), reverse=True)


def _positive(value, what: str) -> float:
    # 1e19: the square root of what fp32 holds, so that its multiples are finite too
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e19:
        raise TriLoRAError(f"{what}={shown(value)}: expected a positive number; the file is broken")
    return float(value)
