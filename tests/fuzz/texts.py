"""Random texts of people: block weights of every dialect, plans, schedules, presets, options; and what each must come to.

`random_text(chance)` draws a text by the grammar of its kind, for a model, and mutates every second one; `problem(drawn)`
says what is wrong with what it came to: "" for a TriLoRAError, and for finite numbers that its canonical text repeats, in
bounded time.
"""

from __future__ import annotations

import functools
import json
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from comfyui_trilora.trilora_ops import (
    block_plan,
    block_preset_files,
    block_schedule,
    block_syntax,
    metadata,
    presets,
    resize,
)
from comfyui_trilora.trilora_ops.block_dialects import DIALECTS
from comfyui_trilora.trilora_ops.block_kohya import ARGUMENTS
from comfyui_trilora.trilora_ops.block_presets import BUILT_IN
from comfyui_trilora.trilora_ops.block_vectors import lists_of
from comfyui_trilora.trilora_ops.blocks import LAYOUTS, Blocks, Place
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.registry import Method

from .model_names import flux, sdxl
from .patterns import generated, hostile

SECONDS = 2.0  # of the processor
LONGEST_ERROR = 1000  # characters
USUAL = ("SD1.5", "SDXL", "Flux.1", "SDXL with names", "Flux.1 with names")  # the models of most texts
SIZES = (1, 11, 12, 13, 16, 17, 19, 20, 21, 23, 25, 26, 27, 57, 58, 61)
ODD_WORDS = ["default", "T5", "LLM", "LLM.VIS", "BASE", "M00", "XX", "IN99", "TE1.99", "-", ".", "IN04-", "IN4", "D7", "te1.5", ".attn", ".mlp", "OUT.cross.norm"]
ODD_NUMBERS = ["R", "U", "X", "X+0.5", "A", "a", "B", "b", "r", "u", "1 2", "A 0 0", "", "1e400", "1e10", "-1e308", "nan", "inf", "\u0661\u0662", "0x1", "1_0", "9" * 50,
               "0." + "0" * 400 + "1", "\u00b2", "1e9", ".5", "1.", "+2", "1e-1"]
ODD = ["\n", "\r\n", "\t", " ", "  ", ",", ";", ":", "=", "/", "\\", "(", ")", "[", "]", "{", "}", '"', "'", "-", ".", "%", "@", "<", ">", "|", "*", "+", "\x00", "\u2028", "\ufeff", "\uff0c",
       "\uff1a", "\uff1d", "\u2212", "\u00b2", "\u0661", "\U0001f600", "\ud800", "default=", "lbw=", "LBW=", "<lora:", "e400", "99999999999", "->", "start=", "null", "NaN", "x="]
TIMES = ["0", "0.2", "0.25", "0.5", "0.6", "1", "5/20", "20/20", "1/3"]


@functools.cache
def models() -> dict[str, Blocks]:
    """Layouts of every family, and two models with the names of their weights."""
    of_names = {"SDXL with names": sdxl(), "Flux.1 with names": flux()}
    return {**{name: Blocks.layout(name) for name in LAYOUTS}, **{name: Blocks.of(f"{path}.weight" for path in names) for name, names in of_names.items()}}


@dataclass(frozen=True)
class Drawn:
    """kind: of KINDS; model: of `models`; dialect: as the node has them."""

    kind: str
    text: str
    model: str
    dialect: str = "auto"


def random_text(chance: random.Random) -> Drawn:
    kind, model = chance.choice(list(KINDS)), chance.choice([*USUAL * 10, *models()])
    text = KINDS[kind][0](Draw(chance, models()[model]))
    for _ in range(chance.choice([0, 0, 0, 1, 2, 5])):
        text = mutated(text, chance)
    return Drawn(kind, text, model, chance.choice(["auto"] * 30 + list(DIALECTS)))


def mutated(text: str, chance: random.Random) -> str:
    """The text with a part dropped, doubled, moved, repeated very often, or something odd put in."""
    begin = chance.randrange(len(text) + 1)
    end = min(len(text), begin + chance.choice([1, 1, 2, 5, 20]))
    part, odd = text[begin:end], chance.choice(ODD)
    often = chance.choice([2, 3, 10, 500, 6000, 60000]) if chance.random() < 0.15 else 2
    new = chance.choice(["", part * often, odd, odd + part, odd * often, part[::-1], part.upper(), part.lower(), f"({part})", f"{part}{chance.choice(ODD_NUMBERS)}"])
    return text[:begin] + new + text[end:]


