"""Training by a plan: what is built, what is differentiated, which gradients and which steps come out."""

import pytest
import torch
from comfyui_trilora.training.config import TrainingConfig
from comfyui_trilora.training.inject import injected
from comfyui_trilora.training.loop import train
from comfyui_trilora.training.plan import (
    adaptable,
    build_adapters,
    check_plan,
    describe_plan,
    learning_rates,
    parameter_count,
)
from comfyui_trilora.trilora_ops.block_plan import BlockPlan
from comfyui_trilora.trilora_ops.blocks import Blocks
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.presets import build_method, pairs
from comfyui_trilora.trilora_ops.registry import Method
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig
from comfyui_trilora.trilora_ops.targets import select

from .toy_host import ToyHost, equal, make_samples, snapshot

LORA = Method(LoraConfig(rank=2))
PLANS = {"first": "default=0, blocks.00=3", "middle": "default=0, blocks.01=3", "last": "default=0, blocks.02=3", "last.mlp": "default=0, blocks.02.mlp=1"}
STEPS = TrainingConfig(steps=3, learning_rate=1e-2, schedule="constant", warmup=0.0, grad_clip=0.0, caption_dropout=0.0, batch_size=2)


def read(host: ToyHost, plan: BlockPlan, method: Method = LORA):
    return plan.read(Blocks.of(host.layers()), method)


def moved(adapters: dict, amount: float = 0.2) -> dict:
    """The adapters as after some training, each by a draw of its own."""
    for key, adapter in adapters.items():
        draw = torch.Generator().manual_seed(sum(map(ord, key)))
        for parameter in adapter.parameters():
            parameter.data += amount * torch.randn(parameter.shape, generator=draw)
    return adapters


@pytest.mark.parametrize("plan", PLANS)
def test_layers_outside_the_plan_get_nothing(plan):
    """Neither adapter nor parameter; those inside start as they would without a plan that leaves others out."""
    host = ToyHost()
    method = Method(LoraConfig(rank=3 if "mlp" not in plan else 2))
    adapters = build_adapters(host, LORA, "linear", 4, read(host, BlockPlan(PLANS[plan])))
    block = {"first": 0, "middle": 1, "last": 2, "last.mlp": 2}[plan]
    assert list(adapters) == [key for key in host.layers() if f"blocks.{block}." in key and ("mlp" not in plan or ".mlp." in key)]
    whole = build_adapters(host, method, "linear", 4)
    assert equal(snapshot(adapters), snapshot({key: whole[key] for key in adapters}))
    assert 0 < parameter_count(adapters) < parameter_count(whole)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_are_those_of_the_full_computation(plan, checkpointing, in_place):
    """Full = adapters on every layer, those outside the plan at their start, which changes nothing."""
    host = ToyHost(in_place=in_place)
    reading = read(host, BlockPlan(PLANS[plan]))
    found = moved(build_adapters(host, LORA, "linear", 4, reading))
    whole = build_adapters(host, LORA, "linear", 4) | moved(build_adapters(host, LORA, "linear", 4, reading))
    samples = make_samples(2)
    inputs = torch.cat([s.x0 for s in samples]), torch.tensor([0.7, 2.0]), torch.cat([s.conditions for s in samples])
    for adapters in (found, whole):
        with injected(host, adapters, checkpointing if adapters is found else False, clone_saved=in_place):
            host.model(*inputs).square().sum().backward()
    assert len(found) < len(whole) and all(p.grad.any() for a in found.values() for p in a.parameters())
    for key, adapter in found.items():
        for ours, full in zip(adapter.parameters(), whole[key].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, full.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("plan", "first"), [("first", 0), ("middle", 1), ("last", 2)])
def test_nothing_below_the_plan_is_differentiated(plan, first, checkpointing):
    """No graph leads into the first trained block, and the backward pass asks for no weight below it."""
    host = ToyHost()
    adapters = build_adapters(host, LORA, "linear", 4, read(host, BlockPlan(PLANS[plan])))
    graphs = {}
    with injected(host, adapters, checkpointing):
        for number, block in enumerate(host.blocks()):
            block.register_forward_hook(lambda module, args, out, number=number: graphs.update({number: args[0].grad_fn}))
        samples = make_samples(1)
        host.model(samples[0].x0, torch.tensor([0.7]), samples[0].conditions).sum().backward()
    assert [graphs[n] is not None for n in range(3)] == [n > first for n in range(3)]
    names = {id(module): name for name, module in host.model.named_modules()}
    asked = {names[id(module)] for module in host.fetched}
    assert asked and not asked & {f"blocks.{n}.{part}" for n in range(first) for part in ("attn.q", "attn.out", "mlp")} - {"conv_in"}


