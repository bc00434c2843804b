"""Finds a ComfyUI installation and imports it into the running interpreter.

Knows nothing of pytest. The one entry is ``import_host``, which gives a ``Host`` or raises ``HostUnavailable`` with a
sentence that says what is missing and what to do about it.
"""

import importlib
import inspect
import os
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What a failed import must not leave behind.
HOST_PACKAGES = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "nodes",
    "server",
    "utils",
    "folder_paths",
    "execution",
    "app",
}


class HostUnavailable(Exception):
    """There is no ComfyUI that this interpreter can import."""


@dataclass(frozen=True)
class Host:
    """An imported ComfyUI: its directory and its version."""

    path: Path
    version: str


def is_host(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfyui_version.py").is_file()


def find_host() -> Path:
    """The ComfyUI to test with: COMFYUI_PATH, else the one around this repository, else ~/comfy/ComfyUI."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        if not is_host(Path(named)):
            raise HostUnavailable(f"COMFYUI_PATH is '{named}', which holds no main.py and comfyui_version.py")
        return Path(named).resolve()
    candidates = [Path.home() / "comfy" / "ComfyUI"]
    if ROOT.parent.name == "custom_nodes":
        candidates.insert(0, ROOT.parent.parent)
    for candidate in candidates:
        if is_host(candidate):
            return candidate.resolve()
    raise HostUnavailable("no ComfyUI found")


def missing_requirements(host: Path) -> list[str]:
    """Names from the host's requirements.txt that this interpreter lacks; versions are not compared."""
    missing = []
    for line in (host / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#non essential"):
            break
        name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line)
        if name:
            try:
                metadata.version(name.group())
            except metadata.PackageNotFoundError:
                missing.append(name.group())
    return missing


def read_version(host: Path) -> str:
    text = (host / "comfyui_version.py").read_text(encoding="utf-8")
    return re.search(r'__version__\s*=\s*"([^"]+)"', text).group(1)


def import_host(path: Path, arguments: list[str]) -> Host:
    """Imports the ``nodes`` and ``server`` of the ComfyUI in directory ``path``; ``arguments`` are those of its main.py."""
    if not is_host(path):
        raise HostUnavailable(f"'{path}' holds no main.py and comfyui_version.py; give the directory of a ComfyUI")
    path = path.resolve()
    missing = missing_requirements(path)
    if missing:
        shown = ", ".join(missing[:4]) + (", …" if len(missing) > 4 else "")
        raise HostUnavailable(f"{sys.executable} lacks {len(missing)} requirements of {path} ({shown})")
    argv, search_path, modules = sys.argv, list(sys.path), set(sys.modules)
    sys.path.insert(0, str(path))
    sys.argv = ["main.py", *arguments]
    try:
        # Before anything else of comfy: without it --cpu is ignored, and the import asks for CUDA.
        importlib.import_module("comfy.options").enable_args_parsing()
        # Before nodes, as main.py does: nodes puts comfy/ on sys.path, whose utils.py hides the host's utils package.
        importlib.import_module("utils.extra_config")
        importlib.import_module("utils.install_util")
        importlib.import_module("nodes")
        importlib.import_module("server")
    except BaseException as error:  # an argument parser exits, a wrong torch raises anything
        if isinstance(error, KeyboardInterrupt):
            raise
        sys.path[:] = search_path
        for name in set(sys.modules) - modules:
            if name.split(".")[0] in HOST_PACKAGES:
                del sys.modules[name]
        raise HostUnavailable(f"importing {path} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = argv
    return Host(path, read_version(path))


def cache_arguments(executor: type) -> dict:
    """What ``execution.PromptExecutor`` wants to know about caching, in either version: plain caching, no limits."""
    known = inspect.signature(executor).parameters
    return {"cache_args": {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}} if "cache_args" in known else {}
