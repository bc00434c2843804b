"""The rules of the house that no other test sees: packaging, the registry's conditions, file sizes, banned calls."""

import ast
import fnmatch
import re
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings tomli along there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 350
GENERATED = {"build", "dist", "venv", "node_modules", "__pycache__"}
TEXT_SUFFIXES = {".py", ".js", ".css", ".html", ".md", ".toml", ".txt", ".json", ".yml", ".yaml", ".sh", ""}

BANNED_MODULES = {"subprocess", "pickle", "dill", "shelve", "marshal", "requests", "urllib3", "httpx", "socket"}
BANNED_NAMES = {"eval", "exec", "__import__"}
BANNED_ATTRIBUTES = {("torch", "load"), ("os", "system"), ("os", "popen"), ("urllib", "request")}
BANNED_SCRIPT = re.compile(r"\beval\s*\(|\bnew\s+Function\s*\(")
# Directories of one machine or one person. Built from pieces so that this file passes its own test.
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:" + "|".join(["root", "work", r"home/\w+", r"Users/\w+"]) + r")/|[A-Z]:\\\\?Users"
)


def ignore_patterns() -> list[str]:
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def ignored(relative: str, patterns: list[str]) -> bool:
    """Whether .comfyignore leaves the file out. Knows what the file uses: folders, paths and globs, no negation."""
    folders = relative.split("/")[:-1]
    for pattern in patterns:
        body = pattern.strip("/")
        if pattern.endswith("/"):
            if body in folders or f"{relative}".startswith(f"{body}/"):
                return True
        elif fnmatch.fnmatch(relative, body) or fnmatch.fnmatch(relative.rsplit("/", 1)[-1], body):
            return True
    return False


def project_files() -> list[str]:
    """Every file of the tree that could be in the repository, as posix paths; caches and built things excepted."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        skipped = any(p in GENERATED or p.endswith(("_cache", ".egg-info")) or p in (".git", ".venv") for p in parts)
        if path.is_file() and not skipped:
            found.append("/".join(parts))
    return found


def shipped_files() -> list[str]:
    patterns = ignore_patterns()
    return [name for name in project_files() if not ignored(name, patterns)]


def banned_calls(source: str) -> list[str]:
    """Names of everything in Python source that code which runs on other people's machines must not do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [
                a.name for a in node.names if a.name.split(".")[0] in BANNED_MODULES or a.name == "urllib.request"
            ]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            found += [module] if module.split(".")[0] in BANNED_MODULES else []
            found += [f"{module}.{a.name}" for a in node.names if (module, a.name) in BANNED_ATTRIBUTES]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BANNED_NAMES:
            found.append(node.func.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in BANNED_ATTRIBUTES:
                found.append(f"{node.value.id}.{node.attr}")
    return found


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_project_follows_the_registry(pyproject):
    project = pyproject["project"]
    name = project["name"]
    assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9._-]{0,98}", name) and "comfyui" not in name.lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == {"file": "LICENSE"} and (ROOT / "LICENSE").is_file()
    assert project["requires-python"] == ">=3.10"
    assert project["urls"]["Repository"].startswith("https://")
    systems = ("Microsoft", "POSIX", "MacOS", "OS Independent")
    accelerators = {"NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal"}
    for kind, _, value in (entry.partition(" :: ") for entry in project["classifiers"]):
        assert kind in ("Operating System", "Environment")
        assert value.startswith(systems) if kind == "Operating System" else value.split(" :: ")[-1] in accelerators


def test_comfy_section(pyproject):
    comfy = pyproject["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"] == "ComfyUI-TriLoRA"
    assert all(re.fullmatch(r"(>=|<=|==|!=|<|>)?\d+\.\d+\.\d+", part) for part in comfy["requires-comfyui"].split(","))
    # `web` here would serve the scripts a second time beside WEB_DIRECTORY, under another name.
    assert "web" not in comfy


def test_requirements_repeat_the_dependencies(pyproject):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    assert [line for line in lines if line] == pyproject["project"]["dependencies"]


def test_the_package_list_is_the_tree(pyproject):
    floors = ("trilora_ops", "training", "nodes", "benchmarks")
    found = {
        name.rsplit("/", 1)[0] for name in project_files() if name.endswith(".py") and name.split("/")[0] in floors
    }
    expected = {"comfyui_trilora", *("comfyui_trilora." + folder.replace("/", ".") for folder in found)}
    assert expected <= set(pyproject["tool"]["setuptools"]["packages"])


def test_changelog_has_the_current_version(pyproject):
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{pyproject['project']['version']}]" in changelog and "## [Unreleased]" in changelog


def test_comfyignore_covers_what_users_do_not_need():
    patterns = ignore_patterns()
    for name in ("tests/conftest.py", "tests/host/server.py", "benchmarks/world/weights.safetensors", ".ci/run"):
        assert ignored(name, patterns), name
    for name in ("__init__.py", "nodes/load.py", "trilora_ops/residuals/lora.py", "web/panel.js", "LICENSE"):
        assert not ignored(name, patterns), name
    assert not [name for name in shipped_files() if name.endswith((".safetensors", ".pt", ".ckpt"))]


@pytest.mark.parametrize("name", [name for name in project_files() if name.endswith(".py")])
def test_files_stay_short(name):
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines, at most {MAX_LINES} are allowed: split it by subject"


def test_no_machine_paths():
    found = []
    for name in project_files():
        if Path(name).suffix in TEXT_SUFFIXES:
            for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
                if MACHINE_PATH.search(line):
                    found.append(f"{name}:{number}: {line.strip()}")
    assert found == []


def test_shipped_code_calls_nothing_banned():
    found = []
    for name in shipped_files():
        text = (ROOT / name).read_text(encoding="utf-8") if name.endswith((".py", ".js")) else ""
        if name.endswith(".py"):
            found += [f"{name}: {call}" for call in banned_calls(text)]
        elif BANNED_SCRIPT.search(text):
            found.append(f"{name}: {BANNED_SCRIPT.search(text).group()}")
    assert found == []


@pytest.mark.parametrize(
    "source",
    ["eval('1')", "exec('x')", "import subprocess", "from pickle import loads", "torch.load(p)", "from torch import load",
     "import os\nos.system('x')", "import urllib.request", "__import__('os')"],
)  # fmt: skip
def test_the_search_sees_planted_calls(source):
    assert banned_calls(source)


@pytest.mark.parametrize(
    "source", ["model.eval()", "safetensors.torch.load_file(p)", "self.load(p)", "re.compile('x')"]
)
def test_the_search_lets_others_pass(source):
    assert not banned_calls(source)


@pytest.mark.parametrize(
    ("line", "found"), [("/wo" + "rk/main/x", True), ("'/ro" + "ot/a'", True), ("/framework/a", False)]
)
def test_machine_paths_are_recognised(line, found):
    assert bool(MACHINE_PATH.search(line)) is found