def problem(drawn: Drawn) -> str:
    """What is wrong with what the text came to, "" if nothing is."""
    begin = time.process_time()
    try:
        numbers = list(KINDS[drawn.kind][1](drawn))
    except TriLoRAError as error:
        found = f"an error of {len(str(error))} characters" if not 0 < len(str(error)) <= LONGEST_ERROR else ""
    except Exception as error:  # noqa: BLE001 - any other is what is looked for
        found = f"{type(error).__name__}: {error!s:.200}"
    else:
        found = "" if all(map(math.isfinite, numbers)) else "a number that is not finite"
    seconds = time.process_time() - begin
    return found or (f"{seconds:.1f} s" if seconds > SECONDS else "")


# --- grammars -------------------------------------------------------------------------------------------------------------
class Draw:
    """Draws texts for a model."""

    def __init__(self, chance: random.Random, blocks: Blocks):
        self.chance, self.blocks = chance, blocks
        self.choice = chance.choice
        self.is_of_plan = False

    def rarely(self) -> bool:
        return self.chance.random() < 0.05

    def number(self) -> str:
        if self.rarely():
            return self.choice(ODD_NUMBERS)
        if self.is_of_plan:
            return self.choice(["0", "1", "4", "8", "16"])
        return self.choice(["0", "1", "0.5", "-1", "8", "4", f"{self.chance.uniform(-1, 2):.{self.chance.randint(0, 4)}f}"])

    def selector(self) -> str:
        if self.rarely():
            return self.choice(ODD_WORDS)
        if self.rarely():
            return f"/{self.choice([generated(self.chance), hostile(self.chance), 'to_[qk]', 'attn', 'blocks'])}/"
        group, members = self.choice(list(self.blocks.groups.items()))
        name = self.choice([group, self.choice(members), f"{self.choice(members)}-{self.choice(members)}", ""])
        kind = self.choice(sorted(self.blocks.kinds)) if self.blocks.kinds and (not name or self.choice([True, False])) else ""
        return f"{name}.{kind}" if kind else name or "TE"

    def native(self) -> str:
        count, between = self.chance.randint(1, 8), self.choice([", ", ",", "\n", ",\n "])
        return between.join(f"{self.selector()}{self.choice(['=', ' = '])}{self.number()}" for _ in range(count))

    def list(self) -> str:
        sizes = [len(kind.slots) for kind in lists_of(self.blocks)] or [17]
        size = self.choice(SIZES) if self.rarely() else self.choice(sizes)
        value = self.choice([lambda: self.choice(["0", "1"]), self.number])
        return self.choice([",", ", ", "\n", ",\n"]).join(value() for _ in range(size))

    def labelled(self) -> str:
        return self.choice(["NAME:", "NAME\t", "1\tNAME\t", "N A M E: ", "@X:", "", ""]) + self.list()

    def preset(self) -> str:
        return self.choice(list(BUILT_IN))

    def tag(self) -> str:
        inside = self.choice([self.list, self.list, self.preset, self.percent, lambda: "lbw=MIDD"])()
        forms = ["lbw={}", "lbw={}:x={}", "LBW={};A={};B={};", "<lora:f:1:lbw={}>", "<lora:f:0.5:1:LBW={};A={}>", "lbw={}:start={}", "lbw={}:lbwe=ATTN"]
        return self.choice(forms).format(inside, self.number(), self.number())

    def percent(self) -> str:
        words = ["default", "base", "in1-3", "in2", "out", "mid", "mid2", "double7-12", "single3", "layer18-25", "block2", "te1", "other", "in99", "in3-1", "in" + "9" * 12]
        return self.choice(["%", ""]) + ",".join(f"{self.choice(words)}={self.number()}" for _ in range(self.chance.randint(1, 3)))

    def kohya(self) -> str:
        values = {"down_lr_weight": self.rates, "mid_lr_weight": self.number, "up_lr_weight": self.rates, "block_lr_zero_threshold": self.number,
                  "network_reg_dims": self.patterns, "network_reg_lrs": self.patterns, "train_blocks": lambda: self.choice(["all", "single", "double", "transformer"]),
                  "block_dims": self.list, "conv_block_alphas": self.list, "block_lr": self.list}
        names = [self.choice([*ARGUMENTS, *values]) for _ in range(self.chance.randint(1, 2))]
        return self.choice([" ", "\n", '" "']).join(f"{name}={values.get(name, self.indices)()}" for name in names)

    def rates(self) -> str:
        length = len(self.blocks.groups.get("IN", "x"))
        return self.choice(["sine+.5", "cosine", "zeros", "linear+1", ",".join(self.number() for _ in range(length))])

    def indices(self) -> str:
        return self.choice(["all", "none", "0", "0,1,3-5", "2-1", "0-999999999", "0-" + "9" * 30])

    def patterns(self) -> str:
        return ",".join(f"{generated(self.chance)}={self.number()}" for _ in range(self.chance.randint(1, 3)))

    def json(self) -> str:
        found = self.value(0)
        return json.dumps(found if isinstance(found, (list, dict)) else [found])

    def value(self, depth: int):
        if depth > 2 or self.chance.random() < 0.3:
            return self.choice([0, 1, 0.5, -1]) if not self.rarely() else self.choice([True, None, "1", 1e308, 10**30, float("inf")])
        if self.chance.random() < 0.3:
            return [self.value(3) for _ in range(self.choice([1, 2, 3, 12, 17, 20, 26]))]
        keys = ["text_encoder", "text_encoder_2", "unet", "transformer"] if not depth else ["down", "mid", "up"] if depth == 1 else ["block_0", "block_1", "block_9"]
        return {self.choice(keys): self.value(depth + 1) for _ in range(self.chance.randint(1, 3))}

    def changed(self) -> str:
        return f"{self.choice([self.preset, self.labelled, self.tag, self.json])()}{self.choice([', ', chr(10), ','])}{self.native()}"

    def test_line(self) -> str:
        return f"@T:{self.choice([12, 17, 20, 21, 27, 58, 10**9])}{self.choice(['', '', f',{self.choice(SIZES)},{self.choice(SIZES)}'])}"

    def weights(self) -> str:
        forms = [self.native, self.native, self.native, self.list, self.labelled, self.tag, self.percent, self.kohya, self.json, self.changed, self.preset, self.test_line,
                 lambda: "IN05-OUT05:attn:1"]
        return self.choice(forms)()

    def plan(self) -> str:
        self.is_of_plan = True
        return self.weights()

    def curve(self) -> str:
        times = sorted(self.choice(TIMES) for _ in range(self.chance.randint(1, 5)))
        if self.rarely():
            times.append(self.choice(["1.5", "-1", "5/0", "1e400", "", "0/5", "/", "1/3/4"]))
        points = ", ".join(f"{t}:{self.number()}" for t in times)
        change = " -> ".join(self.number() for _ in range(self.chance.randint(2, 4)))
        window = f"{self.number()} start={times[0]} stop={times[-1]}"
        curve = self.choice([self.number(), points, change, window, f"step={times[0]}-{times[-1]}"])
        return curve + ("" if "=" in curve else self.choice(["", "", " cosine", " ease_in_out", " step"]))

    def schedule(self) -> str:
        lines = [f"{', '.join(self.selector() for _ in range(self.chance.randint(1, 3)))}: " if self.chance.random() < 0.7 else "" for _ in range(self.chance.randint(1, 5))]
        return self.choice(["\n", "; ", ";\n"]).join(line + self.curve() for line in lines)

    def preset_file(self) -> str:
        names = ["A", "B", "C", "D", "preset_name", "E", "#", "@T"] + (["N" * 200, ""] if self.rarely() else [])
        return "\n".join(f"{self.choice(names)}{self.choice([':', ':', chr(9)])}{self.weights().replace(chr(10), ' ')}" for _ in range(self.chance.randint(1, 4)))

    def options(self) -> str:
        known = {"alpha": self.number, "ring_init": lambda: self.choice(["paper", "noise", "x"]), "factors": lambda: self.choice(["4x8x10", "4", "0x1", "x"]), "rank": self.number,
                 "residual.alpha": self.number, "odd": self.number}
        names = [self.choice(list(known)) for _ in range(self.chance.randint(0, 2))]
        return ", ".join(f"{name}={'9' * 5000 if self.rarely() else known[name]()}" for name in names)

    def plan_metadata(self) -> str:
        method = Method().options if not self.rarely() else self.choice([{}, {"residual": 1}, {"residual": {"kind": []}, "transform": 1}, 3])
        entry = {"rank": self.plan(), "alpha": "", "learning_rate": "OUT=0.5" if not self.rarely() else 3, "method": self.choice([None, method])}
        return json.dumps(entry) if self.rarely() else json.dumps([entry] * self.choice([1, 1, 2, 99, 0, 101]))


