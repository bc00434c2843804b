"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..trilora_ops.adapter import Adapter
from ..trilora_ops.errors import TriLoRAError
from .batches import batches, by_signature
from .config import TrainingConfig
from .frozen import has_no_backward
from .host import Host, Sample
from .inject import injected, needs_clones
from .objective import draw_u, loss_weight, x0_loss
from .schedule import rate_factor

log = logging.getLogger("trilora")
_RECENT = 20  # losses in the mean that is shown
MAX_BAD_STEPS = 20  # more than a gradient scaler needs to find its scale
Pass = tuple[list[Sample], list[Tensor], Tensor]  # a batch, the noise of each, (B,) places u in the noise schedule


@dataclass
class Progress:
    """State of a run, handed to `on_step` after every optimizer step.

    losses: what was minimised in every step so far: data + prior_weight * prior. data_losses, prior_losses: the two, each
    the mean weighted loss of its own samples; prior_losses stays empty in a run without a regularisation set.
    grad_norm: global norm before clipping; rate: steps per second.
    """

    steps: int
    done: int = 0
    losses: list[float] = field(default_factory=list)
    data_losses: list[float] = field(default_factory=list)
    prior_losses: list[float] = field(default_factory=list)
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    rate: float = 0.0
    skipped: int = 0
    cloning: bool = False

    @property
    def recent(self) -> int:
        """Number of the last losses that `smooth_loss` is the mean of: at most 20."""
        return min(_RECENT, len(self.losses))

    @property
    def smooth_loss(self) -> float:
        """Mean of the last 20 losses, or of all where there are fewer."""
        return _recent(self.losses)

    @property
    def smooth_parts(self) -> tuple[float, float] | None:
        """The same of data and prior, where there is a regularisation set."""
        return (_recent(self.data_losses), _recent(self.prior_losses)) if self.prior_losses else None


def _recent(losses: list[float]) -> float:
    return sum(losses[-_RECENT:]) / len(losses[-_RECENT:]) if losses else float("nan")


class TrainingStopped(Exception):
    """The run ended early (interrupt or failure): `progress` says how far it came; the adapters hold what was learned.

    The reason is `__cause__`, to be raised again once the adapters are safe.
    """

    def __init__(self, progress: Progress):
        super().__init__(f"training stopped after {progress.done} of {progress.steps} steps")
        self.progress = progress


def train(host: Host, adapters: Mapping[str, Adapter], samples: Sequence[Sample], empty: Sequence[Sample],
          config: TrainingConfig, on_step: Callable[[Progress], None] = lambda progress: None, *,
          prior: Sequence[Sample] = (), prior_empty: Sequence[Sample] = (), rates: Mapping[str, float] = MappingProxyType({})) -> Progress:
    """Train `adapters` in place on `samples`; the model itself is left bit-identical.

    empty: the samples again with the empty prompt's conditions, index by index, for caption dropout.
    prior, prior_empty: the same two of a regularisation set; with one, and a prior_weight w above 0, the loss of a step is
    data + w * prior. Every step then draws as many batches of the set as of the samples, from a generator of its own: the
    samples' order and noise are those of the run without it.
    rates: adapters' factors of the learning rate, 1 where there is none.
    Call inside `host.session()`. Raises TrainingStopped if it ends before the last step, for whatever reason.
    """
    data = _Draws(samples, empty, host, config, config.seed)
    kept = _Draws(prior, prior_empty, host, config, config.seed + 2) if prior and config.prior_weight else None  # + 1 is evaluate's
    optimizer, parameters = _optimizer(adapters, config, rates)
    scaler = torch.amp.GradScaler(host.device.type, enabled=host.compute_dtype == torch.float16)
    progress = Progress(config.steps)
    bad, started = 0, time.perf_counter()
    try:
        while progress.done < config.steps:
            host.check_interrupt()
            progress.learning_rate = config.learning_rate * rate_factor(progress.done, config.steps, config.schedule, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = progress.learning_rate * group["rate"]
            of_data, of_prior = _accumulate(host, adapters, data.step(), kept.step() if kept else [], config, scaler, optimizer, progress)
            loss = of_data + config.prior_weight * of_prior if kept else of_data
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or float("inf"))
            if torch.isfinite(norm) and torch.isfinite(loss):
                bad = 0
                progress.losses.append(float(loss))
                progress.data_losses.append(float(of_data))
                if kept:
                    progress.prior_losses.append(float(of_prior))
            else:
                bad, progress.skipped = bad + 1, progress.skipped + 1
                if scaler.is_enabled() and torch.isfinite(loss):  # how a gradient scaler finds its scale
                    log.info("step %d: gradients too large for fp16; scale lowered, step skipped", progress.done + 1)
                else:
                    log.warning("step %d: loss or gradient is not finite; step skipped", progress.done + 1)
                if bad == MAX_BAD_STEPS:
                    raise TriLoRAError(f"learning_rate={config.learning_rate}: loss or gradient was not finite for "
                                       f"{bad} steps in a row; lower the learning rate, or set precision to bf16")
                optimizer.zero_grad(set_to_none=True)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.done += 1
            progress.grad_norm = float(norm)
            progress.rate = progress.done / (time.perf_counter() - started)
            on_step(progress)
    except BaseException as reason:  # the host's interrupt is not an Exception
        raise TrainingStopped(progress) from reason
    finally:
        for parameter in parameters:
            parameter.grad = None
    return progress


def evaluate(host: Host, adapters: Mapping[str, Adapter], samples: Sequence[Sample], config: TrainingConfig, draws: int = 8) -> float:
    """Mean of `fixed_noise_losses`."""
    return sum(fixed_noise_losses(host, adapters, samples, config, draws)) / draws


