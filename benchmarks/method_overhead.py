"""What a method costs in training: forward and backward of one adapted layer over those of the frozen layer alone.

    python benchmarks/method_overhead.py [--runs 15] [--device cuda]

Layers of SD1.5 at 512 x 512 pixels, fp32, one image. The frozen layer's input asks for a gradient, as it does inside a
model; time is forward plus backward, memory what one such pass takes on top of the layer and the adapter.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import measure
import torch
from comfyui_trilora.training.cpu_products import CpuProducts
from comfyui_trilora.training.frozen import frozen_forward
from comfyui_trilora.trilora_ops.presets import build_method
from comfyui_trilora.trilora_ops.registry import Method
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig
from comfyui_trilora.trilora_ops.residuals.trilora import TriLoraConfig
from torch import nn

LAYERS = {
    "320, 4096 tokens": (lambda: nn.Linear(320, 320), (1, 4096, 320)),
    "640, 1024 tokens": (lambda: nn.Linear(640, 640), (1, 1024, 640)),
    "1280, 256 tokens": (lambda: nn.Linear(1280, 1280), (1, 256, 1280)),
    "3x3 conv 640, 32 x 32": (lambda: nn.Conv2d(640, 640, 3, padding=1), (1, 640, 32, 32)),
}
METHODS = {
    "LoRA r=4": Method(LoraConfig(4)), "TriLoRA r=4": Method(TriLoraConfig(4)), "TriLoRA r=16": Method(TriLoraConfig(16)),
    "TLoRA*(1,4)": build_method("TLoRA*", 1, 4), "TLoRA*(2,4)": build_method("TLoRA*", 2, 4),
    "TLoRA(1,2)": build_method("TLoRA", 1, 2), "TLoRA(2,6)": build_method("TLoRA", 2, 6),
    "DoRA-like r=4": build_method("DoRA-like", 0, 4), "OFT-like b=32": build_method("OFT-like", 32),
}


class Pass:
    """Forward and backward of one layer, with an adapter or without."""

    def __init__(self, layer: nn.Module, x: torch.Tensor, adapter: nn.Module | None):
        self.x, self.adapter = x, adapter
        self.frozen = frozen_forward(layer, layer.forward, lambda module, like: nullcontext(module.weight), CpuProducts())
        self.wanted = [x, *(adapter.parameters() if adapter is not None else ())]

    def __call__(self) -> None:
        y = self.frozen(self.x) if self.adapter is None else self.adapter(self.x, self.frozen)
        torch.autograd.grad(y, self.wanted, torch.ones_like(y))


def main() -> None:
    """Prints one table: a row a method, two columns a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each side (default 15)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    device, generator = torch.device(args.device), torch.Generator().manual_seed(0)
    rows = {name: [name] for name in ("frozen alone", *METHODS)}
    for make, shape in LAYERS.values():
        layer = make().requires_grad_(False).to(device)
        x = torch.randn(shape, generator=generator).to(device).requires_grad_()
        sides = {"frozen alone": Pass(layer, x, None)}
        sides |= {name: Pass(layer, x, method.build(layer, layer.weight, generator).to(device)) for name, method in METHODS.items()}
        for run in sides.values():
            run()  # the warm-up
        peaks = {name: measure.peak_memory(run) for name, run in sides.items()}
        times = measure.alternate(sides, args.runs)
        for name, row in rows.items():
            alone = times["frozen alone"]
            row.append(f"{1000 * measure.median(alone):.1f} ms" if name == "frozen alone" else f"**{measure.ratio(times[name], alone):.2f}**")
            row.append(f"{peaks[name] / measure.MIB:.0f} MiB")
    print(f"\n{measure.describe_machine('not used', args.device)}; median of {args.runs} alternating runs; time over the frozen layer's\n")
    print(measure.table(["method", *(cell for name in LAYERS for cell in (name, "memory"))], list(rows.values())))


if __name__ == "__main__":
    main()
