"""What saved workflows rely on in a node's description, and which changes of it they survive.

A saved workflow holds widget values by position and links by slot, so inputs and outputs may only be added, optional
and at the end. Knows nothing of pytest and nothing of ComfyUI.
"""

from __future__ import annotations

# Texts, and what the panel is told; none of it is in a saved workflow.
SHOWN_ONLY = ("tooltip", "placeholder", "display_name", "advanced", "trilora_blocks")
# Their choices are files and folders of one machine.
FILE_LISTS = ("lora_name", "folder")


def reduced(info: dict) -> dict:
    """The part of a node's entry in object_info that saved workflows rely on; the same for every host."""
    inputs = []
    for section in ("required", "optional"):
        entries = info["input"].get(section, {})
        for name in info["input_order"].get(section, ()):
            kind, options = entries[name][0], (entries[name][1] if len(entries[name]) > 1 else {})
            kept = {key: value for key, value in options.items() if key not in SHOWN_ONLY}
            if name in FILE_LISTS:
                kept.pop("options", None)
            inputs.append({"name": name, "section": section, "type": kind, **kept})
    outputs = zip(info["output_name"], info["output"], info["output_is_list"], strict=True)
    return {
        "inputs": inputs,
        "outputs": [{"name": name, "type": kind, "is_list": is_list} for name, kind, is_list in outputs],
        "output_node": info["output_node"],
    }


def differences(golden: dict, now: dict) -> tuple[list[str], list[str]]:
    """(changes that break saved workflows, additions that do not) of all nodes, each as a line of text."""
    broken = [f"{node}: is gone" for node in golden if node not in now]
    added = [f"{node}: is new" for node in now if node not in golden]
    for node in golden.keys() & now.keys():
        old, new = golden[node], now[node]
        if old["output_node"] != new["output_node"]:
            broken.append(f"{node}: output_node was {old['output_node']}")
        for kind in ("inputs", "outputs"):
            worse, more = _of_slots(old[kind], new[kind])
            broken += [f"{node}: {line}" for line in worse]
            added += [f"{node}: {line}" for line in more]
    return sorted(broken), sorted(added)


def _of_slots(old: list[dict], new: list[dict]) -> tuple[list[str], list[str]]:
    broken, added = [], []
    for place, slot in enumerate(old):
        if place >= len(new) or new[place]["name"] != slot["name"]:
            found = new[place]["name"] if place < len(new) else "nothing"
            broken.append(f"slot {place} was {slot['name']} and is {found}")
            continue
        worse, more = _of_one(slot, new[place])
        broken += [f"{slot['name']}: {line}" for line in worse]
        added += [f"{slot['name']}: {line}" for line in more]
    for slot in new[len(old) :]:
        is_safe = slot.get("section", "optional") == "optional"
        (added if is_safe else broken).append(f"{slot['name']} is new" + ("" if is_safe else " and required"))
    return broken, added


def _of_one(old: dict, new: dict) -> tuple[list[str], list[str]]:
    broken, added = [], []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        line = f"{key} was {before} and is {after}"
        (added if _is_wider(key, before, after) else broken).append(line)
    return broken, added


def _is_wider(key: str, before, after) -> bool:
    """Whether every value that was legal still is."""
    if None in (before, after):
        return False
    if key == "options":
        return set(before) <= set(after)
    if key == "min":
        return after < before
    return key == "max" and after > before
