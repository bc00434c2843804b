"""The text of a schedule: what each form of a curve means, how few switches follow it, and what is refused with the line."""

import math
import random

import pytest
from comfyui_trilora.trilora_ops.block_schedule import EASINGS, Curve, Schedule, parse, read_curve, steps
from comfyui_trilora.trilora_ops.blocks import Blocks
from comfyui_trilora.trilora_ops.errors import TriLoRAError

# text -> canonical text, and strengths at times
CURVES = {
    "1": ("1", {0: 1, 0.5: 1, 1: 1}),
    "-.25": ("-0.25", {0.3: -0.25}),
    "1/4": ("0.25", {0.9: 0.25}),
    "0:.2,.5:.8,1:1.0": ("0:0.2, 0.5:0.8, 1:1", {0: 0.2, 0.25: 0.5, 0.5: 0.8, 0.75: 0.9}),
    ".2:1, .6:0": ("0.2:1, 0.6:0", {0: 1, 0.2: 1, 0.4: 0.5, 0.6: 0, 0.9: 0}),
    "0 : 1 , 5/20 : 0": ("0:1, 0.25:0", {0.125: 0.5, 0.25: 0}),
    "0:0, 1:1 step": ("0", {0.99: 0}),
    "0:.2, .5:.8, .75:1 STEP": ("0:0.2, 0.5:0.8, 0.75:1 step", {0.49: 0.2, 0.5: 0.8, 0.74: 0.8, 0.75: 1}),
    "0:1, .5:1, .5:0, 1:1": ("0.5:1, 0.5:0, 1:1", {0.4: 1, 0.5: 0, 0.75: 0.5}),
    "1 -> 0": ("0:1, 1:0", {0: 1, 0.3: 0.7}),
    "1->0 cosine": ("0:1, 1:0 cosine", {0.25: (1 + math.cos(math.pi / 4)) / 2, 0.5: 0.5}),
    "0 -> 1 ease-in": ("0:0, 1:1 ease_in", {0.5: 0.25}),
    "0 -> 1 ease_out": ("0:0, 1:1 ease_out", {0.5: 0.75}),
    "0 -> 1 ease_in_out": ("0:0, 1:1 cosine", {0.5: 0.5}),
    "0 -> 1 -> .5 -> 0": ("0:0, 0.3333333333333333:1, 0.6666666666666666:0.5, 1:0", {1 / 6: 0.5, 0.5: 0.75}),
    "start=.2 stop=.6": ("0:0, 0.2:1, 0.6:0 step", {0: 0, 0.19: 0, 0.2: 1, 0.59: 1, 0.6: 0}),
    "0.8 start=5/20": ("0:0, 0.25:0.8 step", {0.2: 0, 0.25: 0.8, 1: 0.8}),
    "stop=.5": ("0:1, 0.5:0 step", {0: 1, 0.49: 1, 0.5: 0}),
    "start=.2:stop=.6": ("0:0, 0.2:1, 0.6:0 step", {0.4: 1}),
    "step=.2-.6": ("0:0, 0.2:1, 0.6:0 step", {0.4: 1, 0.7: 0}),
    "STEP=4/20-12/20": ("0:0, 0.2:1, 0.6:0 step", {0.4: 1}),
    "start=0 stop=1": ("1", {0: 1, 0.99: 1}),
    "0:.5, .3:.5, 1:.5 cosine": ("0.5", {0.7: 0.5}),
    "0:1, .2:1, .3:1, .6:0, .8:0, 1:0": ("0.3:1, 0.6:0", {0.25: 1, 0.45: 0.5, 0.7: 0}),
}


@pytest.mark.parametrize("text", CURVES)
def test_a_curve_and_its_canonical_text(text):
    canonical, values = CURVES[text]
    curve = read_curve(text)
    assert curve.text() == canonical and read_curve(canonical) == curve
    for t, value in values.items():
        assert curve.at(t) == pytest.approx(value, abs=1e-12), t


def test_easings_go_from_one_end_to_the_other():
    assert set(EASINGS) == {"linear", "cosine", "ease_in", "ease_out", "step"}
    for name, way in EASINGS.items():
        shares = [way(i / 100) for i in range(101)]
        assert shares[0] == 0 and shares == sorted(shares) and (shares[-1] == 1 or name == "step")


