"""How a training run ends early, and what it does when the loss is not a number."""

import pytest
import torch
from comfyui_trilora.training.config import TrainingConfig
from comfyui_trilora.training.loop import MAX_BAD_STEPS, Progress, TrainingStopped, train
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig

from .toy_host import ToyHost, adapters_on, equal, make_samples, overridden, parameters_of, snapshot, without_caption

LORA = LoraConfig(rank=2)


def run(host, adapters=None, on_step=lambda progress: None, **options):
    """(progress, adapters) of six quick steps at a constant rate."""
    adapters, samples = adapters or adapters_on(host, LORA, moved=0), make_samples(5)
    settings = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant", **options}
    return train(host, adapters, samples, without_caption(samples), TrainingConfig(**settings), on_step), adapters


@pytest.mark.parametrize("reason", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["poll", "forward", "backward", "on_step"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_stopped_run_keeps_what_it_learned(where, reason, checkpointing):
    """Wherever a run is stopped, the adapters are those of its complete steps and the model is as it was found."""
    _, expected = run(ToyHost(), steps=3, checkpointing=checkpointing)
    host, steps = ToyHost(), []

    def stop(*args):
        raise reason

    def arm(progress):
        steps.append(progress.done)
        if progress.done == 3:
            if where == "poll":
                host.check_interrupt = stop
            elif where == "forward":
                host.model.blocks[1].mlp.register_forward_hook(stop)
            elif where == "backward":
                host.frozen_weight = stop
            else:
                stop()

    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    adapters = adapters_on(host, LORA, moved=0)
    start = snapshot(adapters)
    with pytest.raises(TrainingStopped, match="training stopped after 3 of 6 steps") as error:
        run(host, adapters, arm, checkpointing=checkpointing)
    assert error.value.__cause__ is reason and error.value.progress.done == 3 and len(error.value.progress.losses) == 3
    assert steps == [1, 2, 3]
    assert equal(snapshot(adapters), snapshot(expected)) and not equal(snapshot(adapters), start)
    assert not overridden(host.model)
    assert all(torch.equal(v, before[k]) for k, v in host.model.state_dict().items())
    assert all(p.grad is None for p in parameters_of(adapters))


def break_passes(host, broken):
    """The model's noise level becomes NaN in the passes of these numbers."""
    sigma = host.sigma
    passes = []
    host.sigma = lambda u: passes.append(u) or (sigma(u) * float("nan") if len(passes) in broken else sigma(u))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_step_without_a_finite_loss_is_skipped(dtype, caplog):
    host, seen = ToyHost(), []
    host.compute_dtype = dtype
    break_passes(host, {3})
    adapters = adapters_on(host, LORA, moved=0)
    progress, _ = run(host, adapters, lambda p: seen.append(snapshot(adapters)))
    assert progress.done == 6 and progress.skipped == 1 and len(progress.losses) == 5
    assert equal(seen[2], seen[1]) and not equal(seen[3], seen[2])
    assert all(torch.isfinite(p).all() for p in seen[-1])
    assert [r.message for r in caplog.records] == ["step 3: loss or gradient is not finite; step skipped"]


def test_too_many_bad_steps_in_a_row_end_the_run():
    host = ToyHost()
    break_passes(host, set(range(3, 3 + MAX_BAD_STEPS)))
    with pytest.raises(TrainingStopped) as stop:
        run(host, steps=50)
    assert isinstance(stop.value.__cause__, TriLoRAError) and stop.value.progress.done == 2 + MAX_BAD_STEPS - 1
    assert f"learning_rate=0.01: loss or gradient was not finite for {MAX_BAD_STEPS} steps in a row" in str(stop.value.__cause__)


def test_bad_steps_that_are_not_in_a_row_do_not():
    host = ToyHost()
    break_passes(host, set(range(2, 2 * MAX_BAD_STEPS + 4, 2)))
    progress, _ = run(host, steps=2 * MAX_BAD_STEPS + 4)
    assert progress.skipped == MAX_BAD_STEPS + 1 and progress.done == 2 * MAX_BAD_STEPS + 4


def test_a_report_before_the_first_step():
    progress = Progress(5)
    assert progress.smooth_loss != progress.smooth_loss  # NaN, not an error
    assert str(TrainingStopped(progress)) == "training stopped after 0 of 5 steps"
