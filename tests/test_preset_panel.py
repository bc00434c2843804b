"""The panel's menu of presets (web/js/block_presets.js) against files that people have; needs Node.js."""

import pytest
from comfyui_trilora.tests.page_scripts import NODE_JS, run_script
from comfyui_trilora.trilora_ops.block_preset_files import file_lines, preset_lines, read_presets
from comfyui_trilora.trilora_ops.errors import TriLoRAError

pytestmark = pytest.mark.skipif(NODE_JS is None, reason="no Node.js to run the page's scripts with")
SAVED = "trilora/presets/saved.txt"

# As much of a page as the menu asks for: elements that hold what they are given.
PAGE = """
class Element {
  constructor(tag) { Object.assign(this, { tag, value: "", children: [], style: { setProperty() {} }, dataset: {} }); }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  remove() {}
  addEventListener() {}
  focus() {}
  contains() { return false; }
  getBoundingClientRect() { return { left: 0, top: 0, bottom: 0, width: 10, height: 10 }; }
  *all() { yield this; for (const child of this.children) if (child instanceof Element) yield* child.all(); }
  querySelector(selector) { return [...this.all()].find((one) => one.className === selector.slice(1)); }
}
globalThis.document = { createElement: (tag) => new Element(tag), body: new Element("body"), addEventListener() {}, removeEventListener() {} };
globalThis.innerWidth = globalThis.innerHeight = 1000;
const { PresetMenu } = await import("./block_presets.js");

const layout = { name: "SD1.5", ids: ["IN00", "OUT00"], groups: { IN: ["IN00"], OUT: ["OUT00"] }, text: [], kinds: [], vectors: [] };
for (const [name, text] of Object.entries(given.files)) api.files.set(name, text);
Object.assign(api.status, given.status ?? {});
app.answers.push(...(given.answers ?? []));
const answers = [...given.reloads];
let last = given.tables;
api.reloaded = () => { last = answers.shift() ?? last; return { Node: { input: { required: { weights: ["STRING", { trilora_blocks: last }] } } } }; };
const used = [];
const panel = { state: () => ({ layout, text: given.text }), weights: null, use: (text) => used.push(text) };
const menu = new PresetMenu("Node", { presets: [], presets_error: "", ...given.tables });
await menu.open(new Element("button"), panel);
const shown = [...menu.popup.all()];
const button = (words) => shown.find((one) => (words === "×" ? one.title?.startsWith(`Delete ${given.name} `) : one.textContent === words));
const settled = () => new Promise((resolve) => setTimeout(resolve, 50));
if (given.press) button(given.press).onclick();
if (given.upload) {
  const choose = shown.find((one) => one.type === "file");
  const bytes = Uint8Array.from(given.upload.bytes);
  choose.files = [{ name: given.upload.name, size: given.upload.size ?? bytes.length, text: async () => new TextDecoder().decode(bytes), arrayBuffer: async () => bytes.buffer }];
  choose.onchange();
}
await settled();
answer({ files: Object.fromEntries(api.files), said: app.said.map(({ severity, detail }) => [severity, detail]), asked: app.answers.length, names: shown.filter((one) => one.className === "use").map((one) => one.children[0].textContent) });
"""


def tables(files: dict[str, str], error: str = "") -> dict:
    found = [{**vars(line), "file": name.rsplit("/", 1)[1]} for name, text in files.items() for line in preset_lines(text)]
    return {"presets": found, "presets_error": error}


def menu(folder, files: dict[str, str], **given) -> dict:
    known = given.pop("tables", None) or tables(files)
    return run_script(folder, PAGE, {"files": files, "tables": known, "reloads": [known], **given})


ENDS = {"unix": "\n", "windows": "\r\n", "old mac": "\r"}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("name", ["A", "B", "C", "D"])
def test_a_cross_takes_its_own_line_only(tmp_path, end, name):
    lines = ["# one \u2028 line \x0b\x0c\x85", "A:IN00=0", "", "  B : IN00=0.5 ", "1\tC\tIN00=1", "odd \u2029 name:IN00=1", "D:OUT00=1"]
    answer = menu(tmp_path, {SAVED: end.join([*lines, ""])}, press="×", name=name)
    kept = [line for line in lines if not any(found.name == name for found in preset_lines(line))]
    assert answer["files"][SAVED] == end.join([*kept, ""]) and answer["said"] == []
    assert set(read_presets(answer["files"][SAVED])) == {"A", "B", "C", "D", "odd \u2029 name"} - {name}


def test_python_and_the_page_count_the_same_lines():
    text = "\ufeffA:1\rB:2\r\nC:3\n\x0b\x0c\x1c\u2028\u2029\x85D:4"
    assert file_lines(text) == ["A:1", "B:2", "C:3", "\x0b\x0c\x1c\u2028\u2029\x85D:4"]


def test_a_file_that_has_changed_since_loses_nothing(tmp_path):
    known = tables({SAVED: "A:IN00=0\nB:IN00=1\n"})
    changed = "B:IN00=1\nA:IN00=0.7\n"
    answer = menu(tmp_path, {SAVED: changed}, tables=known, press="×", name="A")
    assert answer["files"] == {SAVED: changed} and "has changed since it was read" in answer["said"][0][1]


@pytest.mark.parametrize(("press", "more"), [("×", {"name": "A"}), ("Save …", {"answers": ["New"], "text": "IN00=1"})])
@pytest.mark.parametrize("status", [500, 403])
def test_an_error_of_the_server_is_said_and_saved_nowhere(tmp_path, press, more, status):
    files = {SAVED: "A:IN00=0\n"}
    answer = menu(tmp_path, files, press=press, status={SAVED: status}, **more)
    assert answer["files"] == files
    assert answer["said"] == [["error", f"presets/saved.txt cannot be read: the server answers {status}. No file was changed."]]


