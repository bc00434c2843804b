"""What a run says against itself: layers that never moved, a loss that rose, skipped steps."""

import math

import pytest
import torch
from comfyui_trilora.training.config import TrainingConfig
from comfyui_trilora.training.findings import doubts, judge, moves, unmoved
from comfyui_trilora.training.loop import Progress
from comfyui_trilora.trilora_ops.registry import RESIDUALS, TRANSFORMS, Method
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig

from .toy_host import ToyHost, adapters_on, make_samples, without_caption

PAIRS = [(residual, transform) for residual in RESIDUALS for transform in TRANSFORMS if (residual, transform) != ("none", "none")]
LAYERS = {"linear": lambda: torch.nn.Linear(12, 8), "convolution": lambda: torch.nn.Conv2d(6, 4, 3, padding=1)}


def adapter(residual, transform, layer):
    module = LAYERS[layer]()
    options = {"rank": 2} if "rank" in RESIDUALS[residual].__dataclass_fields__ else {}
    return Method(RESIDUALS[residual](**options), TRANSFORMS[transform]()).build(module, module.weight, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("residual", "transform"), PAIRS)
def test_every_kind_stands_still_at_first_and_a_small_step_moves_it(residual, transform, layer):
    found = adapter(residual, transform, layer)
    assert not moves(found)
    for parameter in found.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape)
    assert moves(found)


def test_layers_that_never_moved_are_counted_by_block():
    adapters = adapters_on(ToyHost(), LoraConfig(rank=2), moved=0)
    block = {key: key.split(".")[2] if ".blocks." in key else "rest" for key in adapters}.get
    assert "none of its" in unmoved(adapters, block) and "learning_rate" in unmoved(adapters, block)
    for key, found in adapters.items():
        if ".blocks.1." not in key:
            for parameter in found.parameters():
                parameter.data += 0.1
    still = sum(".blocks.1." in key for key in adapters)
    assert unmoved(adapters, block).startswith(f"{still} of {len(adapters)} layers never moved: 1 ({still}); no gradient reaches them")
    for found in adapters.values():
        for parameter in found.parameters():
            parameter.data += 0.1
    assert unmoved(adapters, block) is None


def test_many_blocks_are_a_short_sentence():
    adapters = {str(n): adapter("lora", "none", "linear") for n in range(100)}
    for parameter in adapters["0"].parameters():
        parameter.data += 0.1
    text = unmoved(adapters, lambda key: f"IN{key}")
    assert "IN1 (1)" in text and "and 91 more blocks" in text and len(text) < 400


@pytest.mark.parametrize(
    ("before", "after", "speaks"),
    [([1.0, 1.2], [3.0, 4.0], True), ([1.0, 1.2], [1.0, 1.19], False), ([1.0, 1.2], [0.8, 0.9], False),
     ([1.0, 1.0, 1.0, 1.0], [1.001, 1.002, 1.001, 1.002], False),  # sure, and too little
     ([1.0, 1.0, 1.0, 1.0], [1.5, 0.7, 1.4, 0.8], False),  # a rise within the noise
     ([1.0, 1.0, 1.0, 1.0], [1.1, 1.2, 1.1, 1.2], True)],
)
def test_a_loss_that_rose_is_said_where_it_is_more_than_noise(before, after, speaks):
    found = doubts([before], [after], Progress(10, done=10), TrainingConfig())
    assert len(found) == speaks
    assert not speaks or ("made it worse" in found[0] and "lower learning_rate" in found[0])


@pytest.mark.parametrize(("after", "speaks"), [([1.0, 1.2], True), ([1.000001, 1.2], True), ([1.0, 1.199], False)])
def test_a_run_that_changed_nothing_is_said(after, speaks):
    found = doubts([[1.0, 1.2]], [after], Progress(10, done=10), TrainingConfig(learning_rate=1e-8))
    assert len(found) == speaks
    assert not speaks or ("next to nothing" in found[0] and "raise learning_rate (it was 1e-08)" in found[0])


def test_adapters_that_stand_still_are_said_once():
    adapters = adapters_on(ToyHost(), LoraConfig(rank=2), moved=0)
    (text,) = judge(adapters, lambda key: "IN00", [[1.0]], [[1.0]], Progress(10, done=10), TrainingConfig())
    assert "did not move" in text


@pytest.mark.parametrize(("after", "speaks"), [([1.05, 1.06], False), ([1.2, 1.3], True), ([0.9, 0.9], False)])
def test_what_the_model_has_forgotten_is_said(after, speaks):
    found = doubts([[2.0, 2.0], [1.0, 1.0]], [[1.5, 1.5], after], Progress(10, done=10), TrainingConfig())
    assert len(found) == speaks
    assert not speaks or "raise prior_weight (it was 1)" in found[0]


@pytest.mark.parametrize(("skipped", "speaks"), [(0, False), (5, False), (6, True), (40, True)])
def test_a_share_of_skipped_steps_is_said(skipped, speaks):
    found = doubts([[1.0]], [[0.9]], Progress(100, done=100, skipped=skipped), TrainingConfig())
    assert len(found) == speaks
    assert not speaks or found[0].startswith(f"{skipped} of 100 steps were skipped")


def test_a_loss_that_is_no_number_is_said_once():
    (text,) = doubts([[1.0, 1.0]], [[math.nan, 1.0]], Progress(100, done=100), TrainingConfig())
    assert "not a number after the last step" in text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_through_which_no_gradient_flows_is_refused(checkpointing):
    """As with a kernel that forgets the graph below every trained layer."""
    from comfyui_trilora.training.loop import TrainingStopped, train
    from comfyui_trilora.trilora_ops.errors import TriLoRAError

    host, samples = ToyHost(), make_samples(3)
    whole = host.raw
    host.raw = lambda *args: whole(*args).detach()
    with pytest.raises(TrainingStopped) as stop:
        train(host, adapters_on(host, LoraConfig(rank=2), moved=0), samples, without_caption(samples), TrainingConfig(steps=3, checkpointing=checkpointing))
    assert isinstance(stop.value.__cause__, TriLoRAError) and "no gradient reaches the layers" in str(stop.value.__cause__)


def test_an_operation_without_a_backward_pass_is_named():
    from comfyui_trilora.training.loop import TrainingStopped, train
    from comfyui_trilora.trilora_ops.errors import TriLoRAError

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

    host, samples = ToyHost(), make_samples(3)
    whole = host.raw
    host.raw = lambda *args: Kernel.apply(whole(*args))
    with pytest.raises(TrainingStopped) as stop:
        train(host, adapters_on(host, LoraConfig(rank=2), moved=0), samples, without_caption(samples), TrainingConfig(steps=3))
    assert isinstance(stop.value.__cause__, TriLoRAError) and "has no backward pass" in str(stop.value.__cause__)
