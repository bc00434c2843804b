// The menu of presets: the extension's and those in the user's folder. Both come from Python with the node's description, so
// that the node and the panel know the same ones; they are saved and deleted through the host's user data.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { element } from "./block_slider.js";
import { fits, read, Unshown } from "./block_text.js";

const FOLDER = "trilora/presets";
const SAVED = "saved.txt";
const NAME = /^[^\s@#/:=,][^#:=,\t\n]*$/;
const RAW = { overwrite: true, stringify: false, throwOnError: true };

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
    const choose = element("input", { type: "file", accept: ".txt,text/plain", hidden: true, onchange: () => this.#import(choose.files[0]) });
    this.popup = element("div", { className: "trilora-blocks trilora-presets" }, filter, this.list,
      element("div", { className: "bar" },
        element("button", { textContent: "Save …", title: "Save what the sliders show under a name.", onclick: () => this.#save() }),
        element("button", { textContent: "Import file …", title: "A text file with NAME:weights in each line, as other programs write it.", onclick: () => choose.click() }), choose));
    document.body.append(this.popup);
    const { height, width } = this.popup.getBoundingClientRect();
    this.popup.style.left = `${Math.max(4, Math.min(box.left, innerWidth - width - 4))}px`;
    this.popup.style.top = `${Math.max(4, Math.min(box.bottom + 2, innerHeight - height - 4))}px`;
    document.addEventListener("pointerdown", this.outside, true);
    document.addEventListener("keydown", this.onKey, true);
    this.#fill("");
    await this.#reload();
    filter.focus({ preventScroll: true });
  }

  /** Files may have changed since the page was loaded. */
  async #reload() {
    const answer = await api.fetchApi(`/object_info/${this.nodeClass}`);
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
    const remove = element("button", { textContent: "×", title: `Delete ${preset.name} from ${preset.file}.`, onclick: () => this.#delete(preset) });
    return element("div", { className: "mine" }, use, remove);
  }

  #use(preset, weights) {
    this.close();
    this.panel.use(weights ? weights.text() : preset.text, Boolean(weights));
  }

  async #save() {
    const text = (this.panel.weights?.text() ?? this.panel.state().text).trim();
    if (!text || text.includes("\n")) return this.#tell("error", "A preset is one line of text.");
    this.close();
    const name = (await app.extensionManager.dialog.prompt({ title: "Save preset", message: "Name:", defaultValue: "" }))?.trim();
    if (!name) return;
    if (!NAME.test(name)) return this.#tell("error", `“${name}”: a name has no : = , or #.`);
    const other = this.tables.presets.find((preset) => preset.name === name);
    if (other && other.file !== SAVED) return this.#tell("error", `“${name}” is taken: ${other.file ? `it stands in ${other.file}` : "it is built in"}.`);
    if (other && !(await app.extensionManager.dialog.confirm({ title: "Save preset", message: `Replace “${name}”?`, type: "overwrite" }))) return;
    const lines = (await this.#lines(SAVED)).filter((line) => !line.startsWith(`${name}:`));
    await api.storeUserData(`${FOLDER}/${SAVED}`, [...lines, `${name}:${text}`, ""].join("\n"), RAW);
    await this.#reload();
    this.#tell("success", `Preset “${name}” saved.`);
  }

  async #delete(preset) {
    const lines = await this.#lines(preset.file);
    lines.splice(preset.line - 1, 1);
    await api.storeUserData(`${FOLDER}/${preset.file}`, [...lines, ""].join("\n"), RAW);
    await this.#reload();
  }

  async #import(file) {
    if (!file) return;
    const name = `${file.name.replace(/\.txt$/i, "").replace(/[^\w.-]+/g, "_")}.txt`;
    this.close();
    if (name === SAVED) return this.#tell("error", `${SAVED} is where the panel saves: give the file another name.`);
    await api.storeUserData(`${FOLDER}/${name}`, await file.text(), RAW);
    await this.#reload();
    const error = this.tables.presets_error;
    if (error.includes(`presets/${name}`)) {
      await api.deleteUserData(`${FOLDER}/${name}`);
      await this.#reload();
      return this.#tell("error", `Not imported. ${error}`);
    }
    const count = this.tables.presets.filter((preset) => preset.file === name).length;
    this.#tell("success", `${count} presets from ${file.name}.`);
  }

  /** The lines of a file of the user's as they are, without the empty end; none where there is no file. */
  async #lines(name) {
    const answer = await api.getUserData(`${FOLDER}/${name}`);
    if (answer.status === 404) return [];
    return (await answer.text()).replace(/\r?\n$/, "").split(/\r?\n/);
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
    if (!(error instanceof Unshown)) throw error;
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