@pytest.mark.parametrize("line", ["Mine:IN00=0", "  Mine : IN00=0", "Mine\t:IN00=0", "7\tMine\tIN00=0"])
def test_a_line_that_a_person_wrote_is_replaced(tmp_path, line):
    answer = menu(tmp_path, {SAVED: f"# kept\r\n{line}\r\nOther:IN00=1"}, press="Save …", text="IN00=0.5", answers=["Mine", True])
    assert answer["files"][SAVED] == "# kept\r\nOther:IN00=1\nMine:IN00=0.5\n" and answer["asked"] == 0
    assert read_presets(answer["files"][SAVED]) == {"Other": "IN00=1", "Mine": "IN00=0.5"}


def test_nothing_is_replaced_without_asking_even_where_the_file_cannot_be_used(tmp_path):
    files = {SAVED: "Mine:IN00=0\nMine:IN00=1\n"}
    with pytest.raises(TriLoRAError):
        tables(files)
    answer = menu(tmp_path, files, tables={"presets": [], "presets_error": "presets/saved.txt: line 2"}, press="Save …", text="IN00=0.5", answers=["Mine", False])
    assert answer["files"] == files and answer["asked"] == 0


def test_a_preset_in_a_file_that_cannot_be_used_is_said(tmp_path):
    broken = {"presets": [], "presets_error": "presets/saved.txt: line 1: no preset"}
    answer = menu(tmp_path, {SAVED: "no preset\n"}, tables=broken, press="Save …", text="IN00=0.5", answers=["Mine"])
    assert answer["files"][SAVED] == "no preset\nMine:IN00=0.5\n"
    assert answer["said"] == [["error", "Saved, but it cannot be used yet. presets/saved.txt: line 1: no preset"]]


@pytest.mark.parametrize("text", ["", "IN00=0\nOUT00=1", "IN00=0\rOUT00=1"])
def test_only_one_line_is_a_preset(tmp_path, text):
    answer = menu(tmp_path, {}, press="Save …", text=text, answers=["Mine"])
    assert answer["files"] == {} and "one line of text" in answer["said"][0][1]


OLD, NEW = "A:IN00=0\n", "B:IN00=1\n"
MINE = "trilora/presets/mine.txt"


def upload(text: str | bytes, name: str = "mine.txt", **more) -> dict:
    return {"name": name, "bytes": list(text if isinstance(text, bytes) else text.encode()), **more}


def test_an_import_asks_before_it_replaces(tmp_path):
    answer = menu(tmp_path, {MINE: OLD}, upload=upload(NEW), answers=[False])
    assert answer["files"] == {MINE: OLD} and answer["asked"] == 0
    answer = menu(tmp_path / "2", {MINE: OLD}, upload=upload(NEW), answers=[True], reloads=[tables({MINE: OLD}), tables({MINE: NEW})])
    assert answer["files"] == {MINE: NEW} and answer["said"] == [["success", "1 presets from mine.txt."]]


@pytest.mark.parametrize("before", [OLD, None])
def test_an_import_that_cannot_be_used_leaves_what_was_there(tmp_path, before):
    files = {MINE: before} if before else {}
    faulty = {"presets": [], "presets_error": "presets/mine.txt: line 1: no preset"}
    answer = menu(tmp_path, files, upload=upload("bad\n"), answers=[True], reloads=[tables(files), faulty, tables(files)])
    assert answer["files"] == files
    assert answer["said"] == [["error", "mine.txt cannot be used: presets/mine.txt: line 1: no preset. No file was changed."]]


def test_an_import_keeps_the_bytes_so_that_python_can_judge_them(tmp_path):
    answer = menu(tmp_path, {}, upload=upload("\ufeffÜ:IN00=0\r\n".encode()), reloads=[tables({}), tables({MINE: "Ü:IN00=0\n"})])
    assert answer["files"][MINE] == "\ufeffÜ:IN00=0\r\n"


def test_names_of_other_letters_do_not_meet(tmp_path):
    done = [menu(tmp_path / str(n), {}, upload=upload(NEW, name)) for n, name in enumerate(["脸.txt", "手.txt", ".txt", "../a b.TXT", "a.tsv"])]
    assert [list(answer["files"]) for answer in done] == [
        [f"trilora/presets/{name}.txt"] for name in ("脸", "手", "imported", "_a_b", "a.tsv")
    ]


@pytest.mark.parametrize(("file", "words"), [(upload(NEW, "Saved.TXT"), "is where the panel saves"), (upload(NEW, size=10**9), "too many")])
def test_what_is_not_imported_is_said(tmp_path, file, words):
    answer = menu(tmp_path, {SAVED: OLD}, upload=file)
    assert answer["files"] == {SAVED: OLD} and words in answer["said"][0][1]


@pytest.mark.parametrize("word", ["constructor", "__proto__", "toString", "hasOwnProperty"])
def test_words_of_javascript_are_words(tmp_path, word):
    text = f"A:{word}\n{word}:IN00=0\nB:IN00=1\n"
    answer = menu(tmp_path, {SAVED: text}, press="×", name="B")
    assert {word, "B"} <= set(answer["names"]) and answer["files"][SAVED] == f"A:{word}\n{word}:IN00=0\n"


def test_a_server_that_does_not_answer_leaves_the_menu(tmp_path):
    code = PAGE.replace("api.reloaded = () => {", "api.fetchApi = async () => { throw new Error('gone'); }; api.reloaded = () => {")
    files = {SAVED: "A:IN00=0\n"}
    answer = run_script(tmp_path, code, {"files": files, "tables": tables(files), "reloads": []})
    assert answer["names"] == ["A"] and answer["said"] == [["error", "gone. No file was changed."]]
