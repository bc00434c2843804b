"""Texts that are meant to hang or flood: each comes to an end within two seconds of the processor, errors are short."""

import json
import math
import random
import time

import pytest
from comfyui_trilora.trilora_ops import block_schedule, metadata
from comfyui_trilora.trilora_ops.block_plan import BlockPlan, from_metadata
from comfyui_trilora.trilora_ops.block_preset_files import preset_lines
from comfyui_trilora.trilora_ops.block_syntax import expand, parse
from comfyui_trilora.trilora_ops.blocks import Blocks
from comfyui_trilora.trilora_ops.bounds import FILE, NESTING, TEXT, read_json
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.presets import build_method
from comfyui_trilora.trilora_ops.ranks_text import ranks_as_text
from comfyui_trilora.trilora_ops.registry import Method
from comfyui_trilora.trilora_ops.resize import read_gains

from .fuzz import texts
from .fuzz.model_names import flux, sdxl
from .fuzz.patterns import hostile

SECONDS = 2.0
MODELS = {"SDXL": Blocks.of(f"{name}.weight" for name in sdxl()), "Flux.1": Blocks.of(f"{name}.weight" for name in flux()), "layout": Blocks.layout("SD1.5")}
chance = random.Random(0)
WEIGHTS = {
    "spaces": "1" + " " * 30000 + "2", "spaces behind": "1" + " " * 200000 + "x", "line ends": "1" + "\n" * 200000 + "x", "line ends before a comma": "\n" * 200000 + ",", "commas": "," * 100000,
    "items": "IN04=1," * 20000, "items of parts": ",".join(f"IN04.{kind}={n}" for n, kind in enumerate(["attn", "mlp", "self", "cross", "norm"] * 1000)), "kinds of all": ".attn=1," * 5000,
    "patterns": "/attn/=1," * 20000, "slow patterns": ",".join(f"/{hostile(chance).replace('/', '')}|attn/=0" for _ in range(100)), "dots": "IN" + ".a" * 50000 + "=1", "a few dots": "IN" + ".a" * 900 + "=1",
    "zeros": "IN" + "0" * 1000000 + "4=1", "digits": "IN04=" + "1" * 1900 + "x", "digits of a slot": "1" * 100000 + "x,1", "exponent": "IN04=1e999", "large": "IN04=1e10", "many digits": "IN04=" + "9" * 5000,
    "tags": "lbw=" * 2000, "tags in capitals": "LBW=" * 500, "tags of a prompt": "<lora:" * 20000, "colons of a tag": "<lora:" + ":w=" * 60000, "options of a tag": "lbw=MIDD" + ":x=1" * 50000,
    "test of single weights": "@F:17,999999999,8", "test of many slots": "@F:999999999", "spaces of a test": "@F:" + " " * 200000 + "x", "brackets": "/" + "(" * 5000 + "a" + ")" * 5000 + "/=1",
    "brackets within the bound": "/" + "(" * 400 + "a" + ")" * 400 + "/=1", "repetition": "/a{99999999999999}/=1", "repetitions": "/(?:(?:(?:a{1,500}){1,500}){1,500})/=1", "JSON": "[" * 100000,
    "JSON of names": '{"a":' * 50000, "JSON of digits": "[" + "9" * 100000 + "]", "JSON of quotes": "[" + '"' + '\\"' * 100000, "list": "1," * 130000, "random list": "R," * 100000,
    "random slot": "1," * 16 + "R " * 100000, "learning rates": "down_lr_weight=1" + " " * 100000 + ",2", "arguments": "network_reg_dims=" * 10000, "patterns of sd-scripts": "network_reg_dims=" + "(a+)+$=1," * 5000,
    "names of sd-scripts": "network_reg_dims=" + "a=1," * 60000, "per cent": "%" + "in1=1," * 30000, "elemental": "a:b:1," * 40000, "changes": "SD-FACE" + ",IN04=1" * 6000, "two readings": ", ".join(f"in{n % 9}=0.{n}" for n in range(4900)),
    "unicode digits": "IN\u0660\u0664=\u0661", "superscript": "IN\u00b2=1", "half a sign": "\ud800=1,\ud800", "unknown": "x" * 262000, "a word of letters": "normnorm" * 30000, "slashes": "/a," * 80000,
    "backslashes": "/" + "\\," * 100000,
}  # fmt: skip
SCHEDULES = {
    "lines": "IN: 1 -> 0 cosine\n" * 14000, "points": "IN: " + "0:1, " * 50000, "points in turn": "IN: " + ", ".join(f"{n / 499}:{n % 2}" for n in range(499)), "spaces": "IN:" + " " * 100000 + "x",
    "spaces within": "1" + " " * 200000 + "2", "selectors": "IN,  " * 50000, "selectors with a curve": ",  ".join(["IN"] * 6000) + ": 1", "arrows": "0 -> " * 50000 + "1", "window": "start=0 " * 30000,
    "slashes": "/a, " * 60000, "semicolons": ";" * 250000, "extremes": "IN: 1e9 -> -1e9 -> 1e9 cosine", "colons": ":" * 200000, "steps": "0/" + "0" * 200000 + "1:1",
}  # fmt: skip
PRESETS = {
    "lines": "A:1,1\n" * 100000, "names": "".join(f"A{n}:1,1,1,1,1,1,1,1,1,1,1,1\n" for n in range(20000)), "colons": "A:" + ":" * 100000, "spaces": "A:1" + " " * 100000 + "2", "a long name": "A" * 1000000 + ":1",
    "clashes": "".join(f"A:{n}\n" for n in range(90000)), "tabs": "A\t" * 100000, "larger": "A:1\n" * 300000, "elements": "A:" + "a:b:1," * 100000,
}  # fmt: skip
FILES = {"brackets": "[" * 100000, "digits": "[" + "9" * 100000 + "]", "plans": json.dumps([{"rank": "", "alpha": "", "learning_rate": "", "method": None}] * 5000), "kind": json.dumps([{"rank": "", "alpha": "",
         "learning_rate": "", "method": {"residual": {"kind": "lora", "x" * 100000: 1}, "transform": {"kind": "none"}}}]), "number": "3", "quotes": '["' + '\\"' * 400000, "larger": "[" + "1," * 600000 + "1]"}  # fmt: skip