def test_a_text_of_several_lines():
    schedule = parse("IN00-IN03, MID: 1 -> 0 cosine;  OUT.cross: start=.2 stop=5/20\n\n0.5 \n/ff|attn(?:1|2), x/: 0:0, 1:1; MID: 2")
    assert schedule.text() == ("default: 0.5\nIN00-IN03: 0:1, 1:0 cosine\nMID: 0:1, 1:0 cosine\nOUT.cross: 0:0, 0.2:1, 0.25:0 step\n"
                               "/ff|attn(?:1|2), x/: 0:0, 1:1\nMID: 2")  # fmt: skip
    assert parse(schedule.text()) == schedule and len(schedule.curves) == 5
    assert parse("") == parse(" \n;; ") == parse("default: 1") == Schedule() and parse("").text() == "default: 1"
    assert parse("default: 0:1, .5:0\nIN: 1") == parse("IN: 1; 0:1, .5:0"), "default may stand anywhere"
    assert parse(".mlp: .5").rules[0][0] == ".mlp" and parse(".5").default == Curve(((0.0, 0.5),))


def test_text_is_read_as_that_of_block_weights_is():
    """Its characters, its numbers, its patterns with a ";" in them, its default."""
    for text in ("IN: \u22121", "IN\uff1a -1", "IN \uff1a \u22121\uff1b"):
        assert parse(text) == parse("IN: -1")
    assert parse("IN\uff0cMID\uff1a 0\uff1a1\u3001 1\uff1a0") == parse("IN, MID: 0:1, 1:0") and parse("start\uff1d.2 stop=5/20") == parse("start=.2 stop=5/20")
    schedule = parse(r"/a;b\/c/: 1; IN, /x;y/.: 0.5; stop=5/20; 1/4; DEFAULT: 3/4; OUT: 5/20")
    assert schedule.rules == tuple((name, Curve(((0.0, value),))) for name, value in ((r"/a;b\/c/", 1.0), ("IN", 0.5), ("/x;y/.", 0.5), ("OUT", 0.25)))
    assert schedule.default == Curve(((0.0, 0.75),)) and parse(schedule.text()) == schedule


def test_random_schedules_round_trip():
    generator, selectors = random.Random(4), ("IN04", "OUT.cross", "IN01-IN03.self", ".mlp", "/a:b,;c/", "TE1.05", "default")
    for _ in range(200):
        lines = []
        for _ in range(generator.randint(1, 5)):
            times = sorted(round(generator.random(), generator.randint(1, 4)) for _ in range(generator.randint(1, 5)))
            points = ", ".join(f"{t}:{generator.choice((0, 1, generator.uniform(-2, 2)))}" for t in times)
            lines.append(f"{generator.choice(selectors)}: {points} {generator.choice(list(EASINGS))}")
        schedule = parse("\n".join(lines))
        assert parse(schedule.text()) == schedule


def test_the_last_line_that_matches_wins():
    blocks = Blocks.layout("SD1.5")
    placed = parse("IN: .1; default: .9; in04-08.cross: .2; IN05: .3; .mlp: .4; TE: .5").on(blocks)
    prefix = "diffusion_model.input_blocks"
    targets = {
        f"{prefix}.1.0.in_layers.2.weight": 0.1, f"{prefix}.4.1.transformer_blocks.0.attn2.to_q.weight": 0.2,
        f"{prefix}.5.1.transformer_blocks.0.attn2.to_q.weight": 0.3, f"{prefix}.5.1.transformer_blocks.0.ff.net.2.weight": 0.4,
        "diffusion_model.output_blocks.3.0.in_layers.2.bias": 0.9, "clip_l.transformer.text_model.encoder.layers.5.self_attn.q_proj.weight": 0.5,
    }  # fmt: skip
    assert {key: placed.at(blocks.place(key)).at(0) for key in targets} == targets


def test_selectors_are_those_of_the_model():
    schedule = parse("IN04: 1 -> 0\nD07: 0 -> 1\nTE1.05: .5")
    with pytest.raises(TriLoRAError, match=r"schedule, in the line 'D07: 0:0, 1:1': 'D07' names no block of this model"):
        schedule.on(Blocks.layout("SD1.5"))
    assert [selector.text for selector, _ in schedule.on(Blocks.layout("SD1.5"), strict=False).rules] == ["IN04", "TE1.05"]