def test_the_learning_rate_of_a_block():
    """One step of AdamW moves every number by rate * factor, whatever its gradient; the schedule multiplies."""
    host = ToyHost()
    reading = read(host, BlockPlan(learning_rate="blocks.00=0.25, blocks.01=2, blocks.02=0"))
    adapters = build_adapters(host, LORA, "attention", 4, reading)
    rates = learning_rates(adapters, reading)
    assert set(rates.values()) == {0.25, 2.0} and len(adapters) == 4
    for config, top in ((TrainingConfig(**{**STEPS.as_dict(), "steps": 1, "weight_decay": 0.0}), 1e-2),
                        (TrainingConfig(**{**STEPS.as_dict(), "steps": 1, "weight_decay": 0.0, "learning_rate": 4e-2, "warmup": 0.5}), 4e-2)):
        before, samples = {key: [p.detach().clone() for p in a.parameters()] for key, a in adapters.items()}, make_samples(2)
        progress = train(host, adapters, samples, samples, config, rates=rates)
        assert progress.learning_rate == pytest.approx(top)
        for key, adapter in adapters.items():
            change = torch.cat([(p - old).abs().flatten() for p, old in zip(adapter.parameters(), before[key], strict=True)])
            assert change.max().item() == pytest.approx(top * rates[key], rel=1e-3)


def test_factors_of_one_are_the_plain_run():
    """The parameter groups of a plan without rates are those of a run without a plan: the same numbers, bit by bit."""
    results = []
    for plan in (None, BlockPlan(learning_rate="default=1")):
        host, samples = ToyHost(), make_samples(4)
        reading = plan and read(host, plan)
        adapters = build_adapters(host, LORA, "linear", 4, reading)
        train(host, adapters, samples, samples, STEPS, rates=learning_rates(adapters, reading))
        results.append(snapshot(adapters))
    assert equal(*results)


@pytest.mark.parametrize("pair", pairs())
def test_every_pair_trains_by_a_plan(pair):
    """A chain that gives the last block a transform and the first a LoRA: both learn, the middle has nothing."""
    host, samples = ToyHost(), make_samples(2)
    plan = BlockPlan("default=0, blocks.02=1", method=build_method(pair, options="rank=1" if build_method(pair).residual.SIZE else ""),
                     earlier=BlockPlan("default=0, blocks.00=2"))
    reading = read(host, plan)
    adapters = build_adapters(host, LORA, "attention", 4, reading)
    assert [key.split(".")[2] for key in adapters] == ["0", "0", "2", "2"]
    before = {key: [p.detach().clone() for p in a.parameters()] for key, a in adapters.items()}
    train(host, adapters, samples, samples, STEPS, rates=learning_rates(adapters, reading))
    for key, adapter in adapters.items():
        assert not equal(adapter.parameters(), before[key]), key


def test_what_a_plan_saves():
    host = ToyHost()
    reading = read(host, BlockPlan("default=0, blocks.01=2"))
    adapters = build_adapters(host, LORA, "attention", 4, reading)
    facts = describe_plan(host, adapters, "attention", reading)
    assert facts["block plan"] == "2 of the target's 6 layers, in 1 of 4 blocks, rank 2"
    weights = {key: module.weight.numel() for key, module in host.layers().items()}
    above = sum(count for key, count in weights.items() if "blocks.1." in key or "blocks.2." in key)
    assert facts["backward pass"] == f"from blocks.01 on: 2 of 4 blocks, {above / sum(weights.values()):.0%} of the weights"
    assert facts["without one"].startswith("BASE to blocks.00")
    whole = describe_plan(host, build_adapters(host, LORA, "everything", 4, read(host, BlockPlan())), "everything", read(host, BlockPlan()))
    assert "without one" not in whole and "100% of the weights" in whole["backward pass"]


def test_plans_that_train_nothing():
    host = ToyHost()
    with pytest.raises(TriLoRAError, match=r"block plan: its rank or its learning rate is 0 in every layer"):
        check_plan(host, "attention", read(host, BlockPlan("default=0")))
    with pytest.raises(TriLoRAError, match=r"target='attention' has no layer in what the plan trains \(blocks.01.mlp\); choose target='transformer'"):
        check_plan(host, "attention", read(host, BlockPlan("default=0, blocks.01.mlp=2")))
    with pytest.raises(TriLoRAError, match=r"choose target='everything'"):
        check_plan(host, "attention", read(host, BlockPlan("default=0, /conv_in/=2")))
    assert check_plan(host, "attention", read(host, BlockPlan("blocks.01.mlp=2, blocks.02=1"))) == ["blocks.01.mlp"]
    assert check_plan(host, "everything", read(host, BlockPlan("blocks.01.mlp=2"))) == []
    assert len(select(adaptable(host), "attention")) == 6


def test_a_rank_above_a_layer_names_the_layer():
    host = ToyHost()
    with pytest.raises(TriLoRAError, match=r"layer diffusion_model.blocks.1.attn.q.weight: rank=7 is larger than the layer"):
        build_adapters(host, LORA, "attention", 0, read(host, BlockPlan("blocks.01=7")))
