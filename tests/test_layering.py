"""The floors of the house: which part may import which, read from the syntax tree of every file.

trilora_ops (1) < training (2) < nodes (3). Of the pack only nodes/ imports the host. benchmarks/, which is not part of
the pack that people install, measures and drives the host and may import it too; cli.py may do so inside functions.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "comfyui_trilora"

# Top-level modules that only exist inside ComfyUI. `nodes` is the host's when imported absolutely, ours when relatively.
HOST_MODULES = {
    "comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras", "comfyui_version",
    "execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "server",
}  # fmt: skip

# What no file of a floor may import of ours.
FORBIDDEN_FLOORS = {
    "trilora_ops": {"training", "nodes", "cli", "benchmarks", "tests"},
    "training": {"nodes", "cli", "benchmarks", "tests"},
    "nodes": {"cli", "benchmarks", "tests"},
    "benchmarks": {"tests"},
}

SKIPPED_DIRECTORIES = {"tests", "build", "dist", "venv", "node_modules", "__pycache__"}


def source_files(root: Path) -> list[Path]:
    """Every Python file of the project below ``root``, tests and hidden directories excepted; relative paths."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if not any(part.startswith(".") or part in SKIPPED_DIRECTORIES for part in folders):
            found.append(relative)
    return found


def imports_of(tree: ast.Module) -> Iterator[tuple[int, int, str, bool]]:
    """Yields (line, level, dotted name, inside a function) for every import in a file.

    ``level`` counts the leading dots, 0 for absolute. ``from a import b`` yields both ``a`` and ``a.b``, since b may
    be a module. A literal name given to import_module or __import__ counts as an import.
    """
    stack: list[tuple[ast.AST, bool]] = [(tree, False)]
    while stack:
        node, inside = stack.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name, inside
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if base:
                yield node.lineno, node.level, base, inside
            for alias in node.names:
                yield node.lineno, node.level, f"{base}.{alias.name}".strip("."), inside
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str):
                dots = len(name) - len(name.lstrip("."))
                yield node.lineno, dots, name.lstrip("."), inside
        inner = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        stack.extend((child, inner) for child in ast.iter_child_nodes(node))


def target_of(relative: Path, level: int, name: str) -> tuple[str, str]:
    """Says what an import means: ("ours", floor) or ("other", top-level module)."""
    parts = name.split(".")
    if level:
        package = relative.parts[:-1]
        base = package[: len(package) - (level - 1)]
        return "ours", (*base, *parts)[0]
    if parts[0] == PACKAGE:
        return "ours", parts[1] if len(parts) > 1 else ""
    return "other", parts[0]


def violations(root: Path) -> list[str]:
    """Every import below ``root`` that points upward, as "file:line imports what (rule)"."""
    found = set()
    for relative in source_files(root):
        floor = relative.parts[0] if len(relative.parts) > 1 else relative.name
        tree = ast.parse((root / relative).read_text(encoding="utf-8"), filename=str(relative))
        for line, level, name, inside in imports_of(tree):
            where = f"{relative.as_posix()}:{line} imports {'.' * level}{name}"
            kind, target = target_of(relative, level, name)
            if floor == "__init__.py" and not inside:
                found.add(
                    f"{where} (the root __init__ imports nothing at module scope: import inside comfy_entrypoint)"
                )
            if kind == "ours" and target in FORBIDDEN_FLOORS.get(floor, ()):
                found.add(f"{where} ({floor} may not import {target})")
            if kind == "other" and target in HOST_MODULES and floor not in ("nodes", "benchmarks") and not (floor == "cli.py" and inside):
                found.add(f"{where} (only nodes/ and benchmarks/ may import the host, and cli.py inside functions)")
    return sorted(found)


def test_the_walk_finds_the_floors():
    floors = {path.parts[0] for path in source_files(ROOT)}
    assert {"trilora_ops", "training", "nodes", "__init__.py"} <= floors


def test_no_import_points_upward():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("trilora_ops/a.py", "import torch\nfrom .b import c\nfrom .residuals import d", True),
        ("trilora_ops/a.py", "from ..training import loop", False),
        ("trilora_ops/a.py", "from .. import training", False),
        ("trilora_ops/residuals/a.py", "from ...nodes.types import X", False),
        ("trilora_ops/residuals/a.py", "from ..adapter import X", True),
        ("trilora_ops/nodes.py", "from .nodes import X", True),
        ("trilora_ops/a.py", "import comfy.ops", False),
        ("trilora_ops/a.py", "def f():\n    import comfy", False),
        ("trilora_ops/a.py", "from comfyui_trilora.training import loop", False),
        ("trilora_ops/a.py", "import importlib\nimportlib.import_module('folder_paths')", False),
        ("training/a.py", "from ..trilora_ops import adapter", True),
        ("training/a.py", "from ..nodes import compat", False),
        ("training/a.py", "import nodes", False),
        ("training/a.py", "if True:\n    from comfy_api.latest import io", False),
        ("nodes/a.py", "import comfy.utils\nfrom ..training import loop\nfrom ..trilora_ops import blocks", True),
        ("nodes/a.py", "from ..cli import main", False),
        ("cli.py", "def main():\n    import comfy.sd", True),
        ("cli.py", "import comfy.sd", False),
        ("benchmarks/a.py", "def f():\n    import folder_paths", True),
        ("__init__.py", "WEB_DIRECTORY = './web'\nasync def comfy_entrypoint():\n    from .nodes import X", True),
        ("__init__.py", "import torch", False),
        ("__init__.py", "try:\n    from .nodes import X\nexcept ImportError:\n    pass", False),
    ],
)
def test_the_checker_sees_planted_imports(tmp_path, path, source, allowed):
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")
    assert (violations(tmp_path) == []) is allowed


def test_the_checker_leaves_tests_and_hidden_directories_alone(tmp_path):
    for folder in ("tests", ".venv", "build"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("import comfy")
    assert source_files(tmp_path) == []