def bounded(read, text: str):
    """What `read` gives, None for an error of ours; fails where it takes too long or says too much."""
    begin, found = time.process_time(), None
    try:
        found = read(text)
    except TriLoRAError as error:
        assert len(str(error)) < 1000, f"{len(str(error))} characters: {error!s:.300}"
    assert time.process_time() - begin < SECONDS
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_block_weights(name, model):
    """Their numbers at every weight are finite, too."""
    def read(text: str) -> list[float]:
        places = [MODELS[model].place(f"{path}.weight") for path in (*sdxl(), *flux())]
        return [weights.at(place) for weights in expand(text, MODELS[model], seed=1) for place in places]

    assert all(map(math.isfinite, bounded(read, WEIGHTS[name]) or ()))


@pytest.mark.parametrize("name", WEIGHTS)
def test_plans(name):
    bounded(lambda text: BlockPlan(rank=text).read(MODELS["SDXL"], Method()), WEIGHTS[name])
    bounded(lambda text: BlockPlan(learning_rate=text).read(MODELS["Flux.1"], Method()), WEIGHTS[name])


@pytest.mark.parametrize("name", [*SCHEDULES, *WEIGHTS])
def test_schedules(name):
    def read(text: str) -> list[float]:
        placed = block_schedule.parse(text).on(MODELS["SDXL"], strict=False)
        return [placed.at(MODELS["SDXL"].place(f"{path}.weight")).at(0.3) for path in sdxl()]

    assert all(map(math.isfinite, bounded(read, {**WEIGHTS, **SCHEDULES}[name]) or ()))


@pytest.mark.parametrize("name", PRESETS)
def test_files_of_presets(name):
    bounded(preset_lines, PRESETS[name])


@pytest.mark.parametrize("name", FILES)
def test_metadata_of_files(name):
    bounded(from_metadata, FILES[name])
    bounded(lambda text: metadata.reworked({"trilora.provenance": text}, {}, {}), FILES[name])


@pytest.mark.parametrize("name", WEIGHTS)
def test_options_and_gains(name):
    bounded(lambda text: build_method("TLoRA*", 0, 0, text), WEIGHTS[name])
    assert all(map(math.isfinite, bounded(read_gains, WEIGHTS[name]) or ()))


@pytest.mark.parametrize("read", [lambda text: parse(text, MODELS["SDXL"]), lambda text: BlockPlan(rank=text).read(MODELS["SDXL"], Method()), block_schedule.parse, preset_lines, from_metadata,
                                  lambda text: build_method("TLoRA*", 0, 0, text), read_gains])  # fmt: skip
@pytest.mark.parametrize("part", ["x", "IN04=1,", "1,", "/", "[", '"', "A:1\n", "\U0001f600", "é\n"])
def test_a_megabyte_gives_a_short_error(read, part):
    bounded(read, (part * 2**20)[: 2**20])


def test_the_largest_text_that_we_write_ourselves_is_read():
    """Every layer of a model with a rank of its own, by name: what Plan from Adapter makes of a file of adaptive ranks."""
    blocks = MODELS["SDXL"]
    ranks = {f"{name}.weight": 1 + number % 97 for number, name in enumerate(sdxl())}
    text = ranks_as_text(ranks, blocks)
    assert len(text) > 60_000 and len(text) < TEXT
    begin = time.process_time()
    plan = BlockPlan(rank=text).read(blocks, Method())
    assert all(plan.at(key).method.residual.rank == rank for key, rank in ranks.items())
    assert time.process_time() - begin < 2 * SECONDS


def test_json_is_read_up_to_its_bounds():
    assert read_json("[" * NESTING + "]" * NESTING) and read_json('["' + "[{" * 1000 + '\\""]') and read_json(f"[{10**39}]") == [10**39]
    for text, words in (("[" * (NESTING + 1) + "]" * (NESTING + 1), "brackets within"), (f"[{10**40}]", "41 digits"), ('"' + "x" * FILE + '"', "at most 1,048,576"), ('["', "Unterminated")):
        with pytest.raises(ValueError, match=words):
            read_json(text)


@pytest.mark.parametrize("seed", range(3))
def test_random_texts_come_to_an_error_of_ours_or_to_finite_numbers(seed):
    """A few seconds of the fuzzer in tests/fuzz/texts.py."""
    drawn_from = random.Random(seed)
    for _ in range(1500):
        drawn = texts.random_text(drawn_from)
        assert not (problem := texts.problem(drawn)), f"{problem}: {drawn!r:.600}"
