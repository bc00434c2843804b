"""Time and memory of one training step: the pack against the host's own Train LoRA node.

    COMFYUI_PATH=<ComfyUI> <its python> benchmarks/training_step.py [--small] [--batch 1 4] [--runs 7] [--precision auto] [--device cuda]

Both train rank 8 on every linear layer and convolution of SD1.5's U-Net (860 million random weights, fp32 file) with
32 x 32 latents. The peer is the node's own code, called as a graph calls it; its loop is stopped after every optimizer
step and takes turns with ours, step by step, in one process. A time is from the end of one optimizer step to the end of
the next; memory is what one step takes on top of both models, adapters and optimizer states (`measure.peak_memory`).
"""

import argparse
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path

import measure
import sd15
import torch
from measure import MIB, PACKAGE, Coroutine, module
from torch.optim.optimizer import register_optimizer_step_post_hook

RANK = 8
SIDE = 32  # of the latents: pictures of 256 x 256
IMAGES = 4
#: Inputs of the host's node beside its defaults. 0.3.64 has no bypass.
DEFAULTS = {"training_dtype": "bf16", "lora_dtype": "bf16", "gradient_checkpointing": True}
PLAIN = {"training_dtype": "fp32", "lora_dtype": "fp32", "gradient_checkpointing": False}
PEERS = [
    ("default (merged weights, bf16, checkpointing)", DEFAULTS),
    ("bypass (bf16, checkpointing)", {**DEFAULTS, "bypass_mode": True}),
    ("merged weights, fp32, no checkpointing", PLAIN),
    ("bypass, fp32, no checkpointing", {**PLAIN, "bypass_mode": True}),
]


def build_adapters(host, method: str) -> dict:
    """Rank 8 on every layer, less on the last convolution, whose four outputs allow no more.

    TriLoRA's core starts from ones: the start of its values changes no time, and their decomposition is not timed here.
    """
    registry, shapes = module(f"{PACKAGE}.trilora_ops.registry"), module(f"{PACKAGE}.trilora_ops.adapter")
    options = {"sigma_init": "ones"} if method == "trilora" else {}
    adapters, generator = {}, torch.Generator().manual_seed(0)
    for key, layer in host.layers().items():
        rank = min(RANK, shapes.LayerShape.of(layer).rank_max)
        residual = registry.RESIDUALS[method](rank=rank, **options)
        adapters[key] = registry.Method(residual).build(layer, host.weight(key), generator).to(host.device)
    return adapters


def ours(patcher, batch: int, steps: int, method: str, precision: str) -> None:
    """The pack's run on the samples of this benchmark, as its Train Adapter node makes it."""
    host_module, types = module(f"{PACKAGE}.nodes.comfy_host"), module(f"{PACKAGE}.nodes.types")
    loop, config = module(f"{PACKAGE}.training.loop"), module(f"{PACKAGE}.training.config")
    pictures, captions = sd15.latents(IMAGES, SIDE), sd15.conditioning(IMAGES + 1)
    with torch.inference_mode(False):
        host = host_module.ComfyHost(patcher, precision)
        with host.session():
            images = [types.EncodedImage(str(i), "", pictures[i:i + 1], captions[i]) for i in range(IMAGES)]
            samples = [host.prepare(image, image.conditioning) for image in images]
            empty = [host.prepare(image, captions[IMAGES]) for image in images]
            adapters = build_adapters(host, method)
            ours.layers, ours.dtype = len(adapters), str(host.compute_dtype).removeprefix("torch.")
            loop.train(host, adapters, samples, empty, config.TrainingConfig(steps=steps, batch_size=batch))


def peer(patcher, batch: int, steps: int, options: dict) -> None:
    """The host's Train LoRA node."""
    node = module("comfy_extras.nodes_train").TrainLoraNode
    captions = [entry for caption in sd15.conditioning(IMAGES) for entry in caption]
    values = {
        "model": patcher, "latents": {"samples": sd15.latents(IMAGES, SIDE)}, "positive": captions, "batch_size": batch,
        "steps": steps, "grad_accumulation_steps": 1, "learning_rate": 5e-4, "rank": RANK, "optimizer": "AdamW",
        "loss_function": "MSE", "seed": 0, "quantized_backward": False, "algorithm": "LoRA", "checkpoint_depth": 1,
        "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False, **options,
    }  # fmt: skip
    call = node.execute if hasattr(node, "execute") else node().train
    known = inspect.signature(call).parameters
    values = {name: value for name, value in values.items() if name in known}
    if hasattr(node, "execute"):  # 0.33.0 takes every input as a list
        values = {name: [value] for name, value in values.items()}
    call(**values)


