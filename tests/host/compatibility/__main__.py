"""Writes docs/compatibility.md: what the TriLoRA Loader makes of the files of peft, diffusers and LyCORIS.

    COMFYUI_PATH=<ComfyUI> <its python> tests/host/compatibility [--print]

Every row is a file that the library itself writes for a small model, loaded in that ComfyUI and compared with the
library's own merge. Ends with an error where a row is wrong; --print shows the page instead of writing it. The same rows
are tests, `test_compatibility.py`.
"""

import argparse
import asyncio
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = "comfyui_trilora"
ROWS = ("peft_rows", "peft_starts", "diffusers_rows", "text_rows", "lycoris_rows")
PAGE = ROOT / "docs" / "compatibility.md"
_HEAD = """# What is read of other tools' adapters

Made by `tests/host/compatibility`, do not edit. Each row is a file that the library itself wrote for a small model with linear layers and
convolutions. *TriLoRA Loader* puts it onto the same model in ComfyUI {host}, and what it adds to every weight and bias is compared with what the library's
own merge adds. "exact" is a relative distance of at most 1e-5; "refused" is the sentence that the node shows, before anything is applied.

| writer | adapter | options | result |
|---|---|---|---|
"""
_REST = """
## Not in the table

peft has these too, and cannot merge them into the weights of a linear layer or a convolution, or not where this page was made:

"""


def import_pack(base: Path) -> tuple:
    """(the host's version, its `nodes` with the pack loaded, function: dotted name -> module of the pack)."""
    if importlib.util.find_spec(PACKAGE) is None:
        spec = importlib.machinery.ModuleSpec(PACKAGE, loader=None, is_package=True)
        spec.submodule_search_locations = [str(ROOT)]
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    installation = importlib.import_module(f"{PACKAGE}.benchmarks.installation")
    for folder in ("models/checkpoints", "models/loras", "input", "output", "temp", "user", "custom_nodes"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    host = installation.import_host(installation.find_host(), ["--cpu", "--base-directory", str(base)])
    nodes, server = importlib.import_module("nodes"), importlib.import_module("server")

    async def load() -> bool:
        server.PromptServer(asyncio.get_running_loop())
        await nodes.init_public_apis()
        await nodes.init_builtin_extra_nodes()
        return await nodes.load_custom_node(str(ROOT))

    if not asyncio.run(load()):
        raise SystemExit("the pack did not load; see the log")
    pack = sys.modules[str(ROOT).replace(".", "_x_")].__name__
    return host.version, nodes, lambda name: importlib.import_module(f"{pack}.{name}")


def page(host: str, found: Iterable[tuple]) -> str:
    """The page's text. found: (Row, Outcome) each."""
    lines, rest, kinds = [], [], {}
    for row, outcome in found:
        kinds.setdefault((row.writer, row.kind), []).append((row, outcome))
    for row, outcome in (one for rows in kinds.values() for one in rows):
        if outcome.verdict == "not written":
            rest.append(f"- {row.name}: {_cell(outcome.text).strip(': ')}")
        else:
            lines.append(f"| {row.writer} | {row.kind} | {_cell(row.options)} | {_result(outcome)} |")
    return _HEAD.format(host=host) + "\n".join(lines) + "\n" + (_REST + "\n".join(rest) + "\n" if rest else "")


def _result(outcome) -> str:
    said = outcome.text if outcome.verdict in ("refused", "WRONG") else " ".join(outcome.notices)
    name, _, sentence = said.partition(": ")  # the file's name
    return outcome.verdict + (f": {_cell(sentence if name.endswith('.safetensors') else said)}" if said else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="show the page instead of writing it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as base:
        version, nodes, pack_module = import_pack(Path(base))
        measure = importlib.import_module(f"{PACKAGE}.tests.host.compatibility.outcomes").outcome
        found = []
        for name in ROWS:
            for row in importlib.import_module(f"{PACKAGE}.tests.host.compatibility.{name}").rows():
                found.append((row, measure(nodes, pack_module, row)))
                sys.stderr.write(f"{found[-1][1].verdict:18} {row.name}\n")
    text = page(version, found)
    if arguments.print:
        sys.stdout.write(text)
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
    wrong = [row.name for row, outcome in found if outcome.verdict == "WRONG"]
    if wrong:
        raise SystemExit(f"{len(wrong)} rows are WRONG: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