# --- readers: what each gives as numbers ------------------------------------------------------------------------------------
def _at(found: block_syntax.BlockWeights, blocks: Blocks) -> list[float]:
    every = [Place(block, group, frozenset(), f"diffusion_model.{block}.attn2.to_q") for group, members in blocks.groups.items() for block in members]
    return [found.default, *(found.at(place) for place in every)]


def read_weights(drawn: Drawn) -> list[float]:
    blocks = models()[drawn.model]
    found = block_syntax.expand(drawn.text, blocks, drawn.dialect, a=0.5, b=-0.25, seed=1)
    for one in found[:1]:
        again = block_syntax.parse(one.text(), blocks)
        assert _at(again, blocks) == _at(one, blocks), f"its canonical text means something else: {one.text():.200}"
    return [number for one in found for number in _at(one, blocks)]


def read_plan(drawn: Drawn) -> list[float]:
    field = ("rank", "alpha", "learning_rate")[len(drawn.text) % 3]
    plan = block_plan.BlockPlan(**{field: drawn.text}).read(models()[drawn.model], Method())
    layers = [layer for path in (*sdxl()[::40], *flux()[::40]) if (layer := plan.at(f"{path}.weight"))]
    return [number for layer in layers for number in (layer.rate, layer.method.residual.rank, layer.method.residual.alpha)]