def knows_bypass() -> bool:
    """Whether this host's node has a bypass mode."""
    node = module("comfy_extras.nodes_train").TrainLoraNode
    return "bypass_mode" in inspect.signature(getattr(node, "execute", getattr(node, "train", None))).parameters


def peers_model(model, load: Callable):
    """The model for the peer: 0.33.0's node makes a copy of its own, 0.3.64's changes the one it is given."""
    return model if "force_deepcopy" in inspect.signature(model.clone).parameters else load()


def pair(model, load: Callable, batch: int, runs: int, method: str, precision: str, options: dict):
    """({"ours", "peer"} -> times, s; -> peak memory, bytes) of `runs` steps in turns after a warm-up.

    (None, why) where the peer cannot make its first step.
    """
    steps = runs + 2  # the first is the warm-up, the second is for memory
    theirs = peers_model(model, load)
    sides = {
        # ours first: loading a model makes the host unload the others, which on its way in resets the layers
        "ours": Coroutine(lambda: ours(model, batch, steps, method, precision)),
        "peer": Coroutine(lambda: peer(theirs, batch, steps, options)),
    }
    sides["ours"].advance()
    try:
        sides["peer"].advance()
    except Exception as error:
        # not hypothetical: the host's checkpointing refuses attention whose chunks depend on the memory that is free
        sides["ours"].finish()
        return None, f"fails ({type(error).__name__})"
    peaks = {name: measure.peak_memory(side.advance) for name, side in sides.items()}
    times = measure.alternate({name: side.advance for name, side in sides.items()}, runs)
    for side in sides.values():
        side.finish()
    return times, peaks


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="timed steps of each side (default 7)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="batch sizes (default 1 4)")
    parser.add_argument("--small", action="store_true", help="a U-Net of 74 million parameters, for a quick look")
    parser.add_argument("--method", choices=["trilora", "lora"], default="trilora", help="what we train (default trilora)")
    parser.add_argument("--precision", choices=["auto", "model", "bf16"], default="auto", help="what our frozen model computes in (default auto)")
    parser.add_argument("--peers", type=int, nargs="+", default=[0, 1, 2, 3], help="which rows, by number")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="trilora-benchmark-") as folder:
        version = measure.start_host(Path(folder), args.device)
        path = Path(folder) / "models" / "diffusion_models" / "unet.safetensors"
        parameters = sd15.write_unet(path, args.small)
        register_optimizer_step_post_hook(lambda *_: (measure.synchronise(), Coroutine.pause()))
        model = sd15.load_unet(path)
        rows = []
        for batch in args.batch:
            for number in args.peers:
                label, options = PEERS[number]
                if (number > 1 and batch > 1) or (options.get("bypass_mode") and not knows_bypass()):
                    rows += [[str(batch), label, "n/a", "n/a", "", "", ""]] if number < 2 else []
                    continue
                times, peaks = pair(model, lambda: sd15.load_unet(path), batch, args.runs, args.method, args.precision, options)
                if times is None:
                    rows.append([str(batch), label, "", peaks, "", "", ""])
                    continue
                mine, theirs = times["ours"], times["peer"]
                rows.append([str(batch), label, measure.shown(measure.median(mine)), measure.shown(measure.median(theirs)),
                             f"**{measure.ratio(mine, theirs):.2f}**", f"{peaks['ours'] / MIB:.0f} MiB", f"{peaks['peer'] / MIB:.0f} MiB"])
                print("  ".join(rows[-1]), " ours", [round(t, 4) for t in mine], "peer", [round(t, 4) for t in theirs], flush=True)
        print(f"\n{measure.describe_machine(version, args.device)}; U-Net of {parameters / 1e6:.0f} M parameters, "
              f"{ours.layers} layers, rank {RANK}, {SIDE} x {SIDE} latents, ours: {args.method}, computed in {ours.dtype}; median of {args.runs} alternating steps\n")
        print(measure.table(["batch", "host's Train LoRA node", "ours", "host", "ours / host", "our memory", "host's memory"], rows))


if __name__ == "__main__":
    main()
