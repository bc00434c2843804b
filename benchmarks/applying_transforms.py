"""Time and memory of merging a TLoRA into weights, against our own LoRA and against forming W T as a matrix product.

    COMFYUI_PATH=<ComfyUI> <its python> benchmarks/applying_transforms.py [--small] [--runs 7] [--device cuda]

On the 128 attention layers of SD1.5's U-Net, fp32 weights. Two tables: a file of each method through TriLoRA Loader up
to patched weights, as a person waits for it; and the mathematics alone, patches merged into weights by the host's
`comfy.lora.calculate_weight`, in place (--small: a small U-Net, and an eighth of the layers). "dense" forms T,
multiplies W by it and adds the residual by one addmm_: what there is to be faster than.
"""

import argparse
import math
import tempfile
from pathlib import Path

import applying
import measure
import sd15
import torch
from measure import MIB, PACKAGE, module
from safetensors.torch import save_file

# (out, in) -> how many of them: q, k, v, out of self-attention, q, out of cross-attention; k, v from the text
SHAPES = {(320, 320): 30, (640, 640): 30, (1280, 1280): 36, (320, 768): 10, (640, 768): 10, (1280, 768): 12}
RANK = 4
METHODS = {"lora": ("none", "lora", {}), "TLoRA*(1,4)": ("tensor_ring", "lora", {"ring_rank": 1}),
           "TLoRA*(2,4)": ("tensor_ring", "lora", {"ring_rank": 2}), "TLoRA(2,6)": ("tensor_ring", "tensor_ring", {"ring_rank": 2})}


def build(name: str, layer: torch.nn.Module, weight: torch.Tensor, generator: torch.Generator):
    """An adapter of the method on a layer, moved off its start, where parts of it are zero."""
    registry = module(f"{PACKAGE}.trilora_ops.registry")
    transform, residual, options = METHODS[name]
    rank = 6 if residual == "tensor_ring" else RANK
    adapter = registry.Method(registry.RESIDUALS[residual](rank=rank), registry.TRANSFORMS[transform](**options)).build(layer, weight, generator)
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)
    return adapter.requires_grad_(False)


def write_file(path: Path, name: str, model) -> None:
    """An fp16 file of the method on all attention layers of a model."""
    export, targets = module(f"{PACKAGE}.training.export"), module(f"{PACKAGE}.trilora_ops.targets")
    layers = {f"diffusion_model.{path}.weight": layer for path, layer in model.model.diffusion_model.named_modules()
              if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))}
    chosen = targets.select({key: layer.weight.ndim - 2 for key, layer in layers.items()}, "attention")
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        adapters = {key: build(name, layers[key], layers[key].weight.clone(), generator) for key in chosen}
        tensors, _ = export.export_tensors(adapters, "sd1", layers)
    save_file({key: tensor.half().contiguous() for key, tensor in tensors.items()}, path)


def time_loader(folder: Path, small: bool, runs: int) -> list[list[str]]:
    """Rows of the first table."""
    path = folder / "models" / "diffusion_models" / "unet.safetensors"
    sd15.write_unet(path, small)
    model = sd15.load_unet(path)
    module(f"{PACKAGE}.nodes").TriLoRAExtension()  # as the host's start does: it registers our kind of file
    for name in METHODS:
        write_file(folder / "models" / "loras" / f"{name}.safetensors".replace("*", "_"), name, model)
    sides = {name: applying.Side(applying.ours, model, [f"{name}.safetensors".replace("*", "_")]) for name in METHODS}
    for side in sides.values():  # the warm-up
        side.both()
        side.reset()
    peaks = {}
    for name, side in sides.items():
        peaks[name] = measure.peak_memory(side.both)
        side.reset()
    times = applying.turns(sides, runs)
    total = {name: [a + b for a, b in zip(*times[name], strict=True)] for name in sides}
    return [[name, measure.shown(measure.median(times[name][0])), measure.shown(measure.median(times[name][1])),
             f"**{measure.ratio(total[name], total['lora']):.2f}**", f"{peaks[name] / MIB:.0f} MiB"] for name in METHODS]


class Layer:
    """One weight and the adapters that are merged into it."""

    def __init__(self, shape: tuple[int, int], generator: torch.Generator, device: torch.device):
        patches, own = module(f"{PACKAGE}.nodes.comfy_patches"), module(f"{PACKAGE}.nodes.comfy_transforms")
        linear = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
        self.weight = torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).to(device)
        self.adapters, self.patches = {}, {}
        for name in METHODS:
            adapter = self.adapters[name] = build(name, linear, self.weight, generator).to(device)
            tensors = [tuple((key, tensor.cpu()) for key, tensor in part.tensors().items()) for part in (adapter.transform, adapter.residual)]
            pair = adapter.residual.low_rank().cpu()
            self.patches[name] = (own.TransformPatch(set(), tuple(tensors)) if tensors[0] else
                                  patches.LowRankPatch(set(), (pair.up, pair.down, pair.alpha, None, None, None)))

    def merge(self, name: str) -> None:
        """W += what the patch gives, through the host."""
        module("comfy.lora").calculate_weight([(1.0, self.patches[name], 1.0, None, None)], self.weight, "layer")

    def merge_densely(self, name: str) -> None:
        """W <- W T + R with T as a matrix."""
        adapter, eye = self.adapters[name], torch.eye(self.weight.shape[1], device=self.weight.device)
        up, down = adapter.residual.factors()
        self.weight.copy_(self.weight @ adapter.transform.rows(eye, transposed=True)).addmm_(up, down)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each side (default 7)")
    parser.add_argument("--small", action="store_true", help="an eighth of the layers, for a quick look")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trilora-benchmark-") as folder:
        version = measure.start_host(Path(folder), args.device)
        loader = time_loader(Path(folder), args.small, args.runs)
    print(f"\n{measure.describe_machine(version, args.device)}; attention layers of SD1.5's U-Net{', small' if args.small else ''}, fp32, "
          f"median of {args.runs} alternating runs\n")
    print(measure.table(["file", "read", "patch", "together, / lora", "memory"], loader))
    generator, device = torch.Generator().manual_seed(0), torch.device(args.device)
    layers = [Layer(shape, generator, device) for shape, count in SHAPES.items() for _ in range(math.ceil(count / 8) if args.small else count)]
    sides = {name: lambda name=name: [layer.merge(name) for layer in layers] for name in METHODS}
    sides |= {f"{name}, dense": lambda name=name: [layer.merge_densely(name) for layer in layers] for name in METHODS if name != "lora"}
    with torch.inference_mode():
        start = [layer.weight.clone() for layer in layers]
        for run in sides.values():
            run()  # the warm-up
        for layer, weight in zip(layers, start, strict=True):
            layer.weight.copy_(weight)  # many merges on top of each other would grow without end
        peaks = {name: measure.peak_memory(run) for name, run in sides.items()}
        times = measure.alternate(sides, args.runs)
    rows = []
    for name in METHODS:
        mine, dense = times[name], times.get(f"{name}, dense")
        rows.append([name, f"{1000 * measure.median(mine):.0f} ms", f"**{measure.ratio(mine, times['lora']):.2f}**",
                     f"{measure.ratio(mine, dense):.2f}" if dense else "", f"{peaks[name] / MIB:.0f} MiB",
                     f"{peaks[f'{name}, dense'] / MIB:.0f} MiB" if dense else ""])
    print(f"\n{len(layers)} layers, merging alone\n")
    print(measure.table(["method", "time", "/ lora", "/ dense", "memory", "memory, dense"], rows))


if __name__ == "__main__":
    main()
