"""What a block plan saves: parameters, file, time and memory of one training step, by Block-wise LoRA's levels.

    COMFYUI_PATH=<ComfyUI> <its python> benchmarks/block_plan.py [--small] [--batch 1] [--runs 7] [--device cuda]

Trains SD1.5's U-Net (860 million random weights, fp32) by the plans full, upper, middle and bottom (arXiv:2403.07500) and
by the last block alone. All runs share one model and take turns, step by step, in one process. A time is from the end of
one optimizer step to the end of the next; memory is what one step takes on top of model, adapters and optimizer states
(`measure.peak_memory`); the file is fp16. A ratio of times is the median of ratios of neighbouring steps.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import measure
import sd15
import torch
from measure import MIB, PACKAGE, Coroutine, module
from torch.optim.optimizer import register_optimizer_step_post_hook

IMAGES = 4
PEAKS = 3  # steps whose memory is measured
FULL_SIZE = {"full": "", "upper": "IN01-IN03, OUT09-OUT11", "middle": "IN04-IN06, OUT06-OUT08", "bottom": "IN07-IN09, OUT03-OUT05", "last": "OUT11"}
#: The same levels where each has one block a side.
SMALL_SIZE = {"full": "", "upper": "IN01-IN02, OUT06-OUT07", "middle": "IN03-IN04, OUT04-OUT05", "bottom": "IN05-IN06, OUT02-OUT03", "last": "OUT07"}


def plan_text(blocks: str) -> str:
    """The rank text that trains these blocks, with the method's own rank."""
    return ", ".join(["default=0", *(f"{block}=1" for block in blocks.split(", "))]) if blocks else ""


def samples_of(host, side: int) -> tuple[list, list]:
    """(samples, the same with the empty prompt)."""
    types = module(f"{PACKAGE}.nodes.types")
    pictures, captions = sd15.latents(IMAGES, side), sd15.conditioning(IMAGES + 1)
    images = [types.EncodedImage(str(i), "", pictures[i:i + 1], captions[i]) for i in range(IMAGES)]
    return [host.prepare(image, image.conditioning) for image in images], [host.prepare(image, captions[IMAGES]) for image in images]


def adapters_by_plan(host, plans: Mapping[str, str], method: str, rank: int, target: str) -> dict[str, dict]:
    """Plan -> its adapters. TriLoRA's core starts from ones: where it starts changes no time."""
    registry, planning, build = (module(f"{PACKAGE}.{name}") for name in ("trilora_ops.registry", "trilora_ops.block_plan", "training.plan"))
    blocks = module(f"{PACKAGE}.nodes.block_plan").blocks_of(host.model)
    pair = registry.Method(registry.RESIDUALS[method](rank=rank, **({"sigma_init": "ones"} if method == "trilora" else {})))
    found = {}
    for name, chosen in plans.items():
        plan = planning.BlockPlan(plan_text(chosen)).read(blocks, pair)
        build.check_plan(host, target, plan)
        found[name] = build.build_adapters(host, pair, target, 0, plan)
    return found


def file_size(host, adapters: Mapping, folder: Path) -> int:
    """Bytes of the fp16 file."""
    export, checkpoint = module(f"{PACKAGE}.training.export"), module(f"{PACKAGE}.trilora_ops.checkpoint")
    tensors, _ = export.export_tensors(adapters, host.family(), host.layers())
    path = checkpoint.write_adapter(folder / f"{len(list(folder.iterdir()))}.safetensors", checkpoint.AdapterState(tensors), torch.float16)
    return path.stat().st_size


def steps(host, adapters: Mapping, samples: tuple[list, list], config) -> Coroutine:
    """A run that stops after every optimizer step."""
    def train() -> None:
        with torch.inference_mode(False), torch.enable_grad():  # of this thread; the session is the main one's
            module(f"{PACKAGE}.training.loop").train(host, adapters, *samples, config)

    return Coroutine(train)


def ratio(found: float, full: float) -> str:
    """A number of a plan as a share of the full one's."""
    return f"{found / full:.2f}"


def rows_of(host, by_plan: Mapping[str, dict], samples, config, runs: int, folder: Path) -> list[list[str]]:
    """The table's rows at one batch size."""
    sides = {name: steps(host, adapters, samples, config) for name, adapters in by_plan.items()}
    for side in sides.values():
        side.advance()
    peaks = {name: measure.median([measure.peak_memory(side.advance) for _ in range(PEAKS)]) for name, side in sides.items()}
    times = measure.alternate({name: side.advance for name, side in sides.items()}, runs)
    for side in sides.values():
        side.finish()
    count = module(f"{PACKAGE}.training.plan").parameter_count
    parameters = {name: count(adapters) for name, adapters in by_plan.items()}
    sizes = {name: file_size(host, adapters, folder) for name, adapters in by_plan.items()}
    return [[str(config.batch_size), name, str(len(by_plan[name])), f"{parameters[name] / 1e6:.2f} M", ratio(parameters[name], parameters["full"]),
             f"{sizes[name] / MIB:.2f} MiB", ratio(sizes[name], sizes["full"]), measure.shown(measure.median(times[name])),
             f"**{measure.ratio(times[name], times['full']):.2f}**", f"{peaks[name] / MIB:.0f} MiB", f"**{ratio(peaks[name], peaks['full'])}**"]
            for name in by_plan]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="timed steps of each plan (default 7)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes (default 1)")
    parser.add_argument("--side", type=int, default=32, help="of the latents (default 32: pictures of 256 x 256)")
    parser.add_argument("--rank", type=int, default=8, help="of every trained layer (default 8)")
    parser.add_argument("--method", choices=["trilora", "lora"], default="trilora", help="what is trained (default trilora)")
    parser.add_argument("--target", default="attention", help="which layers (default attention)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--small", action="store_true", help="a U-Net of 74 million parameters, for a quick look")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="trilora-benchmark-") as folder:
        version = measure.start_host(Path(folder), args.device)
        path = Path(folder) / "models" / "diffusion_models" / "unet.safetensors"
        weights = sd15.write_unet(path, args.small)
        register_optimizer_step_post_hook(lambda *_: (measure.synchronise(), Coroutine.pause()))
        files = Path(folder) / "output"
        host_class, config = module(f"{PACKAGE}.nodes.comfy_host").ComfyHost, module(f"{PACKAGE}.training.config").TrainingConfig
        rows = []
        with torch.inference_mode(False):
            host = host_class(sd15.load_unet(path), config().precision)
            with host.session():
                samples = samples_of(host, args.side)
                for batch in args.batch:
                    by_plan = adapters_by_plan(host, SMALL_SIZE if args.small else FULL_SIZE, args.method, args.rank, args.target)
                    settings = config(steps=args.runs + 1 + PEAKS, batch_size=batch, checkpointing=args.checkpointing)
                    rows += rows_of(host, by_plan, samples, settings, args.runs, files)
        print(f"{measure.describe_machine(version, args.device)}; U-Net of {weights / 1e6:.0f} M parameters, {args.method} of rank {args.rank}, "
              f"target {args.target}, computed in {str(host.compute_dtype).removeprefix('torch.')}, {args.side} x {args.side} latents{', checkpointing' if args.checkpointing else ''}, "
              f"median of {args.runs} alternating steps; ratios to the full plan\n")
        print(measure.table(["batch", "plan", "layers", "parameters", "ratio", "file", "ratio", "step", "ratio", "memory", "ratio"], rows))


if __name__ == "__main__":
    main()
