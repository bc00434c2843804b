"""Time and memory of an Adapter Stack of low-rank files against a chain of the host's own LoRA loaders.

    COMFYUI_PATH=<ComfyUI> <its python> benchmarks/stacking.py [--small] [--files 1 5 10] [--runs 7] [--device cuda]

Files, model, sides and columns are those of `applying.py`; here our side is one Adapter Stack node a file and one Apply
Adapter Stack.
"""

import applying
from measure import node


def ours(model, names: list[str]):
    """The model with every file on it, as a stack."""
    adding, stack = node("stack", "AdapterStack"), None
    for name, strength in zip(names, applying.STRENGTHS, strict=False):
        stack = adding.execute(name, strength, strength, 0, stack).args[0]
    return node("stack", "ApplyStack").execute(model, stack).args[0]


if __name__ == "__main__":
    applying.main(__doc__, ours, [1, 5, 10])
