"""The panel's reading and writing of block weights (web/js/block_text.js) against the parser's, on random texts; needs Node.js."""

import json
import random
import shutil
import subprocess

import pytest
from comfyui_trilora.benchmarks.installation import ROOT
from comfyui_trilora.tests.fuzz import texts

NODE_JS = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE_JS is None, reason="no Node.js to run the panel's script with")
FAMILIES = ("SD1.5", "SDXL", "SSD-1B", "Flux.1", "Wan 14B", "SD3.5 Large", "HunyuanVideo", "Anima")
ROUNDS = 40

# Reads {cases: [{layout, text, edits: [[id, number]]}], presets}; answers what was read, and the text after the edits, or the
# error; and how long it took, in seconds of the processor.
DRIVER = """
import { read, Unshown } from "./block_text.mjs";
import { readFileSync } from "node:fs";
const { layouts, cases, presets } = JSON.parse(readFileSync(0, "utf8"));
const answers = cases.map(({ layout, text, edits }) => {
  const begin = process.cpuUsage();
  const seconds = () => (({ user, system }) => (user + system) / 1e6)(process.cpuUsage(begin));
  try {
    const weights = read(text, layouts[layout], "auto", presets);
    const values = Object.fromEntries(layouts[layout].ids.map((id) => [id, weights.at(id)]));
    for (const [id, value] of edits) weights.set(id, value);
    for (const id of layouts[layout].ids) weights.touching(id);
    return { values, text: weights.text(), seconds: seconds() };
  } catch (error) {
    if (!(error instanceof Unshown)) throw error;
    return { error: error.message, seconds: seconds() };
  }
});
console.log(JSON.stringify(answers));
"""


