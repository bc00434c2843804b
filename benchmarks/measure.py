"""What the benchmarks share: a ComfyUI and the pack in one process, alternating runs, peak memory, tables.

Names of modules are looked up while running (`module`): no file here imports the host or the pack's nodes, so that
benchmarks can be imported without ComfyUI.
"""

import ctypes
import gc
import importlib
import importlib.machinery
import importlib.util
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import installation
import torch
from installation import ROOT

PACKAGE = "comfyui_trilora"
MIB = 2**20


def module(name: str):
    """A module of the host ("comfy.sd") or of the pack ("comfyui_trilora.nodes.load"), imported on first use."""
    return importlib.import_module(name)


def node(module_name: str, class_name: str):
    """A node of the pack as the host's executor prepares it; `module_name`: below nodes/."""
    return getattr(module(f"{PACKAGE}.nodes.{module_name}"), class_name).PREPARE_CLASS_CLONE(None)


def start_host(base: Path, device: str) -> str:
    """Import the ComfyUI that COMFYUI_PATH names, and make the pack importable; returns the host's version.

    base: directory for everything the host reads or writes; device: "cpu" or "cuda".
    """
    for folder in ("models/diffusion_models", "models/loras", "input", "output", "temp", "user", "custom_nodes"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    # the two sides of a pair stay loaded together: --gpu-only keeps the host from moving one away for the other
    arguments = ["--base-directory", str(base), "--cpu" if device == "cpu" else "--gpu-only"]
    try:
        host = installation.import_host(Path(os.environ.get("COMFYUI_PATH", "")), arguments)
    except installation.HostUnavailable as error:
        raise SystemExit(f"{error}; set COMFYUI_PATH to a ComfyUI directory, and run this with that ComfyUI's own Python") from None
    module("logging").getLogger().setLevel("ERROR")
    module("comfy.utils").PROGRESS_BAR_ENABLED = False
    if importlib.util.find_spec(PACKAGE) is None:
        spec = importlib.machinery.ModuleSpec(PACKAGE, loader=None, is_package=True)
        spec.submodule_search_locations = [str(ROOT)]
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    return host.version


class Coroutine:
    """A function in a thread of its own that stops wherever it calls `Coroutine.pause`.

    Two long loops that cannot be taken apart (two trainers, say) run in turns this way: `advance` lets one of them run
    to its next stop while everything else stands still.
    """

    _current = threading.local()

    def __init__(self, function: Callable[[], object]):
        self.error: BaseException | None = None
        self.finished = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], object]) -> None:
        self._current.value = self
        self._go.acquire()
        try:
            with torch.inference_mode():  # as the host runs its nodes
                function()
        except BaseException as error:
            self.error = error
        self.finished = True
        self._stopped.release()

    @classmethod
    def pause(cls) -> None:
        """Stop the coroutine that calls this until it is advanced again; nothing happens outside of one."""
        self = getattr(cls._current, "value", None)
        if self is not None:
            self._stopped.release()
            self._go.acquire()

    def advance(self) -> None:
        """Run to the next pause or to the end. Raises what the function raised."""
        if not self.finished:
            self._go.release()
            self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Run to the end, past all pauses."""
        while not self.finished:
            self.advance()


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one run, with the device idle before and after."""
    synchronise()
    started = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - started


def alternate(sides: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Times of `runs` runs of every side, in turns (a, b, a, b, ...): a slow minute of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, run in sides.items():
            gc.collect()
            times[name].append(seconds(run))
    return times


def peak_memory(run: Callable[[], object]) -> float:
    """Bytes that one run takes on top of what was in memory before it, at its highest.

    CUDA: the allocator's own peak. CPU (Linux): the process's peak of resident memory, which the kernel starts anew on
    request; memory that was freed but not given back is given back first. NaN where neither can be had.
    """
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError):
        run()
        return float("nan")
    run()
    return _status("VmHWM") - before


def synchronise() -> None:
    """Wait for the GPU, where there is one at work."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def median(times: Sequence[float]) -> float:
    """Middle value, s."""
    return statistics.median(times)


def shown(seconds: float) -> str:
    """A time for people: seconds from 1 s up, milliseconds below."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Median of the ratios ours_i / peer_i of runs made one after the other (unitless, below 1 = ours is faster)."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_machine(version: str, device: str) -> str:
    """One line: what the figures were taken on."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, ComfyUI {version}{load}"


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
