"""The `trilora` command."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from .trilora_ops.errors import TriLoRAError


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; 0 on success, 1 for bad input with one sentence on stderr, 130 after Ctrl+C."""
    parser = argparse.ArgumentParser(prog="trilora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="teach a small model a new style from a handful of pictures, and look at it",
                               description="Trains a TriLoRA in about a minute on two CPU cores, without ComfyUI and without a download. "
                                           "Writes the adapter, before_after.png, loss.png and report.json.")
    demo.add_argument("--output", type=Path, default=Path("trilora-demo"), metavar="FOLDER", help="where to write (default: %(default)s)")
    demo.add_argument("--style", default="neon", help="neon, stamp or blueprint (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of every random draw (default: %(default)s)")
    demo.add_argument("--comfyui", type=Path, metavar="PATH", help="do the same through this ComfyUI, with the bundled workflows")
    demo.add_argument("--checkpoint", metavar="NAME", help="with --comfyui: one of its checkpoints, instead of the small world")
    inspect = commands.add_parser("inspect", help="say what an adapter file is", description="Kind, model family, program and blocks of a .safetensors adapter, "
                                  "as its names, sizes and metadata tell them; without ComfyUI and without the model.")
    inspect.add_argument("file", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return _demo(options) if options.command == "demo" else _inspect(options.file)
    except TriLoRAError as error:
        print(f"trilora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _inspect(path: Path) -> int:
    from .trilora_ops.checkpoint import read_adapter
    from .trilora_ops.inspection import describe_adapter, inspect

    if not path.is_file():
        raise TriLoRAError(f"FILE={path}: there is no such file")
    state = read_adapter(path)
    print(describe_adapter(inspect(state), state.metadata, state))
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        from .benchmarks.world import demo, scenes
    except ModuleNotFoundError as error:
        missing = error.name or ""
        remedy = ("this copy came from the registry, which leaves the demo out; clone the repository" if "benchmarks" in missing
                  else 'install what it needs with: pip install -e ".[demo]"')
        raise TriLoRAError(f"demo: {missing} is missing; {remedy}") from error
    if options.style not in scenes.STYLES:
        raise TriLoRAError(f"style={options.style!r}: choose one of {', '.join(scenes.STYLES)}")
    if options.checkpoint and not options.comfyui:
        raise TriLoRAError("checkpoint: needs --comfyui PATH, whose models/checkpoints holds the file")
    if options.comfyui:
        from .benchmarks.world import comfy_demo

        report = comfy_demo.run(options.comfyui, options.checkpoint, options.output, options.style, options.seed)
    else:
        from tqdm import tqdm

        bar = tqdm(total=demo.SETTINGS.steps, desc=f"learning '{options.style}'", unit="step")

        def show(progress) -> None:
            bar.set_postfix(loss=f"{progress.smooth_loss:.4f}", refresh=False)
            bar.update(1)

        with bar:
            report = demo.run(options.output, options.style, options.seed, show)
    print(json.dumps(report, indent=2))
    print(f"\nLook at {options.output / 'before_after.png'} and {options.output / 'loss.png'}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
