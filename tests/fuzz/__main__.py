"""Random files and texts for as long as one likes; every one must end in a TriLoRAError or in finite numbers.

    python -m tests.fuzz                               some seconds
    python -m tests.fuzz --long                        50,000 files and 200,000 texts
    python -m tests.fuzz --files N --texts N --seed S

A file is written and read as any file is, then each of its layers is read by the table of kinds, checked, computed and baked
(`layers.check`). A finding is printed with the seed that draws it again, and the exit status is 1. The same files on their way
through the nodes, inside a ComfyUI:

    TRILORA_FUZZ=5000 COMFYUI_PATH=<ComfyUI> <its python> -m pytest tests/host/test_broken_kinds.py -k random_faults
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from comfyui_trilora.trilora_ops.checkpoint import AdapterState, canonical_state, read_adapter
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.files import kinds
from safetensors.torch import save_file

from . import files, layers, mutations, texts

LONG = (50_000, 200_000)
SHORT = (500, 2_000)


def file_problem(rng: random.Random, folder: Path) -> str:
    """What is wrong with what one file came to, "" if nothing is."""
    weights = {f"w{number}": files.numbers(rng, *shape, size=1.0) for number, shape in enumerate(files.SHAPES)}
    drawn = files.file(rng, {name: tuple(weight.shape) for name, weight in weights.items()})
    tensors, faults = mutations.mutated(rng, drawn)
    path = folder / "fuzzed.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    try:
        layers.check(kinds, TriLoRAError, tensors, weights)
        read = whole(path)
        if read is not None:
            layers.check(kinds, TriLoRAError, read, weights)
    except Exception as error:  # any that is not ours is what is looked for
        told = {key[:60]: (tuple(tensor.shape), str(tensor.dtype)) for key, tensor in tensors.items()}
        return f"{faults}: {type(error).__name__}: {error!s:.300}; {told}"
    return ""


def whole(path: Path) -> AdapterState | None:
    """The file as it would be saved again, None where it is refused. Raises AssertionError for a message without end."""
    try:
        return canonical_state(read_adapter(path))
    except TriLoRAError as refused:
        assert 20 < len(str(refused)) <= layers.LONGEST, f"a message of {len(str(refused))} letters"
        return None


def text_problem(rng: random.Random, folder: Path) -> str:
    """What is wrong with what one text came to, "" if nothing is."""
    drawn = texts.random_text(rng)
    problem = texts.problem(drawn)
    return f"{problem}: {drawn!r:.600}" if problem else ""


def findings(what: str, count: int, seed: str, problem: Callable[[random.Random, Path], str]) -> Iterator[str]:
    """The problems of `count` draws, each with its seed; says how it goes every few seconds."""
    begin = told = time.monotonic()
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="trilora-fuzz-") as folder:
        for number in range(count):
            start = time.process_time()
            found = problem(random.Random(f"{seed}:{number}"), Path(folder))
            slowest = max(slowest, time.process_time() - start)
            if found:
                yield f"{what} {seed}:{number}: {found}"
            if time.monotonic() - told > 10 or number + 1 == count:
                told = time.monotonic()
                print(f"{number + 1} of {count} {what} in {told - begin:.0f} s, the slowest {slowest:.2f} s", flush=True)


def main() -> int:
    """Exit status: 1 with findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help=f"{LONG[0]} files and {LONG[1]} texts")
    parser.add_argument("--files", type=int, help="number of files")
    parser.add_argument("--texts", type=int, help="number of texts")
    parser.add_argument("--seed", default="0", help="any text (default 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    usual = LONG if args.long else SHORT
    counts = (usual[0] if args.files is None else args.files, usual[1] if args.texts is None else args.texts)
    found = 0
    for what, count, problem in (("files", counts[0], file_problem), ("texts", counts[1], text_problem)):
        for line in findings(what, count, args.seed, problem):
            print(line, flush=True)
            found += 1
    print(f"{found} findings")
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
