// One slider: a name, a track from -1 to 2, and a number that may be anything.

import { format } from "./block_text.js";

const LOW = -1;
const HIGH = 2;
const STEP = 0.05;
const FINE = 0.01;
const MOVE = 3; // pixels that make a drag of a click
const DOUBLE = 250; // ms

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const share = (value) => (100 * (Math.min(Math.max(value, LOW), HIGH) - LOW)) / (HIGH - LOW);
const rounded = (value, step) => Math.round(Math.round(value / step) * step * 1e4) / 1e4;

export class Slider {
  /**
   * change(value, moved): the person wants `value`; `moved` is the way from where a drag with Shift began, else null.
   * done(): what they did is over.
   */
  constructor(name, { change, done, start = () => 0 }) {
    this.change = change;
    this.done = done;
    this.start = start;
    this.fill = element("div", { className: "fill" });
    this.knob = element("div", { className: "knob" });
    this.track = element("div", { className: "track", tabIndex: 0, role: "slider", ariaLabel: name, ariaValueMin: LOW, ariaValueMax: HIGH }, this.fill, this.knob);
    this.number = element("input", { className: "number", ariaLabel: name, spellcheck: false, autocomplete: "off" });
    this.parts = [this.track, this.number];
    this.#listenToTrack();
    this.#listenToNumber();
  }

  /** Show the value of one block, or those of several: a band from the lowest to the highest where they differ. */
  show(...values) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    if (low === this.low && high === this.high) return;
    [this.low, this.high] = [low, high];
    const isMixed = low < high;
    const [left, right] = isMixed ? [low, high] : [Math.min(low, 0), Math.max(high, 0)];
    this.fill.style.left = `${share(left)}%`;
    this.fill.style.width = `${share(right) - share(left)}%`;
    this.knob.style.left = `${share(low)}%`;
    this.track.classList.toggle("below", high < 0);
    this.track.classList.toggle("above", low > 1);
    this.track.classList.toggle("mixed", isMixed);
    this.track.ariaValueNow = isMixed ? "" : low;
    this.#restore();
  }

  #listenToTrack() {
    const { track } = this;
    const under = (event) => {
      const box = track.getBoundingClientRect();
      const value = LOW + ((event.clientX - box.left) / box.width) * (HIGH - LOW);
      return rounded(Math.min(Math.max(value, LOW), HIGH), event.ctrlKey || event.metaKey ? FINE : STEP);
    };
    let from = null;
    let jump = 0;
    track.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      clearTimeout(jump);
      track.setPointerCapture(event.pointerId);
      from = { x: event.clientX, at: under(event), moved: false };
      this.start();
    });
    track.addEventListener("pointermove", (event) => {
      if (from === null || (!from.moved && Math.abs(event.clientX - from.x) < MOVE)) return;
      from.moved = true;
      this.change(under(event), event.shiftKey ? rounded(under(event) - from.at, FINE) : null);
    });
    track.addEventListener("pointerup", (event) => {
      if (from?.moved) this.done();
      // a click goes to its place, unless it becomes a double click
      else if (from) jump = setTimeout((value) => this.#once(value), DOUBLE, under(event));
      from = null;
    });
    track.addEventListener("pointercancel", () => (from = null));
    track.addEventListener("dblclick", () => {
      clearTimeout(jump);
      this.#once(1);
    });
    track.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -STEP, ArrowDown: -STEP, ArrowRight: STEP, ArrowUp: STEP }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      this.#once(rounded(this.high + (event.ctrlKey ? Math.sign(step) * FINE : step), FINE));
    });
  }

  #listenToNumber() {
    const { number } = this;
    const value = () => Number(number.value.replace(",", ".").trim() || NaN);
    number.addEventListener("focus", () => number.select());
    number.addEventListener("change", () => {
      if (Number.isFinite(value())) this.#once(value());
      else this.#restore();
    });
    number.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Escape") this.#restore();
      if (event.key === "Enter" || event.key === "Escape") number.blur();
    });
  }

  #once(value) {
    this.start();
    this.change(value, null);
    this.done();
  }

  #restore() {
    this.number.value = this.low < this.high ? "…" : format(this.low);
  }
}