@pytest.fixture(scope="module")
def panel(tmp_path_factory, pack_module):
    """Function: cases -> the answers of the panel's own script."""
    folder, layouts = tmp_path_factory.mktemp("panel"), pack_module("nodes.block_tables").tables()["layouts"]
    shutil.copy(ROOT / "web" / "js" / "block_text.js", folder / "block_text.mjs")
    (folder / "driver.mjs").write_text(DRIVER, encoding="utf-8")

    def answer(cases: list[dict], presets: dict[str, str] | None = None) -> list[dict]:
        asked = json.dumps({"layouts": layouts, "cases": cases, "presets": presets or {}})
        done = subprocess.run([NODE_JS, folder / "driver.mjs"], input=asked, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return answer


@pytest.fixture
def parse(pack_module):
    syntax, blocks = pack_module("trilora_ops.block_syntax"), pack_module("trilora_ops.blocks").Blocks
    return lambda text, family: syntax.parse(text, blocks.layout(family), "native")


def places(pack_module, family: str, kinds: bool) -> list:
    """Every block of a family as a place without kinds; with `kinds`, one more for each kind that the family has."""
    module = pack_module("trilora_ops.blocks")
    blocks = module.Blocks.layout(family)
    sets = [frozenset(), *([frozenset({kind}) for kind in sorted(blocks.kinds)] if kinds else [])]
    return [module.Place(block, group, words, f"{block}.attn2.to_k") for group, members in blocks.groups.items() for block in members for words in sets]


def random_text(chance: random.Random, blocks) -> str:
    """Rules of every form, in the spellings that the syntax allows."""
    def selector() -> str:
        group, members = chance.choice(list(blocks.groups.items()))
        first, last = chance.choice(members), chance.choice(members)
        word = chance.choice([group, first, f"{first}-{last}", "TE", first.replace("0", "", 1) if first[-2:].isdigit() and first[-2:] != "00" else first])
        kind = chance.choice(["", "", "", "." + chance.choice(sorted(blocks.kinds))])
        spelled = chance.choice([word, word.lower()]) + kind
        return chance.choice([spelled] * 8 + [f".{chance.choice(sorted(blocks.kinds))}", r"/attn2\.to_[k,v]/"])

    rules = [f"{selector()}{chance.choice(['=', ' = '])}{chance.choice(['0', '.5', '1.', '-0.3', '1e-1', '+2', '0.12345678'])}" for _ in range(chance.randint(1, 9))]
    return chance.choice([", ", "\n", ","]).join([*rules, *chance.choice([[], [f"default={chance.choice(['0', '0.5'])}"]])])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sliders_show_what_the_parser_reads_and_edits_change_nothing_else(family, panel, parse, pack_module):
    blocks, chance = pack_module("trilora_ops.blocks").Blocks.layout(family), random.Random(family)
    cases = []
    for _ in range(ROUNDS):
        edits = [[chance.choice(blocks.ids), chance.choice([0, 0.5, 1, -0.25])] for _ in range(chance.randint(0, 4))]
        cases.append({"layout": family, "text": random_text(chance, blocks), "edits": edits})
    for case, answer in zip(cases, panel(cases), strict=True):
        weights, edited = parse(case["text"], family), {id for id, _ in case["edits"]}
        assert "error" not in answer, f"{case['text']}: {answer}"
        again, last = parse(answer["text"], family), dict(case["edits"])
        for place in places(pack_module, family, kinds=True):
            if not place.kinds and not any(selector.pattern for selector, _ in weights.rules):
                assert answer["values"][place.block] == weights.at(place), f"{case['text']}: {place.block}"
                assert again.at(place) == last.get(place.block, weights.at(place)), f"{case['text']} -> {answer['text']}: {place.block}"
            if place.block not in edited:
                assert again.at(place) == weights.at(place), f"{case['text']} -> {answer['text']}: {place}"


def test_lists_by_position_and_what_is_not_shown(panel, parse):
    texts = ["1,0,0,0.5,1,1,1,0.25,0,0,0,0,-0.5,0,0,0,2", "LABEL: " + ",".join(["0.5"] * 26), "1,R,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0", "%default=1, in1-3=0.5", '{"unet": 0.5}',
             "D07=0.5", "IN04.wrong=1", "IN04=R", "1,1,1"]
    answers = panel([{"layout": "SD1.5", "text": text, "edits": []} for text in texts])
    assert answers[0]["values"] | {"TE1.03": 1, "IN04": 0.5, "MID0": 0.25, "MID2": 0.25, "OUT07": -0.5, "OUT11": 2, "IN00": 0} == answers[0]["values"]
    assert answers[1]["text"] == "default=0.5"
    assert all("error" in answer for answer in answers[2:]) and "lists of 17, 25, 26, 27" in answers[8]["error"]
    tagged = [f"lbw={texts[0]}", f"LBW={texts[0]};", "lbw=" + ",".join(["1"] + ["0.5"] * 25), "LBW=1,R" + ",0" * 15 + ";A=1;"]
    same, also, webui, drawn = panel([{"layout": "SD1.5", "text": text, "edits": []} for text in tagged])
    values = [{**answer, "seconds": 0} for answer in (same, also, answers[0])]
    assert values[0] == values[1] == values[2] and webui["values"]["MID0"] == 0.5 and webui["values"]["TE1.00"] == 1 and "error" in drawn
    flux = [{"layout": "Flux.1", "text": ",".join(map(str, [1] * 19 + [0] * 38)), "edits": []}]
    (answer,) = panel(flux)
    assert answer["values"]["D18"] == 1 and answer["values"]["S00"] == 0 == parse(answer["text"], "Flux.1").default - 1


def test_presets_that_are_shown_mean_what_the_parser_makes_of_them(panel, pack_module):
    """Every preset that comes with the extension, for every family: the sliders show the parser's numbers or nothing."""
    syntax, presets = pack_module("trilora_ops.block_syntax"), pack_module("trilora_ops.block_presets").BUILT_IN
    blocks_of, error = pack_module("trilora_ops.blocks").Blocks.layout, pack_module("trilora_ops.errors").TriLoRAError
    cases = [{"layout": family, "text": text, "edits": []} for family in FAMILIES for text in presets.values()]
    shown = 0
    for case, answer in zip(cases, panel(cases), strict=True):
        if "error" not in answer:
            blocks = blocks_of(case["layout"])
            try:
                weights = syntax.parse(case["text"], blocks)
            except error:
                pytest.fail(f"{case['layout']}: the panel shows {case['text']}, which the parser refuses")
            for place in places(pack_module, case["layout"], kinds=False):
                assert answer["values"][place.block] == weights.at(place), f"{case['layout']}: {case['text']}: {place.block}"
            shown += 1
    assert shown > 100


def test_a_preset_or_a_list_with_changes_is_shown_as_the_parser_reads_it(panel, pack_module):
    syntax, presets = pack_module("trilora_ops.block_syntax"), pack_module("trilora_ops.block_presets").BUILT_IN
    ones = ",".join(["1"] * 17)
    texts = ["SD-FACE, IN04=0.5", "attention only, fused layers too, OUT=0", "SD-FACE\nOUT03.attn=0.5, OUT03-OUT05=0.25\n/to_q/=0, IN=1", f"{ones}, IN04=0.5", f"lbw={ones}, IN04=0.5",
             f"NAME:{ones},IN04=0.5", f"NAME\t{ones}\nIN04=0.5", "lbw=MIDD, MID=0, MID1=0.5", "Block-wise upper (SD1.x)", "Block-wise upper (SD1.x), OUT09.attn=0.5"]
    blocks = pack_module("trilora_ops.blocks").Blocks.layout("SD1.5")
    cases = [{"layout": "SD1.5", "text": text, "edits": []} for text in texts]
    for text, answer in zip(texts, panel(cases, dict(presets)), strict=True):
        if text.startswith("attention only"):  # whose second part is no kind of SD1.5
            assert "error" in answer
            continue
        weights = syntax.parse(text, blocks)
        again = syntax.parse(answer["text"], blocks)
        for place in places(pack_module, "SD1.5", kinds=True):
            if not place.kinds:
                assert answer["values"][place.block] == weights.at(pack_module("trilora_ops.blocks").Place(place.block, place.group, frozenset(), "")), f"{text}: {place.block}"
            assert again.at(place) == weights.at(place), f"{text} -> {answer['text']}: {place}"
    refused = [{"layout": "SD1.5", "text": text, "edits": []} for text in ("SD-FACE, default=0.5", "SD-FACE, IN04", "constructor", "constructor, IN04=0.5", "SD-FACE, XX=1")]
    assert all("error" in answer for answer in panel(refused, dict(presets)))


HOSTILE = ["1" + " " * 30000 + "2", "1" + " " * 200000 + "x", "1" + "\n" * 200000 + "x", "\n" * 200000 + ",", "," * 100000, "IN04=1," * 30000, "/attn/=1," * 20000, "IN" + ".a" * 50000 + "=1",
           "IN" + "0" * 1000000 + "4=1", "lbw=" * 50000, "LBW=" * 500, "lbw=1" + ";" * 100000 + "\n,", "1" * 100000 + "x,1", "IN04=" + "1" * 100000 + "x", "[" * 100000, '{"a":' * 50000, "1," * 100000,
           "IN04=1e999", "IN04=1e10", "/" + "(a+)+" * 300 + "/=0", "/" + "\\," * 50000, "/a," * 60000, "TE1.00-OUT11.attn=0.5," * 490 + "TE1.00-OUT11=0.5," * 490, ".attn=1," * 990, "IN04=\u0661",
           "A:" * 100000, "\t" * 100000 + "1,1", "1" + ",0" * 16 + ",IN04=0.5" * 900, "IN04.attn=0.5," * 500 + "TE1.00-OUT11=0.5," * 490]


def test_texts_that_are_meant_to_hang_the_panel_come_to_an_end(panel):
    cases = [{"layout": family, "text": text, "edits": []} for text in HOSTILE for family in ("SD1.5", "HunyuanVideo")]
    for case, answer in zip(cases, panel(cases), strict=True):
        shown = f"{case['text'][:40]!r} of {len(case['text'])} letters on {case['layout']}"
        assert answer["seconds"] < 2, shown
        assert len(answer.get("error", "")) < 300, shown
        assert all(abs(value) <= 1e9 for value in answer.get("values", {}).values()), shown


def test_random_texts_are_shown_as_the_parser_reads_them_or_not_at_all(panel, pack_module):
    """The fuzzer's texts, mutated ones among them, for the families of most texts."""
    syntax, error = pack_module("trilora_ops.block_syntax"), pack_module("trilora_ops.errors").TriLoRAError
    chance, presets = random.Random(5), pack_module("trilora_ops.block_presets").BUILT_IN
    drawn = [one for one in (texts.random_text(chance) for _ in range(6000)) if one.kind in ("weights", "plan") and one.model in FAMILIES]
    cases = [{"layout": one.model, "text": one.text, "edits": []} for one in drawn if "\ud800" not in one.text]
    shown = 0
    for case, answer in zip(cases, panel(cases, dict(presets)), strict=True):
        assert answer["seconds"] < 2, case["text"][:200]
        if "error" not in answer:
            shown += 1
            try:
                weights = syntax.parse(case["text"], pack_module("trilora_ops.blocks").Blocks.layout(case["layout"]))
            except error as problem:
                if "the pattern" in str(problem) or "patterns" in str(problem):  # which the panel does not read
                    continue
                pytest.fail(f"{case['layout']}: the panel shows {case['text'][:300]!r}, which the parser refuses: {problem}")
            for place in [] if any(selector.pattern for selector, _ in weights.rules) else places(pack_module, case["layout"], kinds=False):
                plain = pack_module("trilora_ops.blocks").Place(place.block, place.group, frozenset(), "")
                assert answer["values"][place.block] == weights.at(plain), f"{case['layout']}: {case['text'][:300]!r}: {place.block}"
    assert shown > 80
