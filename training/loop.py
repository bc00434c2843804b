"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..trilora_ops.adapter import Adapter
from ..trilora_ops.errors import TriLoRAError
from .batches import batches, by_signature
from .config import TrainingConfig
from .host import Host, Sample
from .inject import injected, needs_clones
from .objective import draw_u, loss_weight, x0_loss
from .schedule import rate_factor

log = logging.getLogger("trilora")
MAX_BAD_STEPS = 20  # more than a gradient scaler needs to find its scale


@dataclass
class Progress:
    """State of a run, handed to `on_step` after every optimizer step.

    losses: mean weighted loss of every step so far; grad_norm: global norm before clipping; rate: steps per second.
    """

    steps: int
    done: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    rate: float = 0.0
    skipped: int = 0
    cloning: bool = False

    @property
    def smooth_loss(self) -> float:
        """Mean of the last 20 losses."""
        recent = self.losses[-20:]
        return sum(recent) / len(recent) if recent else float("nan")


class TrainingStopped(Exception):
    """The run ended early (interrupt or failure): `progress` says how far it came; the adapters hold what was learned.

    The reason is `__cause__`, to be raised again once the adapters are safe.
    """

    def __init__(self, progress: Progress):
        super().__init__(f"training stopped after {progress.done} of {progress.steps} steps")
        self.progress = progress


def train(host: Host, adapters: Mapping[str, Adapter], samples: Sequence[Sample], empty: Sequence[Sample],
          config: TrainingConfig, on_step: Callable[[Progress], None] = lambda progress: None) -> Progress:
    """Train `adapters` in place on `samples`; the model itself is left bit-identical.

    empty: the samples again with the empty prompt's conditions, index by index, for caption dropout.
    Call inside `host.session()`. Raises TrainingStopped if it ends before the last step, for whatever reason.
    """
    draws = torch.Generator().manual_seed(config.seed)
    order = batches(samples, config.batch_size, draws)
    optimizer, parameters = _optimizer(adapters, config)
    scaler = torch.amp.GradScaler(host.device.type, enabled=host.compute_dtype == torch.float16)
    progress = Progress(config.steps)
    bad, started = 0, time.perf_counter()
    try:
        while progress.done < config.steps:
            host.check_interrupt()
            progress.learning_rate = config.learning_rate * rate_factor(progress.done, config.steps, config.schedule, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = progress.learning_rate
            window = [[_pick(samples[i], empty[i], config, draws) for i in next(order)] for _ in range(config.accumulation)]
            drawn = [_draw(batch, host, config, draws) for batch in window]
            loss = _accumulate(host, adapters, drawn, config, scaler, optimizer, progress)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or float("inf"))
            if torch.isfinite(norm) and torch.isfinite(loss):
                bad = 0
                progress.losses.append(float(loss))
            else:
                bad, progress.skipped = bad + 1, progress.skipped + 1
                if scaler.is_enabled() and torch.isfinite(loss):  # how a gradient scaler finds its scale
                    log.info("step %d: gradients too large for fp16; scale lowered, step skipped", progress.done + 1)
                else:
                    log.warning("step %d: loss or gradient is not finite; step skipped", progress.done + 1)
                if bad == MAX_BAD_STEPS:
                    raise TriLoRAError(f"learning_rate={config.learning_rate}: loss or gradient was not finite for "
                                       f"{bad} steps in a row; lower the learning rate, or use a bf16 or fp32 base model")
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


@torch.no_grad()
def evaluate(host: Host, adapters: Mapping[str, Adapter], samples: Sequence[Sample], config: TrainingConfig, draws: int = 8) -> float:
    """Mean loss on a fixed set of samples, noise and noise levels: comparable across steps, unlike the training loss.

    draws: sample and noise pairs, with u spread evenly over (0, 1). Seeded by config.seed; draws nothing from the run.
    """
    generator = torch.Generator().manual_seed(config.seed + 1)
    total = 0.0
    with injected(host, adapters):
        for i in range(draws):
            host.check_interrupt()
            sample = samples[i * len(samples) // draws] if len(samples) > draws else samples[i % len(samples)]
            noise = torch.randn(sample.x0.shape, generator=generator)
            u = torch.tensor([(i + 0.5) / draws])
            total += float(_losses(host, [sample], noise, u, config).sum())
    return total / draws


def _optimizer(adapters: Mapping[str, Adapter], config: TrainingConfig) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    decay, keep = [], []
    for adapter in adapters.values():
        with_decay, without = adapter.parameter_groups()
        decay += with_decay
        keep += without
    groups = [{"params": p, "weight_decay": d} for p, d in ((decay, config.weight_decay), (keep, 0.0)) if p]
    return torch.optim.AdamW(groups, lr=config.learning_rate), decay + keep


def _pick(sample: Sample, empty: Sample, config: TrainingConfig, draws: torch.Generator) -> Sample:
    return empty if float(torch.rand(1, generator=draws)) < config.caption_dropout else sample


def _draw(batch: list[Sample], host: Host, config: TrainingConfig, draws: torch.Generator) -> tuple[list[Sample], list[Tensor], Tensor]:
    noise = [torch.randn(sample.x0.shape, generator=draws) for sample in batch]
    return batch, noise, draw_u(len(batch), config.timesteps, host.prediction, draws)


def _accumulate(host: Host, adapters, drawn, config: TrainingConfig, scaler, optimizer, progress: Progress) -> Tensor:
    """Gradients of the mean loss over all samples of a step; run again with cloned activations where a model needs that."""
    while True:
        try:
            total = torch.zeros((), device=host.device)
            count = sum(len(batch) for batch, _, _ in drawn)
            for batch, noise, u in drawn:
                host.check_interrupt()
                for members in by_signature(batch):  # caption dropout may have mixed two kinds of conditions
                    with injected(host, adapters, config.checkpointing, progress.cloning):
                        losses = _losses(host, [batch[m] for m in members], torch.cat([noise[m] for m in members]), u[members], config)
                        scaler.scale(losses.sum() / count).backward()
                    total += losses.detach().sum() / count
            penalty = sum(a.penalty() for a in adapters.values())
            if penalty.requires_grad:
                scaler.scale(penalty).backward()
            return total
        except RuntimeError as error:
            if progress.cloning or not needs_clones(error):
                raise
            log.info("this model writes into activations in place; training keeps copies of them")
            progress.cloning = True
            optimizer.zero_grad(set_to_none=True)


def _losses(host: Host, samples: list[Sample], noise: Tensor, u: Tensor, config: TrainingConfig) -> Tensor:
    """(B,) weighted losses of samples of one signature; noise: (B, C, *space) unit normal, u: (B,) in (0, 1)."""
    x0 = torch.cat([sample.x0 for sample in samples]).to(host.device)
    sigma = host.sigma(u).to(host.device)
    x = host.add_noise(x0, noise.to(host.device), sigma)
    estimate = host.denoise(x, sigma, host.collate(samples))
    return x0_loss(estimate, x0, loss_weight(host.prediction, sigma, host.sigma_data, config.min_snr_gamma))
