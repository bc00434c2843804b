"""A diffusion model of a few hundred weights that keeps the training engine's Host protocol, and losses by the book."""

import math
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from comfyui_trilora.training.host import Sample
from comfyui_trilora.training.plan import build_adapters
from comfyui_trilora.trilora_ops.registry import Method
from torch import Tensor, nn

WIDTH, CHANNELS, TEXT = 6, 3, 4


class Block(nn.Module):
    """x + f(x, context) on tokens (B, N, WIDTH); returns (x, context), the last block of a model (x, None).

    in_place: the sum is written into x itself. norm: f starts with a layer norm, which keeps x for the backward pass.
    """

    def __init__(self, in_place: bool, norm: bool, last: bool):
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(WIDTH, WIDTH + 3), "out": nn.Linear(WIDTH + 3, WIDTH)})
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH) if norm else None
        self.in_place, self.last = in_place, last

    def forward(self, x: Tensor, context: Tensor):
        h = self.attn["q"](x if self.norm is None else self.norm(x))
        h = self.attn["out"](torch.tanh(h)) + self.mlp(context)
        if self.in_place:
            x += h
        else:
            x = x + h
        return x, None if self.last else context


class Denoiser(nn.Module):
    """conv -> blocks -> conv on latents (B, CHANNELS, H, W), told of the noise level and a text (B, M, TEXT)."""

    def __init__(self, in_place: bool, norm: bool):
        super().__init__()
        self.conv_in = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.time, self.text = nn.Linear(2, WIDTH), nn.Linear(TEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(in_place, norm, last=i == 2) for i in range(3))
        self.conv_out = nn.Conv2d(WIDTH, CHANNELS, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        h, place = self.conv_in(x), sigma.log()
        tokens = h.flatten(2).transpose(1, 2) + self.time(torch.stack([place.sin(), place.cos()], dim=1))[:, None]
        context = self.text(text).mean(1, keepdim=True)
        for block in self.blocks:
            tokens, context = block(tokens, context)
        return self.conv_out(tokens.transpose(1, 2).view_as(h))


class ToyHost:
    """Host of a Denoiser with frozen, seeded weights; records what the engine asks of it."""

    def __init__(self, prediction="eps", in_place=False, norm=True, dtype=torch.float32, inference=False, seed=0):
        draw = torch.Generator().manual_seed(seed)
        with torch.inference_mode(inference):
            self.model = Denoiser(in_place, norm).requires_grad_(False).to(dtype)
            for parameter in self.model.parameters():
                scale = 0.2 if parameter.ndim == 1 else 1 / math.sqrt(parameter[0].numel())
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)
        self.device, self.compute_dtype = torch.device("cpu"), torch.float32
        self.prediction, self.sigma_data, self.dtype = prediction, 1.0, dtype
        self.fetched: list[nn.Module] = []  # layers whose weight the backward pass asked for
        self.collated: list[list[str]] = []  # names of the samples of every pass
        self.before_pass = lambda number: None  # called with the number of every pass, 1 for the first

    def layers(self):
        return {f"diffusion_model.{name}.weight": m for name, m in self.model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}

    def weight(self, key):
        return self.layers()[key].weight

    @contextmanager
    def frozen_weight(self, module, like):
        if torch._C._current_graph_task_id() >= 0:  # the forward pass may ask too
            self.fetched.append(module)
        yield module.weight.to(like)

    def blocks(self):
        return list(self.model.blocks)

    def sigma(self, u):
        return u if self.prediction == "flow" else torch.exp(math.log(0.05) + u * math.log(400.0))

    def add_noise(self, x0, noise, sigma):
        s = sigma.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * noise if self.prediction == "flow" else x0 + s * noise

    def collate(self, samples):
        self.collated.append([sample.name for sample in samples])
        return torch.cat([sample.conditions for sample in samples])

    def raw(self, x, sigma, conditions):
        """What the model itself predicts."""
        s = sigma.view(-1, 1, 1, 1)
        scaled = x if self.prediction == "flow" else x / (1 + s * s).sqrt()
        return self.model(scaled.to(self.dtype), sigma.to(self.dtype), conditions.to(self.dtype))

    def denoise(self, x, sigma, conditions):
        self.before_pass(len(self.collated))
        return self.estimate(x, sigma, self.raw(x, sigma, conditions))

    def estimate(self, x, sigma, raw):
        """x0 from the model's prediction."""
        s = sigma.view(-1, 1, 1, 1)
        return x / (1 + s * s) - raw * s / (1 + s * s).sqrt() if self.prediction == "v" else x - s * raw

    def session(self):
        return nullcontext()

    def check_interrupt(self):
        pass


