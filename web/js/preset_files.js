// Files of presets in the user's folder: read and changed line by line, with all else in them as it was.

import { api } from "../../../scripts/api.js";

const FOLDER = "trilora/presets";
const RAW = { overwrite: true, stringify: false, throwOnError: true };

/** The bytes of a file; null where there is none. Throws what is wrong otherwise, before anything has been changed. */
export async function bytesOf(name) {
  const answer = await api.getUserData(`${FOLDER}/${name}`);
  if (answer.status === 404) return null;
  if (!answer.ok) throw new Error(`presets/${name} cannot be read: the server answers ${answer.status}`);
  return answer.arrayBuffer();
}

export const store = (name, content) => api.storeUserData(`${FOLDER}/${name}`, content, RAW);
export const remove = (name) => api.deleteUserData(`${FOLDER}/${name}`);

/** The lines of a file with their ends, as Python counts them; none where there is no file. */
export async function linesOf(name) {
  const bytes = await bytesOf(name);
  if (bytes === null) return [];
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes).match(/[^\r\n]*(\r\n|\r|\n)|[^\r\n]+$/g) ?? [];
  } catch {
    throw new Error(`presets/${name} is not UTF-8 text; correct it in an editor`);
  }
}

/** [name, text] of a line, as Python reads it; null for one that is no preset. */
export function presetOf(line) {
  const words = line.trim();
  if (!words || "#@".includes(words[0])) return null;
  const columns = words.split("\t");
  const at = words.indexOf(":");
  const found = columns.length === 3 ? columns.slice(1) : [words.slice(0, at), words.slice(at + 1)];
  return columns.length === 3 || at >= 0 ? found.map((part) => part.trim()) : null;
}