def changes(found) -> set[float]:
    return {start for curve in found for start, _ in curve[1:]}


@pytest.mark.parametrize("switches", [2, 3, 10, 40])
def test_level_curves_are_exact(switches):
    curves = [read_curve(text) for text in ("start=.2 stop=.6", "0:.5, .2:1 step", "0.7")]
    assert steps(curves, switches) == [((0, 0), (0.2, 1), (0.6, 0)), ((0, 0.5), (0.2, 1)), ((0, 0.7),)]


@pytest.mark.parametrize("switches", [1, 2, 5, 10, 33])
def test_rising_and_falling_curves_get_the_switches_that_are_left(switches):
    """Together they change no more often than allowed, and a ramp is never further away than half of its level's width."""
    curves = [read_curve(text) for text in ("1 -> 0", "0 -> 2 ease_in", "0.3")]
    found = steps(curves, switches)
    assert len(changes(found)) == switches and len(found[2]) == 1
    for curve, levels in zip(curves[:2], found, strict=False):
        assert len(levels) == switches + 1
        for (start, value), end in zip(levels, [*(start for start, _ in levels[1:]), 1.0], strict=True):
            assert value == pytest.approx(curve.at((start + end) / 2)) and end - start == pytest.approx(1 / (switches + 1))
    assert [value for _, value in found[0]] == pytest.approx([1 - (i + 0.5) / (switches + 1) for i in range(switches + 1)])


def test_switches_go_where_the_curve_moves():
    """Three quarters of the change in the first tenth: most switches there, none where it is level; a jump stays exact."""
    (found,) = steps([read_curve("0:1, .1:.25, .5:.25, .5:1, .9:.75")], 12)
    starts = [start for start, _ in found]
    assert {0.1, 0.5, 0.9} <= set(starts) and len(starts) == 13
    assert sum(start < 0.1 for start in starts) > 2 * sum(0.5 < start < 0.9 for start in starts) and not any(0.1 < start < 0.5 for start in starts)
    assert all(abs(before - after) < 0.15 for (_, before), (start, after) in zip(found, found[1:], strict=False) if start != 0.5)


def test_too_few_switches_are_refused():
    curves = [read_curve("start=.2 stop=.6"), read_curve("0:1, .3:.5, .7:0")]
    assert len(changes(steps(curves, 4))) == 4
    with pytest.raises(TriLoRAError, match=r"changes at 4 times \(0\.2, 0\.3, 0\.6, 0\.7\), and switches=3 .*raise it to 4"):
        steps(curves, 3)
    assert steps([], 1) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("IN: 1 >> 0", "is no curve; write a number, points like"),
        ("IN 1 -> 0", "is no curve"),
        ("IN:", "there is no curve"),
        ("IN: 0:1, .5", "is no curve"),
        ("start=4 stop=12", "'4' is not a fraction of sampling, 0 to 1; write a step with the number of steps: 5 of 20 is 5/20"),
        ("step=4-12", "'4' is not a fraction"),
        ("0:1, 30:2", "'30' is not a fraction"),
        ("-.1:1, 1:0", "'-.1' is not a fraction"),
        ("IN: 0:1, 1:0 bounce", "'bounce' is no easing; choose one of linear, cosine"),
        ("start=.6 stop=.2", r"start=0\.6 is not before stop=0\.2"),
        ("stop=0", "is not before"),
        ("IN: .5:1, .2:1", r"go back from 0\.5 to 0\.2"),
        ("1 -> 0 start=.2", "is not a number"),
        ("start=.2 end=.4", r"'end=\.4' is not a part of a window"),
        ("1e999", "too large"),
        ("1/0", "'1/0' is no step of so many, such as 5/20"),
        ("0:nan, 1:0", "'nan' is not a number"),
    ],
)
def test_what_is_no_curve_is_refused_with_its_line(line, message):
    with pytest.raises(TriLoRAError, match=message) as error:
        parse(f"OUT: .5\n{line}\nMID: 1")
    assert f"schedule, in the line {line!r}: " in str(error.value)
