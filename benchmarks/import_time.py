"""What the pack adds to the host's start: the time of the host's own loader on it, in fresh processes.

    COMFYUI_PATH=<ComfyUI> <its python> benchmarks/import_time.py [--runs 7]

Every run is a process of its own: it imports the host and all of the host's own nodes, as a start does, then times
`nodes.load_custom_node` on an empty pack (what the host itself needs for any pack) and on this one. A first process
that is not counted writes the byte code.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

_EMPTY = """from comfy_api.latest import ComfyExtension
class Empty(ComfyExtension):
    async def get_node_list(self):
        return []
async def comfy_entrypoint():
    return Empty()
"""


def load_times(base: Path) -> dict[str, float]:
    """{"empty", "pack"} -> seconds of the host's loader in this process, host and built-in nodes being loaded already."""
    version = measure.start_host(base, "cpu")
    nodes, server = measure.module("nodes"), measure.module("server")
    empty = base / "custom_nodes" / "empty_pack"
    empty.mkdir()
    (empty / "__init__.py").write_text(_EMPTY, encoding="utf-8")

    async def load() -> dict[str, float]:
        server.PromptServer(asyncio.get_running_loop())  # some of the host's nodes ask for it while being imported
        await nodes.init_public_apis()
        await nodes.init_builtin_extra_nodes()
        times = {}
        for name, place in (("empty", empty), ("pack", measure.ROOT)):
            started = time.perf_counter()
            if not await nodes.load_custom_node(str(place)):
                raise SystemExit(f"the host could not load {place}")
            times[name] = time.perf_counter() - started
        return times

    return {"version": version, **asyncio.run(load())}


def main() -> None:
    """Prints the median over the runs, ms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="fresh processes (default 7)")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)  # what a fresh process is started with
    args = parser.parse_args()
    if args.once:
        with tempfile.TemporaryDirectory(prefix="trilora-benchmark-") as folder:
            print(json.dumps(load_times(Path(folder))))
        return
    results = []
    for _ in range(args.runs + 1):
        done = subprocess.run([sys.executable, __file__, "--once"], stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name in ("empty", "pack"):
        times = [1000 * result[name] for result in results[1:]]
        rows.append([name, f"{measure.median(times):.0f} ms", f"{min(times):.0f} to {max(times):.0f} ms"])
    print(f"\n{measure.describe_machine(results[0]['version'], 'cpu')}; median of {args.runs} fresh processes\n")
    print(measure.table(["loaded", "time", "range"], rows))


if __name__ == "__main__":
    main()
