"""The pack's page scripts in Node.js, with a stand-in for the front end's modules that they import.

Knows nothing of pytest.
"""

import json
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NODE_JS = shutil.which("node")
# app collects extensions; api is an event target with the user's files, `files`, name -> text; `status` is what reading answers.
APP = """
export const app = {
  extensions: [], refreshed: 0, said: [], answers: [],
  registerExtension(extension) { this.extensions.push(extension); },
  async refreshComboInNodes() { this.refreshed += 1; },
  extensionManager: {
    toast: { add: (message) => app.said.push(message) },
    dialog: { prompt: async () => app.answers.shift(), confirm: async () => app.answers.shift() },
  },
};
"""
API = """
class Api extends EventTarget {
  files = new Map(); status = {}; reloaded = () => ({});
  addEventListener(name, call, options) { super.addEventListener(name, call, options); }
  tell(name, detail) { this.dispatchEvent(Object.assign(new Event(name), { detail })); }
  #answer(status, text = "") { return { status, ok: status < 300, statusText: String(status), text: async () => text, json: async () => JSON.parse(text),
    arrayBuffer: async () => new TextEncoder().encode(text).buffer }; }
  async getUserData(name) {
    if (this.status[name]) return this.#answer(this.status[name], "the server's own words");
    return this.files.has(name) ? this.#answer(200, this.files.get(name)) : this.#answer(404);
  }
  async storeUserData(name, text, { overwrite = true } = {}) {
    if (this.status[name]) throw new Error(`Error storing ${name}`);
    if (!overwrite && this.files.has(name)) return this.#answer(409);
    this.files.set(name, typeof text === "string" ? text : new TextDecoder("utf-8", { ignoreBOM: true }).decode(text));
    return this.#answer(200);
  }
  async deleteUserData(name) { this.files.delete(name); return this.#answer(204); }
  async fetchApi() { return this.#answer(200, JSON.stringify(this.reloaded())); }
}
export const api = new Api();
"""


def run_script(folder: Path, code: str, given=None):
    """What `code` answers: an ES module in the folder of our scripts, with the JSON `given` as `given` and a function `answer`."""
    scripts = folder / "extensions" / "pack" / "js"
    scripts.mkdir(parents=True)
    (folder / "scripts").mkdir()
    (folder / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    (folder / "scripts" / "app.js").write_text(APP, encoding="utf-8")
    (folder / "scripts" / "api.js").write_text(API, encoding="utf-8")
    for file in (ROOT / "web" / "js").glob("*.js"):
        shutil.copy(file, scripts)
    head = (
        'import { app } from "../../../scripts/app.js";\nimport { api } from "../../../scripts/api.js";\n'
        'import { readFileSync } from "node:fs";\nconst given = JSON.parse(readFileSync(0, "utf8"));\n'
        "const answer = (value) => console.log(JSON.stringify(value ?? null));\n"
    )
    (scripts / "test_driver.js").write_text(head + code, encoding="utf-8")
    done = subprocess.run(
        [NODE_JS, scripts / "test_driver.js"], input=json.dumps(given), capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)
