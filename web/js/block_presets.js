// The menu of presets: the extension's and those in the user's folder. Both come from Python with the node's description, so
// that the node and the panel know the same ones; they are saved and deleted through the host's user data.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { element } from "./block_slider.js";
import { fits, read, Unshown } from "./block_text.js";
import { bytesOf, linesOf, presetOf, remove, store } from "./preset_files.js";

const SAVED = "saved.txt";
const NAME = /^[^\s@#/:=,][^#:=,\t\r\n]*$/;
const LARGEST = 1_000_000; // bytes of a file to import

export class PresetMenu {
  /** tables: what Python says of layouts and presets; nodeClass: the node in whose description they come. */
  constructor(nodeClass, tables) {
    this.nodeClass = nodeClass;
    this.tables = tables;
    this.outside = (event) => this.popup.contains(event.target) || this.close();
    this.onKey = (event) => event.key === "Escape" && this.close();
  }

  /** Name -> text of all presets; the user's win. */
  get texts() {
    return Object.fromEntries(this.tables.presets.map((preset) => [preset.name, preset.text]));
  }

  close() {
    this.popup?.remove();
    this.popup = null;
    document.removeEventListener("pointerdown", this.outside, true);
    document.removeEventListener("keydown", this.onKey, true);
  }

  async open(button, panel) {
    if (this.popup) return this.close();
    this.panel = panel;
    const box = button.getBoundingClientRect();
    this.list = element("div", { className: "list" });
    const filter = element("input", { className: "filter", placeholder: "Search", spellcheck: false, oninput: () => this.#fill(filter.value) });
    const choose = element("input", { type: "file", accept: ".txt,text/plain", hidden: true, onchange: () => this.#try(() => this.#import(choose.files[0])) });
    this.popup = element("div", { className: "trilora-blocks trilora-presets" }, filter, this.list,
      element("div", { className: "bar" },
        element("button", { textContent: "Save …", title: "Save what the sliders show under a name.", onclick: () => this.#try(() => this.#save()) }),
        element("button", { textContent: "Import file …", title: "A text file with NAME:weights in each line, as other programs write it.", onclick: () => choose.click() }), choose));
    document.body.append(this.popup);
    const { height, width } = this.popup.getBoundingClientRect();
    this.popup.style.left = `${Math.max(4, Math.min(box.left, innerWidth - width - 4))}px`;
    this.popup.style.top = `${Math.max(4, Math.min(box.bottom + 2, innerHeight - height - 4))}px`;
    document.addEventListener("pointerdown", this.outside, true);
    document.addEventListener("keydown", this.onKey, true);
    this.#fill("");
    await this.#try(() => this.#reload());
    filter.focus({ preventScroll: true });
  }

  /** Files may have changed since the page was loaded. */
  async #reload() {
    const answer = await api.fetchApi(`/object_info/${this.nodeClass}`);
    if (!answer.ok) throw new Error(`the presets cannot be read: the server answers ${answer.status}`);
    const { trilora_blocks } = (await answer.json())[this.nodeClass].input.required.weights[1];
    Object.assign(this.tables, trilora_blocks);
    if (this.popup) this.#fill(this.popup.querySelector(".filter").value);
  }

  #fill(wanted) {
    const { layout } = this.panel.state();
    if (!layout) return;
    const found = this.tables.presets.filter((preset) => preset.name.toLowerCase().includes(wanted.trim().toLowerCase()));
    const shown = found.map((preset) => [preset, understood(preset.text, layout)]).filter(([, weights]) => weights !== null);
    const part = (title, entries) => (entries.length ? [element("div", { className: "title", textContent: title }), ...entries.map(([preset, weights]) => this.#entry(preset, weights))] : []);
    const others = found.length - shown.length;
    this.list.replaceChildren(
      ...(this.tables.presets_error ? [element("div", { className: "note", textContent: this.tables.presets_error })] : []),
      ...part("Yours", shown.filter(([preset]) => preset.file)),
      ...part("Built in", shown.filter(([preset]) => !preset.file)),
      ...(others ? [element("div", { className: "title", textContent: `${others} more for other models` })] : []));
  }

  #entry(preset, weights) {
    const use = element("button", { className: "use", title: preset.text, onclick: () => this.#use(preset, weights) }, element("span", { textContent: preset.name }), weights ? picture(weights) : "");
    if (!preset.file) return use;
    const cross = element("button", { textContent: "×", title: `Delete ${preset.name} from ${preset.file}.`, onclick: () => this.#try(() => this.#delete(preset)) });
    return element("div", { className: "mine" }, use, cross);
  }

  #use(preset, weights) {
    this.close();
    this.panel.use(weights ? weights.text() : preset.text, Boolean(weights));
  }

  async #save() {
    const text = (this.panel.weights?.text() ?? this.panel.state().text).trim();
    if (!text || /[\r\n]/.test(text)) throw new Error("a preset is one line of text");
    this.close();
    const name = (await app.extensionManager.dialog.prompt({ title: "Save preset", message: "Name:", defaultValue: "" }))?.trim();
    if (!name) return;
    if (!NAME.test(name)) throw new Error(`“${name}”: a name has no : = , or #`);
    await this.#reload();
    const other = this.tables.presets.find((preset) => preset.name === name);
    if (other && other.file !== SAVED) throw new Error(`“${name}” is taken: ${other.file ? `it stands in ${other.file}` : "it is built in"}`);
    const before = await linesOf(SAVED);
    const lines = before.filter((line) => presetOf(line)?.[0] !== name);
    if (lines.length < before.length && !(await this.#confirm("Save preset", `Replace “${name}”?`))) return;
    const end = lines.length && !/[\r\n]$/.test(lines.at(-1)) ? "\n" : "";
    await this.#store(SAVED, `${lines.join("")}${end}${name}:${text}\n`);
    await this.#reload();
    if (!this.tables.presets.some((preset) => preset.name === name)) return this.#tell("error", `Saved, but it cannot be used yet. ${this.tables.presets_error}`);
    this.#tell("success", `Preset “${name}” saved.`);
  }

  async #delete(preset) {
    const lines = await linesOf(preset.file);
    const found = presetOf(lines[preset.line - 1] ?? "");
    if (found?.[0] !== preset.name || found[1] !== preset.text) {
      await this.#reload();
      throw new Error(`${preset.file} has changed since it was read; look again`);
    }
    lines.splice(preset.line - 1, 1);
    await this.#store(preset.file, lines.join(""));
    await this.#reload();
  }

  async #import(file) {
    if (!file) return;
    this.close();
    const name = `${file.name.replace(/\.txt$/i, "").replace(/[^\p{L}\p{N}_.-]+/gu, "_").replace(/^\.+/, "").slice(0, 100) || "imported"}.txt`;
    if (name.toLowerCase() === SAVED) throw new Error(`${SAVED} is where the panel saves: give the file another name`);
    if (file.size > LARGEST) throw new Error(`${file.name} has more than ${LARGEST} bytes: too many for a file of presets`);
    const [before, content] = [await bytesOf(name), await file.arrayBuffer()];
    if (before && !(await this.#confirm("Import presets", `Replace presets/${name}? What it holds now will be gone.`))) return;
    await this.#store(name, content);
    await this.#reload();
    const error = this.tables.presets_error;
    if (error.includes(`presets/${name}`)) {
      await (before ? store(name, before) : remove(name));
      this.isChanged = false;
      await this.#reload();
      throw new Error(`${file.name} cannot be used: ${error}`);
    }
    const count = this.tables.presets.filter((preset) => preset.file === name).length;
    this.#tell("success", `${count} presets from ${file.name}.`);
  }

  #confirm(title, message) {
    return app.extensionManager.dialog.confirm({ title, message, type: "overwrite" });
  }

  async #store(name, content) {
    await store(name, content);
    this.isChanged = true;
  }

  /** What goes wrong is said, and whether a file is another one now. */
  async #try(action) {
    this.isChanged = false;
    try {
      await action();
    } catch (error) {
      this.#tell("error", `${error.message}. ${this.isChanged ? "The file was changed before that." : "No file was changed."}`);
    }
  }

  #tell(severity, detail) {
    app.extensionManager.toast.add({ severity, summary: "Block Weights", detail, life: severity === "error" ? 8000 : 3000 });
  }
}

/** A preset's weights; undefined where only Python can read it; null where it is for other models. */
function understood(text, layout) {
  try {
    return read(text, layout);
  } catch (error) {
    // one that the panel stumbles over must not cost the menu
    if (!(error instanceof Unshown)) console.warn("TriLoRA: a preset is left to the node", text, error);
    return fits(text, layout) ? undefined : null;
  }
}

/** The denoiser's blocks as little bars. */
function picture(weights) {
  const { groups, text } = weights.layout;
  const ids = Object.entries(groups).filter(([name, members]) => members.length > 1 && !text.includes(name)).flatMap(([, members]) => members);
  const bars = ids.map((id) => {
    const bar = element("i");
    bar.style.height = `${Math.min(1, Math.abs(weights.at(id))) * 100}%`;
    return bar;
  });
  return element("span", { className: "picture" }, ...bars);
}
