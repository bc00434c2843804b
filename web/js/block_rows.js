// The rows of a layout: a heading with a slider for every group, a slider for every block.

import { element, Slider } from "./block_slider.js";
import { format } from "./block_text.js";

/**
 * rows(layout, hands) -> {body, show(weights)}
 *
 * hands: what the rows may do with the weights. edit(change) calls change(weights) and writes the text; done() ends an edit.
 */
export function rows(layout, hands, folded) {
  const shown = [];
  const body = element("div", { className: "rows" });
  body.append(defaultRow(hands, shown));
  for (const [name, ids] of Object.entries(layout.groups)) if (ids.length > 1) body.append(group(name, ids, hands, folded, shown));
  const alone = Object.values(layout.groups).filter((ids) => ids.length === 1).map(([id]) => id);
  body.append(columns(alone, alone.map((id) => blockRow(id, [id], hands, shown))));
  return { body, show: (weights) => shown.forEach((show) => show(weights)) };
}

function defaultRow(hands, shown) {
  const slider = new Slider("default", { change: (value) => hands.edit((weights) => weights.setBase(value)), done: hands.done });
  shown.push((weights) => slider.show(weights.base));
  const label = element("span", { className: "name", textContent: "default", title: "What every block has that has no rule of its own." });
  return element("div", { className: "row heading" }, label, ...slider.parts);
}

function group(name, ids, hands, folded, shown) {
  const all = (value) => hands.edit((weights) => ids.forEach((id) => weights.set(id, value)));
  const once = (change) => () => {
    hands.edit(change);
    hands.done();
  };
  const mute = once((weights) => {
    const value = ids.every((id) => weights.at(id) === 0) ? 1 : 0;
    ids.forEach((id) => weights.set(id, value));
  });
  const solo = once((weights) => {
    const kept = new Map(ids.map((id) => [id, weights.at(id)]));
    const off = ids.every((id) => kept.get(id) === 0);
    weights.setAll(0);
    for (const [id, value] of kept) weights.set(id, off ? 1 : value);
  });
  const slider = new Slider(name, { change: all, done: hands.done });
  shown.push((weights) => slider.show(...ids.map((id) => weights.at(id))));

  const blocks = columns(ids, ids.map((id) => blockRow(id, ids, hands, shown)));
  const fold = element("button", { className: "fold", ariaLabel: `Fold ${name}` });
  const show = () => {
    blocks.hidden = folded.has(name);
    fold.textContent = blocks.hidden ? "▸" : "▾";
  };
  fold.onclick = () => {
    if (!folded.delete(name)) folded.add(name);
    show();
  };
  show();
  const heading = element("div", { className: "row heading" },
    element("span", { className: "name" }, fold,
      element("button", { className: "group", textContent: name, title: `${ids[0]} to ${ids.at(-1)}. Click: off, and again: on.`, onclick: mute }),
      element("button", { className: "solo", textContent: "solo", title: `Only ${name}: every other block to 0.`, onclick: solo })),
    ...slider.parts);
  return element("section", {}, heading, blocks);
}

/** Rows below each other in as many columns as there is room for, with names of one width. */
function columns(ids, blocks) {
  const made = element("div", { className: "blocks" }, ...blocks);
  made.style.setProperty("--label", `${Math.max(0, ...ids.map((id) => id.length)) + 2}ch`);
  return made;
}

function blockRow(id, group, hands, shown) {
  let before = new Map();
  const slider = new Slider(id, {
    start: () => hands.look((weights) => (before = new Map(group.map((other) => [other, weights.at(other)])))),
    change: (value, moved) =>
      hands.edit((weights) => {
        if (moved === null) weights.set(id, value);
        else for (const [other, was] of before) weights.set(other, Math.round((was + moved) * 1e4) / 1e4);
      }),
    done: hands.done,
  });
  const label = element("span", { className: "name", textContent: id });
  const row = element("div", { className: "row" }, label, ...slider.parts);
  shown.push((weights) => {
    const value = weights.at(id);
    const touching = weights.touching(id);
    slider.show(value);
    row.classList.toggle("partly", touching.length > 0);
    row.title = touching.length ? `${id}=${format(value)}; in the text also: ${touching.slice(0, 10).map((rule) => rule.text).join(", ")}${touching.length > 10 ? ", ..." : ""}` : "";
  });
  return row;
}
