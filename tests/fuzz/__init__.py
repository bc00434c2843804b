"""Random files and texts, drawn from a seed: each must end in a TriLoRAError or in a finite result, in bounded time."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_PACKAGE = "comfyui_trilora"

if _PACKAGE not in sys.modules and importlib.util.find_spec(_PACKAGE) is None:  # run without pytest, whose conftest.py does the same
    _spec = importlib.machinery.ModuleSpec(_PACKAGE, loader=None, is_package=True)
    _spec.submodule_search_locations = [str(Path(__file__).resolve().parents[2])]
    sys.modules[_PACKAGE] = importlib.util.module_from_spec(_spec)
