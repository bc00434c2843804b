"""Turns the front end's saved workflow into the prompt that ``POST /prompt`` takes.

A saved workflow lists nodes with their widget values by position, and links between slots. A prompt is
``{node id: {"class_type", "inputs": {name: value or [node id, output slot]}}}``. ``object_info`` (the answer of
``GET /object_info``) tells which inputs of a node class are widgets, and in which order.
"""

from collections.abc import Iterator

MUTED, BYPASSED = 2, 4
NOTES = {"Note", "MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
# The front end adds the "after generation" selector to inputs of these names even where the schema does not ask for it.
SEED_NAMES = {"seed", "noise_seed"}


class WorkflowError(ValueError):
    """A workflow that cannot become a prompt; the message names the node and the remedy."""


def widget_slots(node: dict, description: dict) -> Iterator[str | None]:
    """Names the inputs to which a node's widget values belong, in order; None for the front end's own widgets.

    ``description`` is the node class's entry in object_info.
    """
    # Inputs with a widget that only scripts know are marked in the saved node itself.
    marked = {entry["name"] for entry in node.get("inputs", []) if "widget" in entry}
    for section in ("required", "optional"):
        entries = description["input"].get(section, {})
        order = description.get("input_order", {}).get(section, entries)
        uploads = 0
        for name in order:
            kind, options = entries[name][0], (entries[name][1] if len(entries[name]) > 1 else {})
            is_widget = isinstance(kind, list) or kind in WIDGET_TYPES
            if options.get("forceInput") or not (is_widget or name in marked):
                continue
            yield name
            if options.get("control_after_generate", kind == "INT" and name in SEED_NAMES):
                yield None
            uploads += any(options.get(f"{medium}_upload") for medium in ("image", "audio", "video", "file"))
        # The upload button stands behind the required inputs.
        yield from [None] * uploads


def widget_values(node: dict, description: dict) -> dict[str, object]:
    """The node's own values by input name; a missing tail is left out, since the host knows the defaults."""
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        known = {name for section in description["input"].values() for name in section}
        return {name: value for name, value in values.items() if name in known}
    pairs = zip(widget_slots(node, description), values, strict=False)
    return {name: value for name, value in pairs if name is not None}


class Graph:
    """A saved workflow's nodes and links, and the way back from an input to what feeds it."""

    def __init__(self, workflow: dict):
        self.nodes = {str(node["id"]): node for node in workflow["nodes"]}
        self.links: dict[int, tuple[str, int]] = {}  # link id -> (source node id, source slot)
        for link in workflow.get("links", []):
            if isinstance(link, dict):
                self.links[link["id"]] = (str(link["origin_id"]), link["origin_slot"])
            else:
                self.links[link[0]] = (str(link[1]), link[2])

    def source(self, link_id: int | None) -> tuple[str, int] | object | None:
        """What feeds a link: (node id, slot); the value of a primitive node, as ``Value``; None if nothing does.

        Follows bypassed nodes and reroutes backwards; a muted node feeds nothing.
        """
        seen = set()
        while link_id is not None:
            if link_id in seen or link_id not in self.links:
                raise WorkflowError(f"link {link_id} leads in a circle or to nothing: save the workflow anew")
            seen.add(link_id)
            node_id, slot = self.links[link_id]
            node = self.nodes[node_id]
            if node.get("mode") == MUTED:
                return None
            if node["type"] == "PrimitiveNode":
                return Value(node["widgets_values"][0])
            if node["type"] != "Reroute" and node.get("mode") != BYPASSED:
                return node_id, slot
            link_id = passed_through(node, slot)
        return None


class Value:
    """A plain value that stands where a link was."""

    def __init__(self, value: object):
        self.value = value


def passed_through(node: dict, slot: int) -> int | None:
    """The link that a bypassed node hands on at output ``slot``: same position if the type fits, else the first that fits."""
    inputs = node.get("inputs", [])
    if node["type"] == "Reroute":
        return inputs[0].get("link")
    wanted = node["outputs"][slot]["type"]
    for entry in inputs[slot : slot + 1] + inputs:
        if entry["type"] == wanted or "*" in (entry["type"], wanted):
            return entry.get("link")
    return None


def to_prompt(workflow_json: dict, object_info: dict[str, dict]) -> dict[str, dict]:
    """Converts a saved workflow to API format.

    Notes, muted and bypassed nodes are left out. Raises WorkflowError for a node class the host does not have.
    """
    graph = Graph(workflow_json)
    prompt = {}
    for node_id, node in graph.nodes.items():
        kind = node["type"]
        if kind in NOTES or kind in ("PrimitiveNode", "Reroute") or node.get("mode") in (MUTED, BYPASSED):
            continue
        if kind not in object_info:
            raise WorkflowError(
                f"node {node_id} is of class '{kind}', which this ComfyUI does not have: install its pack, or, if it is "
                "a subgraph, unpack it before saving"
            )
        inputs = widget_values(node, object_info[kind])
        for entry in node.get("inputs", []):
            if entry.get("link") is None:
                continue
            source = graph.source(entry["link"])
            if isinstance(source, Value):
                inputs[entry["name"]] = source.value
            elif source is not None:
                inputs[entry["name"]] = list(source)
        prompt[node_id] = {"class_type": kind, "inputs": inputs, "_meta": {"title": node.get("title", kind)}}
    return prompt
