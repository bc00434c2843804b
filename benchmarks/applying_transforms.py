"""Time and memory of merging a TLoRA into weights, against our own LoRA and against forming W T as a matrix product.

    COMFYUI_PATH=<ComfyUI> <its python> benchmarks/applying_transforms.py [--small] [--runs 7] [--device cuda]

The 128 attention layers of SD1.5's U-Net, fp32 weights (0.6 GB; --small: every eighth layer). Each side merges its
patches into all of them by the host's own `comfy.lora.calculate_weight`, in place, as the host does when it loads a
model. "dense" forms T, multiplies W by it and adds the residual by one addmm_: what there is to be faster than.
"""

import argparse
import math
import tempfile
from pathlib import Path

import measure
import torch
from measure import MIB, PACKAGE, module

# (out, in) -> how many of them: q, k, v, out of self-attention, q, out of cross-attention; k, v from the text
SHAPES = {(320, 320): 30, (640, 640): 30, (1280, 1280): 36, (320, 768): 10, (640, 768): 10, (1280, 768): 12}
RANK = 4
METHODS = {"lora": ("none", "lora", {}), "TLoRA*(1,4)": ("tensor_ring", "lora", {"ring_rank": 1}),
           "TLoRA*(2,4)": ("tensor_ring", "lora", {"ring_rank": 2}), "TLoRA(2,6)": ("tensor_ring", "tensor_ring", {"ring_rank": 2})}


class Layer:
    """One weight and the adapters that are merged into it."""

    def __init__(self, shape: tuple[int, int], generator: torch.Generator, device: torch.device):
        registry = module(f"{PACKAGE}.trilora_ops.registry")
        patches, own = module(f"{PACKAGE}.nodes.comfy_patches"), module(f"{PACKAGE}.nodes.comfy_transforms")
        linear = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
        self.weight = torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).to(device)
        self.adapters, self.patches = {}, {}
        for name, (transform, residual, options) in METHODS.items():
            rank = 6 if residual == "tensor_ring" else RANK
            method = registry.Method(registry.RESIDUALS[residual](rank=rank), registry.TRANSFORMS[transform](**options))
            adapter = method.build(linear, self.weight, generator)
            for parameter in adapter.parameters():  # off its start, where parts of it are zero
                parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)
            adapter.requires_grad_(False)
            self.adapters[name] = adapter.to(device)
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
    print(f"\n{measure.describe_machine(version, args.device)}; {len(layers)} attention layers of SD1.5, fp32, median of "
          f"{args.runs} alternating runs\n")
    print(measure.table(["method", "time", "/ lora", "/ dense", "memory", "memory, dense"], rows))


if __name__ == "__main__":
    main()