def book_loss(prediction: str, raw: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor, gamma: float = 0.0) -> Tensor:
    """(B,) mean squared error of what the model predicts, with the cap of the signal-to-noise weight where gamma is given.

    eps: the noise. v = alpha * noise - s * x0 of the variance-preserving form (alpha = 1/sqrt(1+sigma^2), s = sigma * alpha).
    flow: noise - x0. Capped: min(SNR, gamma) / SNR for eps (min-SNR as published), min(SNR + 1, gamma) / (SNR + 1) for v.
    """
    s = sigma.view(-1, 1, 1, 1)
    target = {"eps": noise, "v": (noise - s * x0) / (1 + s * s).sqrt(), "flow": noise - x0}[prediction]
    snr = sigma**-2.0
    weight = torch.ones_like(sigma)
    if gamma and prediction != "flow":
        plain = snr if prediction == "eps" else snr + 1
        weight = plain.clamp_max(gamma) / plain
    return weight * F.mse_loss(raw, target, reduction="none").flatten(1).mean(1)


def book_gradients(host: ToyHost, adapters, samples, noise, u, gamma=0.0):
    """(mean loss, gradients of all adapter parameters), one sample at a time, through the merged weights."""
    delta = {key: a.delta(host.weight(key)).view_as(host.weight(key)) for key, a in adapters.items()}
    weights = {key.removeprefix("diffusion_model."): host.weight(key) + d for key, d in delta.items()}
    total = torch.zeros(())
    for sample, n, place in zip(samples, noise, u, strict=True):
        sigma = host.sigma(place[None])
        x = host.add_noise(sample.x0, n, sigma)
        scaled = x if host.prediction == "flow" else x / (1 + sigma.item() ** 2) ** 0.5
        raw = torch.func.functional_call(host.model, weights, (scaled, sigma, sample.conditions))
        total = total + book_loss(host.prediction, raw, sample.x0, n, sigma, gamma).sum() / len(samples)
    return total.detach(), torch.autograd.grad(total, [p for a in adapters.values() for p in a.parameters()])


def make_samples(count: int, sizes=((4, 5),), lengths=(2,), seed=1) -> list[Sample]:
    """Samples that take the latent sizes and text lengths in turn."""
    draw, samples = torch.Generator().manual_seed(seed), []
    for i in range(count):
        size, length = sizes[i % len(sizes)], lengths[i % len(lengths)]
        x0, text = torch.randn(1, CHANNELS, *size, generator=draw), torch.randn(1, length, TEXT, generator=draw)
        samples.append(Sample(f"sample{i}", x0, text, (size, length)))
    return samples


def without_caption(samples: list[Sample], length: int | None = None) -> list[Sample]:
    """The samples with an empty text of their own length or of another one."""
    empty = []
    for sample in samples:
        text = torch.zeros(1, length or sample.conditions.shape[1], TEXT)
        empty.append(Sample(f"{sample.name}-empty", sample.x0, text, (sample.signature[0], text.shape[1])))
    return empty


def adapters_on(host: ToyHost, residual, target="everything", moved=0.2) -> dict:
    """Adapters in the host's dtype; moved: how far every parameter is from its start, as after some training."""
    adapters = build_adapters(host, Method(residual), target, seed=5)
    draw = torch.Generator().manual_seed(6)
    for adapter in adapters.values():
        for parameter in adapter.to(host.dtype).parameters():
            parameter.data += moved * torch.randn(parameter.shape, generator=draw)
    return adapters


def parameters_of(adapters) -> list[nn.Parameter]:
    return [p for a in adapters.values() for p in a.parameters()]


def snapshot(adapters) -> list[Tensor]:
    return [p.detach().clone() for p in parameters_of(adapters)]


def equal(one, other) -> bool:
    """Whether two lists of tensors are the same bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def overridden(model: nn.Module) -> list[str]:
    """Names of the modules that carry a forward of their own."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]
