"""Time and memory of applying LoRA files: the TriLoRA Loader against the host's own LoRA loader.

    COMFYUI_PATH=<ComfyUI> <its python> benchmarks/applying.py [--small] [--files 1 5] [--runs 7] [--device cuda]

The files are LoRAs of rank 16 in fp16 with kohya's names on all attention layers and convolutions of SD1.5's U-Net (860
million random weights). Both sides are the nodes as a graph runs them, one node a file, new for every run so that
neither has the file in memory ("read and map": to a patched clone of the model), followed by the host's own loading of
that clone, which merges every patch into its weight ("patch"). They take turns in one process; between runs the host
puts the weights back (not timed). Memory is what one run takes on top of the loaded model (`measure.peak_memory`).
"""

import argparse
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path

import measure
import sd15
import torch
from measure import MIB, module

RANK = 16
STRENGTHS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.95, 0.85, 0.75, 0.65, 0.55]  # of the first file, the second, ...
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def ours(model, names: list[str]):
    """The model with every file on it, through the TriLoRA Loader."""
    loader = measure.node("load", "TriLoRALoader")
    for name, strength in zip(names, STRENGTHS, strict=False):
        model = loader.execute(model, name, strength, 0).args[0]
    return model


def peer(model, names: list[str]):
    """The same through the host's LoraLoaderModelOnly."""
    for name, strength in zip(names, STRENGTHS, strict=False):
        model = module("nodes").LoraLoaderModelOnly().load_lora_model_only(model, name, strength)[0]
    return model


class Side:
    """One loader: `read`, then `patch`, then `reset`, as often as wanted."""

    def __init__(self, load: Callable, model, names: list[str]):
        self.load, self.model, self.names, self.patched = load, model, names, None

    def read(self) -> None:
        """Files to a patched clone; no weight has changed yet."""
        self.patched = self.load(self.model, self.names)

    def patch(self) -> None:
        """The host loads the clone: every patched weight is computed."""
        module("comfy.model_management").load_models_gpu([self.patched], force_full_load=True)

    def both(self) -> None:
        """Read and patch."""
        self.read()
        self.patch()

    def reset(self) -> None:
        """Take the clone away and put the model's own weights back."""
        module("comfy.model_management").unload_all_models()
        self.patched = None
        gc.collect()


def probe(model) -> dict[str, torch.Tensor]:
    """Copies of three weights, to see that both sides end in the same place."""
    state = {key: value for key, value in model.model.diffusion_model.state_dict().items() if value.ndim > 1}
    keys = sorted(state)
    return {key: state[key].float().clone() for key in (keys[0], keys[len(keys) // 2], keys[-1])}


def compare(sides: dict[str, Side], model) -> float:
    """Largest relative difference between the weights that the two sides make; raises where a side changes nothing."""
    found, before = {}, probe(model)
    for name, side in sides.items():
        side.both()
        found[name] = probe(side.patched)
        side.reset()
    if all(torch.equal(found["ours"][key], before[key]) for key in before):
        raise SystemExit("the patches changed nothing: this benchmark would measure nothing")
    return max(float((found["ours"][k] - found["peer"][k]).norm() / (found["peer"][k] - before[k]).norm().clamp_min(1e-12))
               for k in before if not torch.equal(found["peer"][k], before[k]))


def turns(sides: dict[str, Side], runs: int) -> dict[str, tuple[list[float], list[float]]]:
    """Side -> (times of reading, times of patching), s, in turns."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            times[name][0].append(measure.seconds(side.read))
            times[name][1].append(measure.seconds(side.patch))
            side.reset()
    return times


def row(times: dict, peaks: dict, first: list[str]) -> list[str]:
    """One line of the table."""
    cells = list(first)
    total = {name: [a + b for a, b in zip(*pair, strict=True)] for name, pair in times.items()}
    for mine, theirs in zip((*times["ours"], total["ours"]), (*times["peer"], total["peer"]), strict=True):
        cells.append(f"{measure.shown(measure.median(mine))} / {measure.shown(measure.median(theirs))}")
    cells.append(f"**{measure.ratio(total['ours'], total['peer']):.2f}**")
    return [*cells, f"{peaks['ours'] / MIB:.0f} / {peaks['peer'] / MIB:.0f} MiB"]


def main(description: str, load: Callable, files: list[int]) -> None:
    """Prints one table: `load`, a function as `ours`, against `peer`. files: how many of them by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each side (default 7)")
    parser.add_argument("--files", type=int, nargs="+", default=files, help=f"numbers of files, at most {len(STRENGTHS)} (default {files})")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="of the base weights (default both)")
    parser.add_argument("--small", action="store_true", help="a U-Net of 74 million parameters, for a quick look")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="trilora-benchmark-") as folder, torch.inference_mode():
        version = measure.start_host(Path(folder), args.device)
        models = Path(folder) / "models"
        path = models / "diffusion_models" / "unet.safetensors"
        parameters = sd15.write_unet(path, args.small)
        names, rows, layers = [f"lora{i}.safetensors" for i in range(max(args.files))], [], 0
        for dtype in args.dtype:
            model = sd15.load_unet(path, DTYPES[dtype])
            for seed, name in enumerate(names):
                if not (models / "loras" / name).exists():
                    layers = sd15.write_lora(models / "loras" / name, model, RANK, seed)
            for count in args.files:
                sides = {"ours": Side(load, model, names[:count]), "peer": Side(peer, model, names[:count])}
                difference = compare(sides, model)  # the warm-up too
                peaks = {}
                for name, side in sides.items():
                    peaks[name] = measure.peak_memory(side.both)
                    side.reset()
                times = turns(sides, args.runs)
                rows.append([*row(times, peaks, [dtype, str(count)]), f"{difference:.0e}"])
                print("  ".join(rows[-1]), flush=True)
                for name, (read, patch) in times.items():
                    print("   ", name, "read", [round(t, 2) for t in read], "patch", [round(t, 2) for t in patch], flush=True)
            del model, sides
            gc.collect()
        print(f"\n{measure.describe_machine(version, args.device)}; U-Net of {parameters / 1e6:.0f} M parameters, {layers} layers, "
              f"rank {RANK}, median of {args.runs} alternating runs, ours / host's\n")
        header = ["base", "files", "read and map", "patch", "together", "ratio", "memory", "difference"]
        print(measure.table(header, rows))


if __name__ == "__main__":
    main(__doc__, ours, [1, 5])
