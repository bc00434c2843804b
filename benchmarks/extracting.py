"""Time, memory and error of extracting an adapter from the difference of two models.

    COMFYUI_PATH=<ComfyUI> <its python> benchmarks/extracting.py [--small] [--runs 3] [--device cuda]

The layers are the 128 linear layers of SD1.5's attention with random weights: W0 and the difference dW have falling
spectra (sigma_i near i^-0.5 and i^-0.8), |dW| is 5 % of |W0|, and on top lies a Kronecker transform that moves W0 by
another 2.5 %. TriLoRA of rank 16 by our truncated SVD takes turns with the same by torch's exact SVD; then TLoRA*(1, 4)
and TLoRA(1, 2) by fitting, one run each, beside the exact SVD of the rank their residual has. The error is
sqrt(sum |dW - R|^2 / sum |dW|^2) over all layers, dense. Memory is what one run takes on top of the weights.
"""

import argparse
import math
import tempfile
from pathlib import Path

import measure
import torch
from measure import MIB, PACKAGE, module

RANK = 16
CONTEXT = 768


def shapes(small: bool) -> list[tuple[int, int]]:
    """(out, in) of q, k, v and out of both attentions of every transformer block."""
    blocks = [(320, 1)] if small else [(320, 5), (640, 5), (1280, 6)]
    return [shape for hidden, count in blocks for _ in range(count) for shape in [(hidden, hidden)] * 6 + [(hidden, CONTEXT)] * 2]


def draw(out: int, inp: int, power: float, generator: torch.Generator) -> torch.Tensor:
    """A matrix of unit norm with singular values near i^-power."""
    count = min(out, inp)
    sigma = torch.arange(1.0, count + 1) ** -power
    matrix = torch.randn(out, count, generator=generator) * sigma @ torch.randn(count, inp, generator=generator)
    return matrix / matrix.norm()


def build(small: bool, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(W0, dW) of every layer."""
    adapter, ring = module(f"{PACKAGE}.trilora_ops.adapter"), module(f"{PACKAGE}.trilora_ops.transforms.tensor_ring")
    layers = []
    for seed, (out, inp) in enumerate(shapes(small)):
        generator = torch.Generator().manual_seed(seed)
        weight, delta = draw(out, inp, 0.5, generator) * math.sqrt(out), draw(out, inp, 0.8, generator)
        T = ring.TensorRingConfig(1).build(adapter.LayerShape(out, inp), weight, generator).requires_grad_(False)
        for core in T.parameters():
            core += 0.01 * torch.randn(core.shape, generator=generator)
        turned = T.delta(weight)
        delta = delta * (0.05 * weight.norm()) + turned * (0.025 * weight.norm() / turned.norm())
        layers.append((weight.to(device), delta.to(device)))
    return layers


def total_error(layers, found) -> float:
    """See the module; found: relative error of every layer."""
    sizes = [float(delta.norm()) for _, delta in layers]
    return math.sqrt(sum((e * s) ** 2 for e, s in zip(found, sizes, strict=True)) / sum(s**2 for s in sizes))


def ours(layers, method) -> list[float]:
    """Relative error of every layer, extracted by us."""
    extract = module(f"{PACKAGE}.trilora_ops.extract")
    return [extract.extract_adapter(weight, delta, method, torch.Generator().manual_seed(seed))[1] for seed, (weight, delta) in enumerate(layers)]


def peer(layers, rank: int) -> list[float]:
    """The same by torch's exact decomposition."""
    errors = []
    for _, delta in layers:
        U, sigma, Vt = torch.linalg.svd(delta, full_matrices=False)
        errors.append(float((delta - U[:, :rank] * sigma[:rank] @ Vt[:rank]).norm() / delta.norm()))
    return errors


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each side of the SVD (default 3)")
    parser.add_argument("--small", action="store_true", help="the eight layers of one block, for a quick look")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="trilora-benchmark-") as folder:
        version = measure.start_host(Path(folder), args.device)
        registry = module(f"{PACKAGE}.trilora_ops.registry")
        lora, trilora, ring = (registry.RESIDUALS[kind] for kind in ("lora", "trilora", "tensor_ring"))
        kronecker = registry.TRANSFORMS["tensor_ring"](1)
        layers = build(args.small, args.device)
        svd = registry.Method(trilora(RANK))
        # name -> (method, rank of its residual)
        fits = {"TLoRA*(1, 4)": (registry.Method(lora(4), kronecker), 4), "TLoRA(1, 2)": (registry.Method(ring(2), kronecker), 4)}
        for method in (svd, *(method for method, _ in fits.values())):
            ours(layers[:1], method)  # warm-up: the first optimizer imports a lot
        errors: dict[str, list[float]] = {}
        taken: list[float] = []
        sides = {"ours": lambda: errors.update(ours=ours(layers, svd)), "peer": lambda: errors.update(peer=peer(layers, RANK))}
        peaks = {name: measure.peak_memory(run) for name, run in sides.items()}
        times = measure.alternate(sides, args.runs)
        rows = [[f"TriLoRA, rank {RANK}", f"{measure.shown(measure.median(times['ours']))} / {measure.shown(measure.median(times['peer']))}",
                 f"**{measure.ratio(times['ours'], times['peer']):.3f}**", f"{peaks['ours'] / MIB:.0f} / {peaks['peer'] / MIB:.0f} MiB",
                 f"{total_error(layers, errors['ours']):.4f}", f"{total_error(layers, errors['peer']):.4f}"]]
        print("  ".join(rows[-1]), flush=True)
        for name, (method, rank) in fits.items():
            def fit(name=name, method=method) -> None:
                errors[name] = ours(layers, method)

            peak = measure.peak_memory(lambda fit=fit: taken.append(measure.seconds(fit)))
            rows.append([name, measure.shown(taken[-1]), "", f"{peak / MIB:.0f} MiB", f"{total_error(layers, errors[name]):.4f}",
                         f"{total_error(layers, peer(layers, rank)):.4f}"])
            print("  ".join(rows[-1]), flush=True)
        print(f"\n{measure.describe_machine(version, args.device)}; {len(layers)} layers, median of {args.runs} alternating runs, ours / exact SVD\n")
        print(measure.table(["method", "time", "ratio", "memory", "error", "error of the exact SVD of that rank"], rows))


if __name__ == "__main__":
    main()