def read_schedule(drawn: Drawn) -> list[float]:
    found = block_schedule.parse(drawn.text)
    assert block_schedule.parse(found.text()) == found, f"its canonical text means something else: {found.text():.200}"
    placed = found.on(models()[drawn.model], strict=False)
    curves = [*found.curves, *(curve for _, curve in placed.rules)][:200]
    return [curve.at(t / 10) for curve in curves for t in range(11)]


def read_presets(drawn: Drawn) -> list[float]:
    return [preset.line for preset in block_preset_files.preset_lines(drawn.text)]


def read_options(drawn: Drawn) -> list[float]:
    pairs = list(presets.pairs())
    method = presets.build_method(pairs[len(drawn.text) % len(pairs)], 0, 0, drawn.text)
    parts = (*vars(method.residual).values(), *vars(method.transform).values())
    return [value for value in parts if isinstance(value, (int, float))]


def read_gains(drawn: Drawn) -> list[float]:
    return resize.read_gains(drawn.text)


def read_plan_metadata(drawn: Drawn) -> list[float]:
    plan = block_plan.from_metadata(drawn.text)
    assert block_plan.from_metadata(block_plan.to_metadata(plan)) == plan
    return []


def read_provenance(drawn: Drawn) -> list[float]:
    return [len(metadata.reworked({"trilora.provenance": drawn.text}, {}, {"action": "resize"}))]


KINDS: dict[str, tuple[Callable[[Draw], str], Callable[[Drawn], Iterable[float]]]] = {
    "weights": (Draw.weights, read_weights),
    "plan": (Draw.plan, read_plan),
    "schedule": (Draw.schedule, read_schedule),
    "presets": (Draw.preset_file, read_presets),
    "options": (Draw.options, read_options),
    "gains": (Draw.list, read_gains),
    "plan metadata": (Draw.plan_metadata, read_plan_metadata),
    "provenance": (Draw.json, read_provenance),
}
