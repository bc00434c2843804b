// Block weights as text and as numbers: what a text says of every block of a layout, and the text that says it again.
//
// A layout comes from Python in the options of the input `weights`:
//   name     as in the menu of families
//   ids      every block id in the order of the model, text encoders first
//   groups   group name -> its ids
//   text     the groups that are text encoders; the word TE means all of them
//   kinds    the words that may follow a block, as in OUT.cross
//   vectors  [{dialect, rest, slots: [[id, ...], ...]}]: lists of numbers by position; blocks in no slot get `rest`
// Only whole blocks become numbers. Rules for a part of a block keep their wording and their place among the others.

const NUMBER = /^[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?$/i;
const ITEM = /\/(?:\\[^\n]|[^\\/\n])*\/[^,\n]*|[^,\n]+/y;
const BETWEEN = /[\s,]*/y;

// the bounds of trilora_ops/bounds.py; of items fewer are shown than are read
const LONGEST = 2 ** 18;
const LONGEST_ITEM = 2000;
const MOST_ITEMS = 1000;
const LARGEST = 1e9;

// a list as it stands in a prompt, by its spelling: of the webui extension, of Inspire
const TAGS = { lbw: "webui", LBW: "inspire" };
const TAG = /^(lbw|LBW)=/;
const LABEL = /^[^:=,\t]*([:\t])/;
const UNNAMED = { ":": ["kohya", "tabs"], "\t": ["kohya"] }; // the dialects whose lists have no such label

/** A text that the sliders cannot show; the message says why. */
export class Unshown extends Error {}

const isNumber = (word) => NUMBER.test(word) && Math.abs(Number(word)) <= LARGEST;
/** A strength as a slider shows it: at most four decimals, no trailing zeros. */
export const format = (value) => String(Math.round(value * 1e4) / 1e4 || 0);
/** A strength as the text holds it: the shortest that is read as this very number. */
const exact = (value) => String(value || 0);

export class Weights {
  constructor(layout, base = 1) {
    this.layout = layout;
    this.base = base; // what blocks have that no rule names
    this.own = new Map(); // id -> {value, after}: `after` is how many other rules must stand before this one
    this.others = []; // [{text, ids: a Set, anywhere}]: rules for parts of blocks, in order
  }

  at(id) {
    return this.own.get(id)?.value ?? this.base;
  }

  /** Other rules that change a part of a block: those behind its own rule. */
  touching(id) {
    return this.others.slice(this.own.get(id)?.after ?? 0).filter((rule) => rule.ids.has(id));
  }

  /** A block keeps its place among the other rules, so that what stands behind it stays in force. */
  set(id, value) {
    const after = this.own.get(id)?.after ?? 0;
    if (value === this.base && after === 0) this.own.delete(id);
    else this.own.set(id, { value, after });
  }

  setBase(value) {
    this.base = value;
    for (const [id, rule] of this.own) if (rule.after === 0 && rule.value === value) this.own.delete(id);
  }

  /** Give every block one strength; rules for parts of blocks stay. */
  setAll(value) {
    this.base = value;
    for (const id of this.own.keys()) this.set(id, value);
  }

  drop(rule) {
    const place = this.others.indexOf(rule);
    this.others.splice(place, 1);
    for (const mine of this.own.values()) if (mine.after > place) mine.after -= 1;
    this.setBase(this.base);
  }

  text() {
    const items = [`default=${exact(this.base)}`];
    for (let place = 0; place <= this.others.length; place++) {
      for (const [name, ids] of Object.entries(this.layout.groups)) items.push(...this.#runs(name, ids, place));
      if (place < this.others.length) items.push(this.others[place].text);
    }
    return items.join(", ");
  }

  /** The rules of one group that stand behind `place` other rules: the group's name, or ranges of equal strength. */
  #runs(name, ids, place) {
    const value = (id) => (this.own.get(id)?.after === place ? this.own.get(id).value : undefined);
    if (ids.every((id) => value(id) === value(ids[0]))) return value(ids[0]) === undefined ? [] : [`${name}=${exact(value(ids[0]))}`];
    const found = [];
    for (let first = 0, last; first < ids.length; first = last + 1) {
      last = first;
      while (last + 1 < ids.length && value(ids[last + 1]) === value(ids[first])) last += 1;
      if (value(ids[first]) === undefined) continue;
      found.push(`${ids[first]}${last > first ? `-${ids[last]}` : ""}=${exact(value(ids[first]))}`);
    }
    return found;
  }
}

/**
 * What a text says of a layout's blocks.
 * @throws Unshown where it is in a notation, or names something, that has to be read in Python.
 */
export function read(text, layout, dialect = "auto", presets = {}) {
  if (text.length > LONGEST) throw new Unshown(`the text has ${text.length} characters; at most ${LONGEST} are read`);
  const preset = named(presets, text.trim());
  // as in a file of presets, where a list has a name and none is kohya's
  if (preset !== undefined) return read(vector(preset) && dialect === "auto" && !LABEL.test(preset) ? `:${preset}` : preset, layout, vector(preset) ? dialect : "auto");
  const [begin, changes] = splitChanges(text.trim(), presets);
  if (changes.length) return add(read(begin, layout, dialect, presets), changes, text, false);
  const [, tag, tagged] = /^(lbw|LBW)=([^;]*);?$/.exec(text.trim()) ?? [];
  if (tag && !TAG.test(tagged) && ["auto", TAGS[tag]].includes(dialect)) return read(tagged, layout, TAGS[tag], presets);
  if (text.trim().startsWith("@")) throw new Unshown("lines of a test are read when the node runs");
  const numbers = vector(text.trim());
  if (numbers) return fromVector(numbers, layout, dialect, LABEL.exec(text.trim())?.[1]);
  if (dialect !== "auto" && dialect !== "native" && text.trim()) throw new Unshown(`read as ${dialect} when the node runs`);
  return add(new Weights(layout), items(text), text, true);
}

const named = (presets, name) => (Object.hasOwn(presets, name) ? presets[name] : undefined);

/** A preset or a list with changes behind it: [what the text begins with, the changes as items]; no changes for any other text. */
function splitChanges(text, presets) {
  const found = text.includes("=") && !"{%@<".includes(text[0]) && /[,\n]/.test(text) ? items(text) : [];
  let first = found.length;
  while (first && isChange(found[first - 1].text)) first -= 1;
  if (!first || first === found.length) return [text, []];
  const begin = text.slice(0, found[first].at).trimEnd().replace(/,$/, "").trimEnd();
  const bare = begin.replace(TAG, "").trim();
  const canBegin = [begin, bare].some((name) => named(presets, name) !== undefined) || vector(bare);
  return canBegin ? [begin, found.slice(first)] : [text, []];
}

const isChange = (item) => item.includes("=") && !TAG.test(item) && (item.startsWith("/") || !/[:;[\]{}<>%]/.test(item));

/** Adds items to weights; where a list has given every block a number already, `default` is none of them. */
function add(weights, found, text, mayHaveDefault) {
  const last = new Map(); // id -> how many other rules there are up to the last one that touches it
  let lastAnywhere = 0;
  const note = (rule, count) => (rule.anywhere ? (lastAnywhere = count) : rule.ids.forEach((id) => last.set(id, count)));
  weights.others.forEach((rule, place) => note(rule, place + 1));
  for (const { text: item } of found) {
    const at = item.lastIndexOf("=");
    const [selector, value] = [item.slice(0, at).trim(), item.slice(at + 1).trim()];
    const isDefault = selector.toLowerCase() === "default";
    if (at < 1 || !selector || !isNumber(value) || (isDefault && !mayHaveDefault)) throw new Unshown(`“${short(text.includes("=") ? item : text)}” is read when the node runs`);
    if (isDefault) {
      weights.base = Number(value);
      continue;
    }
    const anywhere = selector.startsWith("/") || selector.startsWith(".");
    const [ids, kinds] = selector.startsWith("/") ? [[], [selector]] : parts(selector, weights.layout);
    if (kinds.length) note(weights.others[weights.others.push({ text: item, ids: new Set(ids), anywhere }) - 1], weights.others.length);
    else for (const id of ids) weights.own.set(id, { value: Number(value), after: Math.max(lastAnywhere, last.get(id) ?? 0) });
  }
  weights.setBase(weights.base);
  return weights;
}

/** Whether a list by position, with random words and placeholders too, has a length that this layout knows. */
export function fits(text, layout) {
  const words = text.replace(TAG, "").split(";")[0].replace(/^[^:=,]*:/, "").split(",").filter((word) => !word.includes("="));
  return layout.vectors.some((reading) => reading.slots.length === words.length);
}

/** OUT.cross.mlp -> [ids of OUT, ["cross", "mlp"]]: the longest beginning that names blocks, then kinds; kinds alone mean all blocks. */
function parts(selector, layout) {
  const words = selector.split(".").map((word) => word.trim());
  for (let count = Math.min(words.length, index(layout).words); count > 0; count--) {
    const ids = count === 1 && words[0] === "" ? layout.ids : blocks(words.slice(0, count).join("."), layout);
    const kinds = words.slice(count);
    if (ids && kinds.every((kind) => layout.kinds.includes(kind.toLowerCase()))) return [ids, kinds];
  }
  throw new Unshown(`“${short(selector)}” names no part of ${layout.name}; another notation is read when the node runs`);
}

/** The ids of a block, a group, TE or a range, in either direction; null for anything else. Leading zeros do not matter. */
function blocks(name, layout) {
  const word = plain(name);
  const { groups, places } = index(layout);
  if (word === "te") return layout.text.flatMap((encoder) => layout.groups[encoder]);
  if (groups.has(word)) return groups.get(word);
  const place = (wanted) => places.get(plain(wanted)) ?? -1;
  if (place(word) >= 0) return [layout.ids[place(word)]];
  const [from, to] = word.split("-");
  if (to === undefined) return null;
  const ends = [place(from), place(/^\d+$/.test(to.trim()) ? from.trim().replace(/\d+$/, to.trim()) : to)];
  return Math.min(...ends) < 0 ? null : layout.ids.slice(Math.min(...ends), Math.max(...ends) + 1);
}

const indexes = new WeakMap();

/** A layout's names as `plain` has them: groups -> their ids, ids -> their place; words: the most that a range of them has, by dots. */
function index(layout) {
  if (!indexes.has(layout)) {
    const groups = new Map(Object.entries(layout.groups).map(([name, ids]) => [plain(name), ids]));
    const places = new Map(layout.ids.map((id, place) => [plain(id), place]));
    indexes.set(layout, { groups, places, words: 1 + 2 * Math.max(...layout.ids.map((id) => id.split(".").length - 1)) });
  }
  return indexes.get(layout);
}

const plain = (word) => word.trim().toLowerCase().replace(/(?<!\d)0+(?=\d)/g, "");

/** The items of a text as {at, text}, `at` being where one begins; a comma inside /…/ belongs to the pattern. */
function items(text) {
  const found = [];
  const after = (pattern, at) => {
    pattern.lastIndex = at;
    pattern.test(text);
    return pattern.lastIndex;
  };
  for (let at = after(BETWEEN, 0), end; at < text.length; at = after(BETWEEN, end)) {
    end = after(ITEM, at);
    found.push({ at, text: text.slice(at, end).trim() });
    if (end - at > LONGEST_ITEM || found.length > MOST_ITEMS) throw new Unshown("the text is too long for the sliders; it is read when the node runs");
  }
  return found;
}

/** The numbers of a list by position, with or without a label; null for anything else. */
function vector(text) {
  const list = text.replace(LABEL, "").trim().replace(/,$/, "");
  const words = list.split(",").flatMap((part) => {
    const lines = part.split("\n").map((line) => line.trim()).filter(Boolean);
    return lines.length ? lines : [""];
  });
  return words.length > 1 && words.every(isNumber) ? words.map(Number) : null;
}

function fromVector(numbers, layout, dialect, label) {
  const fitting = layout.vectors.filter((reading) => reading.slots.length === numbers.length && (dialect === "auto" || reading.dialect === dialect));
  const readings = fitting.filter((reading) => !UNNAMED[label]?.includes(reading.dialect));
  const found = new Map(readings.map((reading) => [place(numbers, reading, layout).text(), reading]));
  if (found.size === 1) return place(numbers, [...found.values()][0], layout);
  const lengths = [...new Set(layout.vectors.map((reading) => reading.slots.length))].sort((a, b) => a - b);
  if (!found.size) throw new Unshown(`${numbers.length} numbers; this model has lists of ${lengths.join(", ")}`);
  throw new Unshown(`${numbers.length} numbers mean different things: choose the dialect ${[...found.values()].map((reading) => reading.dialect).join(" or ")}`);
}

function place(numbers, reading, layout) {
  const weights = new Weights(layout, reading.rest);
  reading.slots.forEach((ids, slot) => ids.forEach((id) => weights.set(id, numbers[slot])));
  const first = weights.at(layout.ids[0]);
  if (layout.ids.every((id) => weights.at(id) === first)) weights.setAll(first);
  return weights;
}

const short = (text) => (text.length > 40 ? `${text.slice(0, 39)}…` : text);
