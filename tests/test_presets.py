"""Methods by name: every pair of the registry, their sizes, and the line of options."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from comfyui_trilora.trilora_ops import registry
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.presets import PRESETS, build_method, pairs, sizes
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig
from comfyui_trilora.trilora_ops.residuals.tensor_ring import TensorRingResidualConfig
from comfyui_trilora.trilora_ops.transforms.block_orthogonal import BlockOrthogonalConfig
from comfyui_trilora.trilora_ops.transforms.diagonal import DiagonalConfig
from comfyui_trilora.trilora_ops.transforms.tensor_ring import TensorRingConfig
from torch import nn

CONFIGS = [*registry.TRANSFORMS.values(), *registry.RESIDUALS.values()]


def kinds(method) -> tuple[str, str]:
    return method.transform.kind, method.residual.kind


def test_the_presets_come_first_and_every_pair_with_a_transform_is_there_once():
    wanted = {(t, r) for t in registry.TRANSFORMS if t != "none" for r in registry.RESIDUALS}
    assert list(pairs())[:4] == ["TLoRA", "TLoRA*", "DoRA-like", "OFT-like"] == list(PRESETS)
    assert sorted(pairs().values()) == sorted(wanted) and len(wanted) >= 12
    for name, pair in pairs().items():
        assert kinds(build_method(name)) == pair and (name in PRESETS or name == " + ".join(pair))


@pytest.mark.parametrize("module", [nn.Linear(24, 10), nn.Conv2d(8, 6, 3, padding=1)], ids=["linear", "conv"])
def test_every_pair_builds_an_identity(module):
    for name in pairs():
        adapter = build_method(name, rank=2).build(module, module.weight, torch.Generator().manual_seed(1))
        assert list(adapter.parameters()) and not adapter.delta(module.weight).any(), name


def test_size_zero_is_the_kinds_default():
    for name, (transform, residual) in pairs().items():
        method = build_method(name)
        assert (method.transform, method.residual) == (registry.TRANSFORMS[transform](), registry.RESIDUALS[residual]()), name


def test_sizes_go_to_the_kinds_that_have_one_and_others_ignore_them():
    for name in pairs():
        method = build_method(name, transform_size=5, rank=3)
        for config, size in ((method.transform, 5), (method.residual, 3)):
            assert config == (type(config)(**{config.SIZE: size}) if config.SIZE else type(config)()), name
    assert sizes()["transform"] == ["tensor_ring: ring_rank", "block_orthogonal: block"]
    assert {entry.split(": ")[0] for entry in sizes()["residual"]} == {k for k, c in registry.RESIDUALS.items() if c.SIZE}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.__module__.split('.')[-2]}-{c.kind}")
def test_every_kind_can_be_written_as_options(config):
    """SIZE is a whole number among the fields; every field has a default of a type that a line of options can hold."""
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    assert config.SIZE is None or isinstance(fields[config.SIZE], int)
    assert all(type(default) in (int, float, str, tuple) for default in fields.values())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.__module__.split('.')[-2]}-{c.kind}")
def test_the_help_page_explains_every_option(config):
    page = (Path(__file__).resolve().parents[1] / "web" / "docs" / "TriLoRAMethodTransform.md").read_text(encoding="utf-8")
    assert [field.name for field in dataclasses.fields(config) if f"`{field.name}`" not in page] == []


@pytest.mark.parametrize(
    ("pair", "options", "transform", "residual"),
    [("TLoRA", " ring_init = paper ,alpha=2,, factors=4x8x10", TensorRingConfig(1, (4, 8, 10), "paper"), TensorRingResidualConfig(alpha=2.0)),
     ("TLoRA", "init=mup, residual.factors_out=2x5, transform.identity_penalty=1e-2",
      TensorRingConfig(identity_penalty=0.01), TensorRingResidualConfig(init="mup", factors_out=(2, 5))),
     ("TLoRA*", "ring_rank=2, rank=4", TensorRingConfig(2), LoraConfig(4)),
     ("OFT-like", "block=8", BlockOrthogonalConfig(8), registry.RESIDUALS["none"]()),
     ("DoRA-like", "alpha=0.5", DiagonalConfig(), LoraConfig(alpha=0.5))],
)  # fmt: skip
def test_options_are_read_by_the_fields_types(pair, options, transform, residual):
    method = build_method(pair, options=options)
    assert (method.transform, method.residual) == (transform, residual)
    assert all(type(getattr(config, f.name)) is type(f.default) for config in (method.transform, method.residual) for f in dataclasses.fields(config))


@pytest.mark.parametrize(
    ("options", "words"),
    [("warmth=2", r"'warmth' is unknown; TLoRA has transform.ring_rank=1, transform.factors=4x8x10 \(default: chosen .*residual.alpha=1.0"),
     ("transform.alpha=2", "'transform.alpha' is unknown"), ("alpha", "'alpha' has no value; write alpha=1.0"),
     ("alpha=two", "'alpha=two' cannot be read; write alpha=1.0"), ("ring_rank=1.5", "write ring_rank=1"),
     ("factors=4-8", "'factors=4-8' cannot be read; write factors=4x8x10"), ("alpha=1, residual.alpha=2", "residual.alpha is given twice"),
     ("rank=4", "rank is given twice, where a size above 0 counts"), ("ring_init=round", "ring_init='round': choose one of auto, paper, asym")],
)  # fmt: skip
def test_bad_options_name_what_there_is(options, words):
    with pytest.raises(TriLoRAError, match=words):
        build_method("TLoRA", rank=3, options=options)


def test_bad_pairs_and_sizes_are_refused():
    with pytest.raises(TriLoRAError, match="pair='LoRA': choose one of TLoRA, "):
        build_method("LoRA")
    with pytest.raises(TriLoRAError, match="DoRA-like has residual.rank=16"):
        build_method("DoRA-like", options="block=3")
    with pytest.raises(TriLoRAError, match="block=1"):
        build_method("OFT-like", transform_size=1)
    with pytest.raises(TriLoRAError, match="rank=-2"):
        build_method("TLoRA*", rank=-2)


@dataclass(frozen=True)
class Toy:
    """A kind that has a size and a name in common with LoRA."""

    kind: ClassVar[str] = "toy"
    TENSORS: ClassVar[tuple[str, ...]] = ("g",)
    SIZE: ClassVar[str | None] = "width"
    width: int = 2
    alpha: float = 3.0


def test_a_kind_registered_later_has_its_pairs(monkeypatch):
    monkeypatch.setitem(registry.TRANSFORMS, "toy", Toy)
    assert {f"toy + {residual}" for residual in registry.RESIDUALS} <= set(pairs())
    assert "toy: width" in sizes()["transform"]
    method = build_method("toy + lora", transform_size=7, options="transform.alpha=5, residual.alpha=6")
    assert method.transform == Toy(7, 5.0) and method.residual == LoraConfig(alpha=6.0)
    with pytest.raises(TriLoRAError, match="'alpha' is both transform.alpha and residual.alpha; toy . lora has transform.width=2"):
        build_method("toy + lora", options="alpha=5")