@torch.no_grad()
def fixed_noise_losses(host: Host, adapters: Mapping[str, Adapter], samples: Sequence[Sample], config: TrainingConfig, draws: int = 8) -> list[float]:
    """Losses on a fixed set of samples, noise and noise levels: comparable across steps, unlike the training loss.

    draws: sample and noise pairs, with u spread evenly over (0, 1). Seeded by config.seed; draws nothing from the run.
    """
    generator = torch.Generator().manual_seed(config.seed + 1)
    losses = []
    with injected(host, adapters):
        for i in range(draws):
            host.check_interrupt()
            sample = samples[i * len(samples) // draws] if len(samples) > draws else samples[i % len(samples)]
            noise = torch.randn(sample.x0.shape, generator=generator)
            u = torch.tensor([(i + 0.5) / draws])
            losses.append(float(_losses(host, [sample], noise, u, config).sum()))
    return losses


def _optimizer(adapters: Mapping[str, Adapter], config: TrainingConfig, rates: Mapping[str, float]) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for key, adapter in adapters.items():
        for decay, parameters in zip((config.weight_decay, 0.0), adapter.parameter_groups(), strict=True):
            groups.setdefault((rates.get(key, 1.0), decay), []).extend(parameters)
    filled = [{"params": found, "rate": rate, "weight_decay": decay} for (rate, decay), found in groups.items() if found]
    parameters = [p for group in filled for p in group["params"]]
    fused = parameters[0].device.type in ("cpu", "cuda")  # one pass over all; not every backend has it
    return torch.optim.AdamW(filled, lr=config.learning_rate, fused=fused), parameters


class _Draws:
    """What the steps of a run see of one set of samples: batches, dropped captions, noise and noise levels, all seeded."""

    def __init__(self, samples: Sequence[Sample], empty: Sequence[Sample], host: Host, config: TrainingConfig, seed: int):
        self.samples, self.empty, self.host, self.config = samples, empty, host, config
        self.generator = torch.Generator().manual_seed(seed)
        self.order = batches(samples, config.batch_size, self.generator)

    def step(self) -> list[Pass]:
        """The passes of one optimizer step."""
        window = [[self._pick(i) for i in next(self.order)] for _ in range(self.config.accumulation)]
        return [self._noised(batch) for batch in window]

    def _pick(self, index: int) -> Sample:
        dropped = float(torch.rand(1, generator=self.generator)) < self.config.caption_dropout
        return (self.empty if dropped else self.samples)[index]

    def _noised(self, batch: list[Sample]) -> Pass:
        noise = [torch.randn(sample.x0.shape, generator=self.generator) for sample in batch]
        return batch, noise, draw_u(len(batch), self.config.timesteps, self.host.prediction, self.generator)


def _accumulate(host: Host, adapters, data: list[Pass], prior: list[Pass], config: TrainingConfig, scaler, optimizer,
                progress: Progress) -> tuple[Tensor, Tensor]:
    """Gradients of mean(data) + prior_weight * mean(prior), each over all of its samples in a step; returns the two means.

    One pass after the other, so that a regularisation set costs time and no memory. Run again with cloned activations
    where a model needs that.
    """
    while True:
        try:
            means = [_backward(host, adapters, passes, weight, config, scaler, progress)
                     for passes, weight in ((data, 1.0), (prior, config.prior_weight))]
            penalty = sum(a.penalty() for a in adapters.values())
            if penalty.requires_grad:
                scaler.scale(penalty).backward()
            return means[0], means[1]
        except RuntimeError as error:
            if has_no_backward(error):
                reason = str(error).splitlines()[0][:200]
                raise TriLoRAError(f"model: an operation of it has no backward pass ({reason}); take off the model what nodes have "
                                   "changed in how it computes, or update ComfyUI") from error
            if progress.cloning or not needs_clones(error):
                raise
            log.info("this model writes into activations in place; training keeps copies of them")
            progress.cloning = True
            optimizer.zero_grad(set_to_none=True)


def _backward(host: Host, adapters, passes: list[Pass], weight: float, config: TrainingConfig, scaler, progress: Progress) -> Tensor:
    """Adds the gradients of weight * the mean loss of all samples of `passes`; returns the mean, without the weight."""
    total, count = torch.zeros((), device=host.device), sum(len(batch) for batch, _, _ in passes)
    for batch, noise, u in passes:
        host.check_interrupt()
        for members in by_signature(batch):  # caption dropout may have mixed two kinds of conditions
            with injected(host, adapters, config.checkpointing, progress.cloning):
                losses = _losses(host, [batch[m] for m in members], torch.cat([noise[m] for m in members]), u[members], config)
                if not losses.requires_grad:
                    raise TriLoRAError("model: no gradient reaches the layers that are trained; choose a wider target or other blocks, or "
                                       "take off what changes how the model computes")
                scaler.scale(weight * losses.sum() / count).backward()
            total += losses.detach().sum() / count
    return total


def _losses(host: Host, samples: list[Sample], noise: Tensor, u: Tensor, config: TrainingConfig) -> Tensor:
    """(B,) weighted losses of samples of one signature; noise: (B, C, *space) unit normal, u: (B,) in (0, 1)."""
    x0 = torch.cat([sample.x0 for sample in samples]).to(host.device)
    sigma = host.sigma(u).to(host.device)
    x = host.add_noise(x0, noise.to(host.device), sigma)
    estimate = host.denoise(x, sigma, host.collate(samples))
    return x0_loss(estimate, x0, loss_weight(host.prediction, sigma, host.sigma_data, config.min_snr_gamma))
