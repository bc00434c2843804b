"""The small world as the training engine's Host, and applying a saved adapter file to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ...training.host import Sample
from ...trilora_ops.checkpoint import AdapterState, split_layers
from ...trilora_ops.errors import TriLoRAError
from ...trilora_ops.merge import add_low_rank_
from ...trilora_ops.metadata import fingerprint
from ...trilora_ops.naming import UNetLayout, public_name
from . import autoencoder
from .diffusion import TIMESTEPS, add_noise, timestep_to_sigma
from .world import World, to_tensor

FAMILY = "sd1"


class WorldHost:
    """`World` behind the protocol of `training.host`; on the CPU, in fp32, v-prediction."""

    device = torch.device("cpu")
    compute_dtype = torch.float32
    prediction = "v"
    sigma_data = 1.0

    def __init__(self, world: World):
        self.world = world
        self._layers = {f"diffusion_model.{name}.weight": module for name, module in world.unet.named_modules()
                        if isinstance(module, (nn.Linear, nn.Conv2d))}

    def layers(self) -> Mapping[str, nn.Module]:
        """Target key -> layer of the U-Net."""
        return self._layers

    def weight(self, key: str) -> Tensor:
        """W0 itself."""
        return self._layers[key].weight

    @contextmanager
    def frozen_weight(self, module: nn.Module, like: Tensor) -> Iterator[Tensor]:
        """The layer's weight; nothing is cast or moved here."""
        yield module.weight

    def blocks(self) -> Sequence[nn.Module]:
        """Every numbered block of the U-Net's two sides."""
        return [part for block in (*self.world.unet.input_blocks, *self.world.unet.output_blocks) for part in block]

    def sigma(self, u: Tensor) -> Tensor:
        """(B,) sigma at u * 999 of SD's schedule."""
        return timestep_to_sigma(u * (TIMESTEPS - 1))

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x0 + sigma * noise."""
        return add_noise(x0, noise, sigma)

    def prepare(self, name: str, picture: np.ndarray, prompt: str) -> Sample:
        """A sample from a (H, W, 3) uint8 picture and its caption."""
        with torch.no_grad():
            x0, context = autoencoder.encode(to_tensor([picture])), self.world.encode_text([prompt])
        return Sample(name, x0, context, tuple(x0.shape))

    def collate(self, samples: Sequence[Sample]) -> Tensor:
        """Contexts (B, 16, 64)."""
        return torch.cat([sample.conditions for sample in samples])

    def denoise(self, x: Tensor, sigma: Tensor, conditions: Tensor) -> Tensor:
        """The U-Net's x0."""
        return self.world.denoise(x, sigma, conditions)

    @contextmanager
    def session(self) -> Iterator[None]:
        """The base asks for no gradients."""
        asking = [p for p in self.world.parameters() if p.requires_grad]
        for parameter in asking:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)

    def check_interrupt(self) -> None:
        """Nothing to ask: Ctrl+C raises KeyboardInterrupt by itself."""

    def fingerprint(self) -> str:
        """Identity of the world's weights."""
        return fingerprint({key: module.weight for key, module in self._layers.items()})

    @torch.no_grad()
    def merge(self, state: AdapterState, strength: float = 1.0) -> None:
        """W += strength * R on every layer that the file names. Raises TriLoRAError for names or shapes of another model."""
        layout = UNetLayout.of(self._layers)
        modules = {public_name(key, FAMILY, layout): module for key, module in self._layers.items()}
        layers, rest = split_layers(state)
        foreign = [*rest, *(name for name in layers if name not in modules)]
        if foreign:
            raise TriLoRAError(f"adapter: {foreign[0]} is not a layer of the small world; use an adapter that was trained on it")
        for name, layer in layers.items():
            shape = (modules[name].weight.shape[0], modules[name].weight[0].numel())
            if (layer.pair.up.shape[0], layer.pair.down.shape[1]) != shape:
                raise TriLoRAError(f"adapter: {name} is {layer.pair.up.shape[0]}x{layer.pair.down.shape[1]}, expected {shape}; it is another model's")
        for name, layer in layers.items():
            add_low_rank_(modules[name].weight, [(layer.pair, strength)])
