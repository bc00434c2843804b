"""Files of every kind and files that are nearly right: refused in one sentence, or finite numbers of the right shape. Seconds of what tests/fuzz does for hours."""

import random

import pytest
import torch
from comfyui_trilora.tests.fuzz import files, layers, mutations
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.files import kinds

WEIGHTS = {f"w{number}": torch.randn(shape, generator=torch.Generator().manual_seed(number)) for number, shape in enumerate(files.SHAPES)}


@pytest.mark.parametrize("kind", files.KINDS)
def test_what_its_trainer_writes_is_accepted(kind):
    rng = random.Random(kind)
    for _ in range(20):
        shape = rng.choice([shape for shape in files.SHAPES if len(shape) >= files.KINDS[kind][1]])
        name = f"w{files.SHAPES.index(shape)}"
        tensors = {name + ending: tensor for ending, tensor in files.layer(rng, kind, shape).items()}
        assert layers.check(kinds, TriLoRAError, tensors, WEIGHTS) == 1, (kind, shape, {k: tuple(v.shape) for k, v in tensors.items()})


@pytest.mark.parametrize("seed", range(30))
def test_what_is_accepted_computes(seed):
    accepted = 0
    for number in range(40):
        rng = random.Random(1000 * seed + number)
        tensors, faults = mutations.mutated(rng, files.file(rng, {name: tuple(weight.shape) for name, weight in WEIGHTS.items()}))
        try:
            accepted += layers.check(kinds, TriLoRAError, tensors, WEIGHTS)
        except Exception as error:
            told = {key[:60]: (tuple(tensor.shape), str(tensor.dtype)) for key, tensor in tensors.items()}
            raise AssertionError(f"seed {1000 * seed + number}, {faults}: {type(error).__name__}: {error}; {told}") from error
    assert accepted >= 20
