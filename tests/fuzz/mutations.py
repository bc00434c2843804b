"""What goes wrong with a file: one tensor lost, doubled, of another shape, type or size, or under another name."""

import random
from collections.abc import Callable

import torch

from .files import KINDS, PAIRS, SHAPES, layer, numbers

DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.int32, torch.bool, torch.complex64)
SCALES = (0.0, -1.0, 1e-30, 1e3, 1e6, 1e20, 1e30, 1e38)
ENDINGS = sorted({ending for pair in PAIRS for ending in pair} | {
    ".alpha", ".dora_scale", ".lora_mid.weight", ".reshape_weight", ".rescale", ".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight", ".oft_blocks", ".oft_R.weight",
    ".oft_angles", ".oft_terms", ".boft_R", ".boft_s",
    ".hada_w1_a", ".hada_w2_b", ".hada_t1", ".lokr_w1", ".lokr_w2_a", ".lokr_t2", ".a1.weight", ".b2.weight", ".transform.m", ".transform.core0",
    ".residual.up", ".residual.scale", ".lora_E", ".lora_magnitude_vector", ".on_input", ".weight", ".scale", ".unheard_of"})  # fmt: skip

Tensors = dict[str, torch.Tensor]


def ending_of(key: str) -> str:
    """The longest known ending of a key, or what follows its last dot."""
    return max((ending for ending in ENDINGS if key.endswith(ending)), key=len, default="." + key.rpartition(".")[2])


def drop(rng: random.Random, tensors: Tensors) -> None:
    """A tensor is missing."""
    del tensors[rng.choice(sorted(tensors))]


def rename(rng: random.Random, tensors: Tensors) -> None:
    """A tensor stands under another ending."""
    key = rng.choice(sorted(tensors))
    tensors[key.removesuffix(ending_of(key)) + rng.choice(ENDINGS)] = tensors.pop(key)


def double(rng: random.Random, tensors: Tensors) -> None:
    """A tensor stands under another ending too."""
    key = rng.choice(sorted(tensors))
    tensors[key.removesuffix(ending_of(key)) + rng.choice(ENDINGS)] = tensors[key].clone()


def reshape(rng: random.Random, tensors: Tensors) -> None:
    """A tensor has other axes: flat, transposed, one more, one less, half of one, none of one, a number."""
    key = rng.choice(sorted(tensors))
    tensor = tensors[key]
    forms = [tensor.flatten(), tensor[None], tensor[..., None], tensor.reshape(-1)[:1].squeeze(), tensor.new_zeros(0), tensor.new_zeros(*tensor.shape, 0)]
    if tensor.ndim:
        axis = rng.randrange(tensor.ndim)
        forms += [tensor.transpose(axis, 0), tensor.narrow(axis, 0, tensor.shape[axis] // 2), torch.cat([tensor, tensor], dim=axis), tensor.select(axis, 0)] if tensor.shape[axis] else []
    tensors[key] = rng.choice(forms).clone()


def cast(rng: random.Random, tensors: Tensors) -> None:
    """A tensor is of another type."""
    key, dtype = rng.choice(sorted(tensors)), rng.choice(DTYPES)
    tensors[key] = tensors[key].to(dtype)


def cast_all(rng: random.Random, tensors: Tensors) -> None:
    """All floating-point tensors are of another such type."""
    dtype = rng.choice(DTYPES[:4])
    for key, tensor in tensors.items():
        tensors[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor


def scale(rng: random.Random, tensors: Tensors) -> None:
    """A tensor is far too large, too small, nothing or negative."""
    key = rng.choice(sorted(tensors))
    if tensors[key].element_size() > 1:
        tensors[key] = tensors[key].double().mul(rng.choice(SCALES)).to(tensors[key].dtype) if not tensors[key].is_complex() else tensors[key]


def scale_all(rng: random.Random, tensors: Tensors) -> None:
    """Every factor is somewhat too large."""
    by = rng.choice((10.0, 1e3, 1e5, 1e10))
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.ndim and tensor.element_size() > 1:
            tensors[key] = (tensor.double() * by).to(tensor.dtype)


def strange_value(rng: random.Random, tensors: Tensors) -> None:
    """One entry is no number, or infinite."""
    keys = [key for key, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel() and tensor.element_size() > 1]
    if keys:
        key = rng.choice(sorted(keys))
        tensors[key] = tensors[key].clone(memory_format=torch.contiguous_format)
        tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = rng.choice((float("nan"), float("inf"), -float("inf")))


def add(rng: random.Random, tensors: Tensors) -> None:
    """A companion that does not belong here, of some shape."""
    key = rng.choice(sorted(tensors))
    shapes = [(), (1,), (2,), tuple(tensors[key].shape), (12, 1), (1, 18), (8, 1, 1, 1)]
    value = rng.choice([numbers(rng, *rng.choice(shapes)), torch.tensor([130, 128]), torch.tensor([10**6, 10**6]), torch.tensor(7), torch.tensor([24.0, 10.0])])
    tensors[key.removesuffix(ending_of(key)) + rng.choice(ENDINGS)] = value


def second(rng: random.Random, tensors: Tensors) -> None:
    """A second layer stands under one name."""
    key, shape = rng.choice(sorted(tensors)), rng.choice(SHAPES)
    kind = rng.choice([kind for kind, (_, axes) in KINDS.items() if len(shape) >= axes])
    tensors |= {key.removesuffix(ending_of(key)) + ending: tensor for ending, tensor in layer(rng, kind, shape).items()}


def long_name(rng: random.Random, tensors: Tensors) -> None:
    """A name without end."""
    key = rng.choice(sorted(tensors))
    tensors["a" * 100_000 + ending_of(key)] = tensors[key].clone()


MUTATIONS: tuple[Callable[[random.Random, Tensors], None], ...] = (
    drop, rename, double, reshape, reshape, cast, cast_all, scale, scale, scale_all, strange_value, add, second, long_name,
)  # fmt: skip


def mutated(rng: random.Random, tensors: Tensors) -> tuple[Tensors, list[str]]:
    """(the file after one to three faults, their names). It holds at least one tensor."""
    tensors, done = dict(tensors), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if len(tensors) > 1 or done == []:
            fault = rng.choice(MUTATIONS)
            if fault is drop and len(tensors) == 1:
                continue
            fault(rng, tensors)
            done.append(fault.__name__)
    return tensors, done
