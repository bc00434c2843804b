"""Models for other libraries to adapt, adapters to put on them, and how a delta is measured."""

import torch
from comfyui_trilora.trilora_ops.checkpoint import AdapterState, FileLayer, split_layers
from comfyui_trilora.trilora_ops.factors import LowRank
from torch import Tensor, nn


class Block(nn.Module):
    """A corner of a U-Net: two linear layers, a convolution, and one layer that nobody adapts."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(6, 16), "to_out": nn.ModuleList([nn.Linear(12, 8)])})
        self.conv1 = nn.Conv2d(4, 12, (3, 2))
        self.head = nn.Linear(16, 2)


class Small(nn.Module):
    """Two blocks with names as deep as a U-Net's; `ADAPTED` are the layers that tests adapt, KERNELS their kernels."""

    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([Block(), Block()])
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = draw(*parameter.shape, seed=100 + seed)


LAYERS = ("attn.to_q", "attn.to_out.0", "conv1")
ADAPTED = tuple(f"down_blocks.{block}.{layer}" for block in (0, 1) for layer in LAYERS)
KERNELS = {name: (3, 2) if name.endswith("conv1") else () for name in ADAPTED}


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers from a seed of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(parameters, seed: int = 0, size: float = 0.5) -> None:
    """Puts normal numbers into trained parameters, each tensor others, as if they had been trained."""
    for number, parameter in enumerate(parameters):
        parameter.data = size * draw(*parameter.shape, seed=1000 * seed + number).to(parameter.dtype)


def copies(module: nn.Module) -> dict[str, Tensor]:
    """Module name -> copy of its weight, for linear layers and convolutions."""
    return {n: m.weight.detach().clone() for n, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}


def added(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Module name -> what has been added to its weight, (out, columns), where anything has."""
    changes = {name: (after[name] - before[name]).flatten(1) for name in before}
    return {name: change for name, change in changes.items() if change.any()}


def file_deltas(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer name in the file -> its delta, as this package reads it; there is nothing else in the file."""
    layers, rest = split_layers(state)
    assert layers and not rest, f"not low-rank: {sorted(rest)[:5]}"
    return {name: layer.pair.dense() for name, layer in layers.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    """The same layers, each delta within `tolerance` of its own norm."""
    assert expected and found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:5]
    for name, delta in expected.items():
        error = float((found[name].double() - delta.double()).norm() / delta.double().norm())
        assert error <= tolerance, f"{name}: {error:.2e}"


def random_adapter(shapes: dict[str, tuple[int, ...]], rank: int = 3, seed: int = 0) -> AdapterState:
    """A kohya-keyed adapter; its layers differ a thousandfold in size, and in alpha.

    shapes: layer name in the file -> shape of the weight; rank: lowered where the layer allows less.
    """
    tensors = {}
    for number, (name, (out, inp, *kernel)) in enumerate(shapes.items()):
        columns = inp * int(torch.tensor(kernel).prod()) if kernel else inp
        r = min(rank, out, columns)
        pair = LowRank(draw(out, r, seed=seed + 2 * number), draw(r, columns, seed=seed + 2 * number + 1), 10.0 ** -(number % 4))
        tensors |= FileLayer(pair, tuple(kernel)).tensors(name)
    return AdapterState(tensors)
