// The panel: a bar of buttons, the rows, and what the text holds beyond them. It keeps nothing that is not in the text.

import { rows } from "./block_rows.js";
import { element } from "./block_slider.js";
import { read, Unshown } from "./block_text.js";

const STYLE = new URL("./block_panel.css", import.meta.url).href;

export class BlockPanel {
  /**
   * state() -> {text, layout, dialect, presets, linked}: what holds now.
   * write(text, isCanonical): the new text; done(): one action of a person is over, for undo.
   * menu(button): opens the menu of presets.
   */
  constructor({ state, write, done, menu }) {
    this.state = state;
    this.write = write;
    this.done = done;
    this.bar = element("div", { className: "bar" });
    this.note = element("div", { className: "note" });
    // the newer front end lets the wheel scroll only what says so and has the focus
    this.scroll = element("div", { className: "scroll", tabIndex: -1 });
    this.scroll.dataset.captureWheel = "true";
    this.scroll.addEventListener("scroll", () => (this.top = this.scroll.scrollTop));
    this.also = element("div", { className: "also" });
    this.said = element("div", { className: "said" });
    this.root = element("div", { className: "trilora-blocks" },
      element("link", { rel: "stylesheet", href: STYLE }),
      this.bar, this.note, element("div", { className: "frame" }, this.scroll), this.also, this.said);
    const button = (textContent, title, onclick, className = "edit") => element("button", { className, textContent, title, onclick });
    const presets = button("Presets ▾", "Presets that come with the extension, and yours: use, save, delete, import.", () => menu(presets), "");
    this.bar.append(presets, element("span", { className: "gap" }),
      button("all 1", "Every block as trained.", () => this.#act((weights) => weights.setAll(1))),
      button("all 0", "Every block off.", () => this.#act((weights) => weights.setAll(0))),
      button("1 − w", "What was on goes off and the other way round.", () => this.#act(invert)),
      button("mirror", "UNets: IN and OUT change places, level by level. Others: the order of each group is turned round.", () => this.#act(mirror)));
    for (const kind of ["pointerdown", "dblclick", "contextmenu"]) this.root.addEventListener(kind, (event) => event.stopPropagation());
  }

  /** Show what holds now, if it is not shown already. */
  refresh() {
    const now = this.state();
    const key = [now.text, now.dialect, now.layout?.name, now.linked].join("\n");
    if (key === this.key) return;
    this.key = key;
    if (now.layout !== this.layout) this.#lay(now.layout);
    this.weights = null;
    let note = "";
    if (now.linked) note = "The text comes over the link; the sliders rest.";
    else if (!now.layout) note = "The model's name comes over a link; the sliders rest.";
    else {
      try {
        this.weights = read(now.text, now.layout, now.dialect, now.presets);
      } catch (error) {
        if (!(error instanceof Unshown)) throw error;
        note = `Not on the sliders: ${error.message}.`;
      }
    }
    const result = this.result?.weights === now.text ? this.result : null;
    this.note.replaceChildren(note);
    if (note && result?.text) this.note.append(" ", element("button", { textContent: "take the result", title: result.text, onclick: () => this.use(result.text, true) }));
    this.said.textContent = result?.summary ?? "";
    this.root.classList.toggle("resting", this.weights === null);
    if (this.weights) this.rows.show(this.weights);
    this.#showOthers();
  }

  /** What a person has folded and where they have scrolled to; the panel of a node that undo makes anew takes it over. */
  get view() {
    return { name: this.layout?.name, folded: this.folded, top: this.top ?? 0 };
  }

  set view({ name, folded, top }) {
    if (name !== this.layout?.name) return;
    this.#lay(this.layout, folded);
    this.key = null;
    this.refresh();
    this.scroll.scrollTop = top;
  }

  /** Height that the panel needs at least: its bar, a few rows and what stands below. */
  get minHeight() {
    return 250;
  }

  /** What the node made of a text when it ran: a line that says it, and the text that can take its place. */
  ran(weights, text, summary) {
    this.result = { weights, text, summary };
    this.key = null;
  }

  use(text, isCanonical) {
    this.write(text, isCanonical);
    this.refresh();
    this.done();
  }

  #lay(layout, folded = new Set(layout?.text)) {
    this.layout = layout;
    this.folded = folded;
    const hands = {
      edit: (change) => this.#edit(change),
      look: (reader) => this.weights && reader(this.weights),
      done: () => this.done(),
    };
    this.rows = layout ? rows(layout, hands, this.folded) : { body: "", show() {} };
    this.scroll.replaceChildren(this.rows.body);
  }

  #edit(change) {
    if (!this.weights) return;
    change(this.weights);
    this.write(this.weights.text(), true);
    this.refresh();
  }

  #act(change) {
    this.#edit(change);
    this.done();
  }

  #showOthers() {
    const others = this.weights?.others ?? [];
    const chip = (rule) => element("span", { className: "chip", textContent: rule.text },
      element("button", { textContent: "×", title: `Take ${rule.text} out of the text.`, onclick: () => this.#act((weights) => weights.drop(weights.others.find((other) => other.text === rule.text))) }));
    this.also.replaceChildren(...(others.length ? ["also in the text: ", ...others.map(chip)] : []));
  }
}

function invert(weights) {
  const before = new Map(weights.layout.ids.map((id) => [id, weights.at(id)]));
  weights.setBase(1 - weights.base);
  for (const [id, value] of before) weights.set(id, 1 - value);
}

function mirror(weights) {
  const { groups, text } = weights.layout;
  const before = new Map(weights.layout.ids.map((id) => [id, weights.at(id)]));
  const swap = (from, to) => to.forEach((id, n) => weights.set(id, before.get(from[from.length - 1 - n])));
  for (const [name, ids] of Object.entries(groups)) {
    const other = groups[{ IN: "OUT", OUT: "IN" }[name]];
    if (!text.includes(name)) swap(other?.length === ids.length ? other : ids, ids);
  }
}
