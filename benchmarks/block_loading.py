"""Time and memory of loading a LoRA file with a strength for every block against loading it plainly with the same node.

    COMFYUI_PATH=<ComfyUI> <its python> benchmarks/block_loading.py [--small] [--runs 7] [--dtype fp16] [--device cuda]

The file, the model and the columns are those of `applying.py`. "blocks" has a text in which every block has a strength of
its own, none of them 0: as many groups of patches as can be. "plain" is the same node with its block weights empty. The
text is read anew in every run. "difference" is that of three weights from W + ratio * (W_1 - W), W_1 of the plain side; with
an fp16 base it is the rounding of W_1 to fp16.
"""

import argparse
import gc
import tempfile
from pathlib import Path

import applying
import measure
import sd15
import torch
from applying import Side
from measure import PACKAGE, module


def loader(text: str):
    """A function for `applying.Side`: TriLoRA Loader with these block weights."""
    return lambda model, names: measure.node("load", "TriLoRALoader").execute(model, names[0], 1.0, 0, block_weights=text).args[0]


def stack(text: str):
    """The same with an Adapter Stack of one file."""
    adding, together = (measure.node("stack", name) for name in ("AdapterStack", "ApplyStack"))
    return lambda model, names: together.execute(model, adding.execute(names[0], 1.0, 1.0, 0, block_weights=text).args[0]).args[0]


NODES = {"TriLoRA Loader": loader, "Adapter Stack": stack}


def every_block(blocks) -> tuple[str, dict[str, float]]:
    """(text, block -> strength): strengths from 0.5 up, no two of them alike."""
    ratios = {block: round(0.5 + 0.03 * number, 2) for number, block in enumerate(blocks.ids)}
    return ", ".join(f"{block}={ratio}" for block, ratio in ratios.items()), ratios


def difference(sides: dict[str, Side], model, blocks, ratios: dict[str, float]) -> float:
    """Largest relative distance of the weights with block strengths from the formula; raises where nothing has changed."""
    found, before = {}, applying.probe(model)
    for name, side in sides.items():
        side.both()  # the warm-up too
        found[name] = applying.probe(side.patched)
        side.reset()
    errors = []
    for key, weight in before.items():
        wanted = ratios[blocks.place(f"diffusion_model.{key}").block] * (found["peer"][key] - weight)
        if wanted.any():
            errors.append(float((found["ours"][key] - weight - wanted).norm() / wanted.norm()))
    if not errors:
        raise SystemExit("the patches changed nothing: this benchmark would measure nothing")
    return max(errors)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each side (default 7)")
    parser.add_argument("--dtype", nargs="+", choices=list(applying.DTYPES), default=list(applying.DTYPES), help="of the base weights (default both)")
    parser.add_argument("--small", action="store_true", help="a U-Net of 74 million parameters, for a quick look")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="trilora-benchmark-") as folder, torch.inference_mode():
        version = measure.start_host(Path(folder), args.device)
        models = Path(folder) / "models"
        path, names, rows = models / "diffusion_models" / "unet.safetensors", ["lora.safetensors"], []
        parameters = sd15.write_unet(path, args.small)
        for dtype in args.dtype:
            model = sd15.load_unet(path, applying.DTYPES[dtype])
            layers = sd15.write_lora(models / "loras" / names[0], model, applying.RANK, 0)
            blocks = module(f"{PACKAGE}.nodes.comfy_patches").Places.of(model, None).blocks
            text, ratios = every_block(blocks)
            for node, side in NODES.items():
                sides = {"ours": Side(side(text), model, names), "peer": Side(side(""), model, names)}
                error, peaks = difference(sides, model, blocks, ratios), {}
                for name, one in sides.items():
                    peaks[name] = measure.peak_memory(one.both)
                    one.reset()
                times = applying.turns(sides, args.runs)
                rows.append([*applying.row(times, peaks, [node, dtype]), f"{error:.0e}"])
                print("  ".join(rows[-1]), flush=True)
                for name, (read, patch) in times.items():
                    print("   ", {"ours": "blocks", "peer": "plain"}[name], "read", [round(t, 2) for t in read], "patch", [round(t, 2) for t in patch], flush=True)
            del model, sides
            gc.collect()
        print(f"\n{measure.describe_machine(version, args.device)}; U-Net of {parameters / 1e6:.0f} M parameters, {layers} layers, rank {applying.RANK}, "
              f"{len(ratios)} blocks, median of {args.runs} alternating runs, blocks / plain\n")
        header = ["node", "base", "read and map", "patch", "together", "ratio", "memory", "difference"]
        print(measure.table(header, rows))


if __name__ == "__main__":
    main()
