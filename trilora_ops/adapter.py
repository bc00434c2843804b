"""One adapted layer: its shape, and the pair of transform and residual that changes it (W' = W0*T + R)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import TriLoRAError

# entries of a weight that are transformed at once: on a CPU what its caches hold, elsewhere enough to fill a GPU
_BLOCK = {"cpu": 2**18, "cuda": 2**24}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class LayerShape:
    """Shape of a linear layer (kernel empty) or of an ungrouped convolution, with the convolution's geometry."""

    out: int
    inp: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> "LayerShape":
        """Read from a module with `in_features`/`out_features` or from a convolution.

        Raises TriLoRAError for grouped or non-zero-padded convolutions and for modules of other kinds.
        """
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            return cls(module.out_features, module.in_features)
        if hasattr(module, "kernel_size") and hasattr(module, "in_channels") and not getattr(module, "transposed", False):
            if module.groups != 1 or module.padding_mode != "zeros":
                raise TriLoRAError(
                    f"convolution has groups={module.groups}, padding_mode={module.padding_mode!r}; adapters need "
                    "groups=1 and zero padding; leave this layer out of the targets"
                )
            return cls(module.out_channels, module.in_channels, tuple(module.kernel_size), tuple(module.stride),
                       module.padding if isinstance(module.padding, str) else tuple(module.padding), tuple(module.dilation))
        raise TriLoRAError(f"{type(module).__name__} is neither a linear layer nor a convolution; leave it out of the targets")

    @property
    def columns(self) -> int:
        """in * product(kernel): the second axis of the flattened weight."""
        return self.inp * math.prod(self.kernel)

    @property
    def rank_max(self) -> int:
        """The largest rank a matrix of this shape can have."""
        return min(self.out, self.columns)

    @property
    def weight(self) -> tuple[int, ...]:
        """The module's own weight shape: (out, in, *kernel)."""
        return (self.out, self.inp, *self.kernel)

    def add_low_rank(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """y + up * (down * x), with x seen as the layer itself sees it.

        x: (..., in) or (B, in, *space); y: (..., out) or (B, out, *space'); down: (r, columns), up: (out, r).
        On a convolution `down` is a convolution to r channels with the layer's geometry, and `up` mixes channels.
        """
        if not self.kernel:
            hidden = F.linear(x, down)
            # addmm fuses the product with the sum: no second tensor of y's size
            # and a row-major factor makes autograd write up's gradient row by row, several times faster than by columns
            return torch.addmm(y.reshape(-1, self.out), hidden.reshape(-1, down.shape[0]), up.t().contiguous()).view(y.shape)
        if math.prod(self.kernel) == 1 and set(self.stride) == {1} and set(self.padding) == {0}:
            hidden = down @ x.flatten(2)  # the layer is a linear one over the channels
        else:
            hidden = _CONV[len(self.kernel)](x, down.view(-1, self.inp, *self.kernel), None, self.stride, self.padding, self.dilation).flatten(2)
        # fused as above, and several times faster backwards than a convolution of so few channels
        return torch.baddbmm(y.flatten(2), up.expand(len(x), -1, -1), hidden).view(y.shape)


class Adapter(nn.Module):
    """The pair on one layer: y = f(T x) + R x where f is the frozen layer (bias included in f).

    `transform` and `residual` are what their configurations build; both hold fp32 parameters.
    """

    def __init__(self, shape: LayerShape, transform: nn.Module, residual: nn.Module):
        super().__init__()
        self.shape, self.transform, self.residual = shape, transform, residual

    def delta(self, weight: Tensor) -> Tensor:
        """W' - W0 = W0 (T - I) + R; weight: (out, in, *kernel) -> (out, columns), fp32."""
        flat = weight.reshape(self.shape.out, -1).float()
        return self.transform.delta(flat) + self.residual.delta()

    @torch.no_grad()
    def add_delta_(self, target: Tensor, weight: Tensor, strength: float = 1.0) -> Tensor:
        """target += strength * (W0 (T - I) + R), in place; weight: W0, which may be `target` itself.

        Both (out, in, *kernel), any strides and floating dtype; the products run in fp32. T mixes inputs, so every row of W'
        depends on that row of W0 alone: a few rows at a time go through, and no full-size delta is formed.
        """
        pair = self.residual.low_rank()
        rows = max(1, _BLOCK.get(weight.device.type, _BLOCK["cuda"]) // self.shape.columns)
        for start in range(0, self.shape.out, rows):
            block = slice(start, start + rows)
            delta = self.transform.delta(weight[block].reshape(-1, self.shape.columns).float())
            if pair is not None:
                delta = torch.addmm(delta, pair.up[block], pair.down, alpha=pair.scale)
            target[block].add_(delta.view(target[block].shape), alpha=strength)
        return target

    def forward(self, x: Tensor, layer) -> Tensor:
        """y = layer(T x) + R x; `layer` maps activations as the frozen module does."""
        return self.residual.add_output(layer(self.transform.act(x)), x)

    def penalty(self) -> Tensor:
        """Sum of the parts' regularisers, fp32 scalar (0 where none is asked for)."""
        return self.transform.penalty() + self.residual.penalty()

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(parameters that weight decay may pull to zero, parameters it must leave alone)."""
        decay, keep = [], []
        for part in (self.transform, self.residual):
            for name, parameter in part.named_parameters():
                (keep if name in part.NO_DECAY else decay).append(parameter)
        return decay, keep
