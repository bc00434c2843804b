"""What every test gets: the package under the name ``comfyui_trilora``, and fixed seeds.

ComfyUI loads the repository root as a package under a name of its own. The tests import the same tree as
``comfyui_trilora``; where an editable install has already made that name point here, it is left alone.
"""

import importlib.machinery
import importlib.util
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "comfyui_trilora"
SEED = 20260101


def points_here(package: str) -> bool:
    """True if importing ``package`` would give this very tree, not a copy installed elsewhere."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    locations = list(spec.submodule_search_locations or []) if spec else []
    return any(Path(location).resolve() == ROOT for location in locations)


def alias_root() -> None:
    """Makes ``comfyui_trilora`` a package that looks in ROOT, without running the root ``__init__``."""
    spec = importlib.machinery.ModuleSpec(PACKAGE, loader=None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)


if not points_here(PACKAGE):
    alias_root()


@pytest.fixture(autouse=True)
def fixed_seed() -> int:
    """Seeds Python, numpy and torch before each test, so that no test depends on which ran before it.

    One thread: the tests' tensors are too small to share, and threads that wait for each other cost five times the time.
    """
    random.seed(SEED)
    try:
        import numpy
        import torch
    except ImportError:  # the tests of the house itself need neither
        return SEED
    numpy.random.seed(SEED % 2**32)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    return SEED
