"""Adapter files of every kind with random numbers, and files that are not quite right any more.

Everything is drawn from one `random.Random`, so a seed tells the whole file. Knows neither pytest nor the host.
"""

import random
from collections.abc import Callable, Mapping

import torch

# shapes of weights: no two axes alike, a linear layer of few and of many outputs, convolutions, a bias or norm
SHAPES = ((12, 18), (24, 10), (8, 6, 3, 3), (16, 4, 1, 1), (6, 12, 3), (4, 6, 2, 3, 3), (20,))
PAIRS = ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight"), ("_lora.up.weight", "_lora.down.weight"),
         (".lora.up.weight", ".lora.down.weight"), (".lora_B", ".lora_A"), (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
         (".lora_B.default.weight", ".lora_A.default.weight"))  # fmt: skip


def numbers(rng: random.Random, *shape: int, size: float = 0.3) -> torch.Tensor:
    """Normally distributed, fp32."""
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(rng.getrandbits(40)))


def product(shape) -> int:
    """Of a tuple's numbers."""
    return torch.Size(shape).numel()


def split(rng: random.Random, n: int) -> tuple[int, int]:
    """Two factors of a number."""
    first = rng.choice([f for f in range(1, n + 1) if n % f == 0])
    return first, n // first


def alpha(rng: random.Random) -> dict[str, torch.Tensor]:
    """None, or one of the ways in which files hold it."""
    value = rng.choice([None, 1.0, 4, 0.5, 8.0])
    return {} if value is None else {".alpha": torch.tensor(value)}


def magnitudes(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """DoRA's, of the outputs or the inputs, in the spellings of LyCORIS, kohya and PEFT."""
    axis = rng.choice([0, 0, 1])
    lying = [n if other == axis else 1 for other, n in enumerate(shape)]
    if axis == 0 and rng.random() < 0.4:
        return {rng.choice([".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"]): 1 + numbers(rng, shape[0])}
    return {".dora_scale": 1 + numbers(rng, *lying)}


def low_rank(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """A pair in any spelling."""
    (up, down), r, ones = rng.choice(PAIRS), rng.randint(1, 5), [1] * max(len(shape) - 2, 0)
    return {up: numbers(rng, shape[0], r, *ones), down: numbers(rng, r, *(shape[1:] or (1,)))} | alpha(rng)


def tucker(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """LoCon with a core."""
    r, s, ones = rng.randint(1, 4), rng.randint(1, 4), [1] * (len(shape) - 2)
    return {".lora_up.weight": numbers(rng, shape[0], r, *ones), ".lora_mid.weight": numbers(rng, r, s, *shape[2:]),
            ".lora_down.weight": numbers(rng, s, shape[1], *ones)} | alpha(rng)  # fmt: skip


def widening(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """A pair that gives the weight more inputs."""
    r, wide = rng.randint(1, 4), (shape[0], shape[1] + rng.randint(0, 9), *shape[2:])
    return {".lora_B.weight": numbers(rng, wide[0], r), ".lora_A.weight": numbers(rng, r, *wide[1:]), ".reshape_weight": torch.tensor(wide)}


def loha(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """Both halves plain, or both with cores."""
    r = rng.randint(1, 4)
    if len(shape) > 2 and rng.random() < 0.5:
        half = lambda i: {f".hada_t{i}": numbers(rng, r, r, *shape[2:]), f".hada_w{i}_a": numbers(rng, r, shape[0]), f".hada_w{i}_b": numbers(rng, r, shape[1])}  # noqa: E731
    else:
        half = lambda i: {f".hada_w{i}_a": numbers(rng, shape[0], r), f".hada_w{i}_b": numbers(rng, r, product(shape[1:]))}  # noqa: E731
    return half(1) | half(2) | alpha(rng)


def lokr(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """Each factor whole or a product, the second also with a core."""
    (a, b), (c, d), r = split(rng, shape[0]), split(rng, shape[1]), rng.randint(1, 3)
    first = {".lokr_w1": numbers(rng, a, c)} if rng.random() < 0.5 else {".lokr_w1_a": numbers(rng, a, r), ".lokr_w1_b": numbers(rng, r, c)}
    seconds = [{".lokr_w2": numbers(rng, b, d, *shape[2:])}, {".lokr_w2_a": numbers(rng, b, r), ".lokr_w2_b": numbers(rng, r, d * product(shape[2:]))}]
    if len(shape) > 2:
        seconds.append({".lokr_t2": numbers(rng, r, r, *shape[2:]), ".lokr_w2_a": numbers(rng, r, b), ".lokr_w2_b": numbers(rng, r, d)})
    return first | rng.choice(seconds) | alpha(rng)


def glora(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """In today's layout and in the old one."""
    r, ones, cols = rng.randint(1, 3), [1] * (len(shape) - 2), product(shape[1:])
    if rng.random() < 0.5:
        return {".a1.weight": numbers(rng, shape[1], r, *ones), ".a2.weight": numbers(rng, r, shape[1], *ones),
                ".b1.weight": numbers(rng, shape[0], r, *ones), ".b2.weight": numbers(rng, r, *shape[1:])} | alpha(rng)  # fmt: skip
    return {".a1.weight": numbers(rng, r, cols), ".a2.weight": numbers(rng, cols, r), ".b1.weight": numbers(rng, r, cols), ".b2.weight": numbers(rng, shape[0], r)} | alpha(rng)


def oft(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """With and without a bound on the norm and a rescale."""
    count, size = split(rng, shape[0])
    rescale = {".rescale": 1 + numbers(rng, shape[0], *[1] * (len(shape) - 1))} if rng.random() < 0.3 else {}
    bound = {".alpha": torch.tensor(rng.choice([0.0, 1e-3, 0.1]))} if rng.random() < 0.6 else {}
    return {".oft_blocks": numbers(rng, count, size, size)} | rescale | bound


def boft(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """Stages of even blocks, as many as the rows allow; OFT where they allow none."""
    sizes = [size for size in range(2, shape[0] + 1, 2) if shape[0] % size == 0]
    if not sizes:
        return oft(rng, shape)
    size = rng.choice(sizes)
    stages = next(m for m in range(1, 9) if shape[0] % (size * 2**m))
    return {".oft_blocks": numbers(rng, rng.randint(1, stages), shape[0] // size, size, size)} | ({".alpha": torch.tensor(0.01)} if rng.random() < 0.5 else {})


def peft_oft(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """Exact or as a cut series, a block for each group of inputs or one for all."""
    sizes = [size for size in range(2, product(shape[1:]) + 1) if product(shape[1:]) % size == 0]
    size = rng.choice(sizes)
    count = rng.choice([1, product(shape[1:]) // size])
    return {".oft_angles": numbers(rng, count, size * (size - 1) // 2, size=0.1), ".oft_terms": torch.tensor(rng.choice([0.0, 1.0, 3.0, 5.0]))}


def peft_boft(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """One factor of blocks, and scales as PEFT lays them for linear layers and for convolutions."""
    count, size = split(rng, product(shape[1:]))
    return {".boft_R": numbers(rng, 1, count, size, size), ".boft_s": 1 + numbers(rng, *((shape[0], 1) if len(shape) == 2 else (1, shape[0])))}


def ia3(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """Of inputs and of outputs."""
    axis, ones = rng.randint(0, 1), [1] * max(len(shape) - 2, 0)
    return {".weight": numbers(rng, *(1, shape[axis], *ones) if ones else (shape[axis],)), ".on_input": torch.tensor(axis)}


def transform(rng: random.Random, shape) -> dict[str, torch.Tensor]:
    """Ours: a diagonal or a ring on the inputs, with a pair, a ring or nothing beside it."""
    inp, cols, r = shape[1], product(shape[1:]), rng.randint(1, 3)
    a, b = split(rng, inp)
    T = {".transform.m": 1 + numbers(rng, inp, size=0.1)}
    if rng.random() < 0.5:
        T = {f".transform.core{d}": numbers(rng, n, n, r, r) for d, n in enumerate((a, b))}
    R = {".residual.up": numbers(rng, shape[0], r), ".residual.down": numbers(rng, r, cols), ".residual.scale": torch.tensor(0.5)}
    return T | (R if rng.random() < 0.7 else {})


def whole(ending: str) -> Callable:
    """A tensor of the weight's own shape."""
    return lambda rng, shape: {ending: numbers(rng, *shape)}


def with_magnitudes(kind: Callable) -> Callable:
    """DoRA's magnitudes beside a kind."""
    return lambda rng, shape: kind(rng, shape) | magnitudes(rng, shape)


# kind -> (what writes a layer of it for a weight, the fewest axes such a weight has)
KINDS: dict[str, tuple[Callable, int]] = {
    "low rank": (low_rank, 2), "Tucker": (tucker, 3), "widening": (widening, 2), "LoHa": (loha, 2), "LoKr": (lokr, 2), "GLoRA": (glora, 2),
    "DoRA": (with_magnitudes(low_rank), 2), "DoRA, Tucker": (with_magnitudes(tucker), 3), "DoRA, LoHa": (with_magnitudes(loha), 2),
    "DoRA, LoKr": (with_magnitudes(lokr), 2), "OFT": (oft, 2), "BOFT": (boft, 2), "IA3": (ia3, 2), "transform": (transform, 2),
    "PEFT's OFT": (peft_oft, 2), "PEFT's BOFT": (peft_boft, 2),
    "difference": (whole(".diff"), 1), "norm": (whole(".w_norm"), 1), "replaced": (whole(".set_weight"), 1),
}  # fmt: skip


def layer(rng: random.Random, kind: str, shape) -> dict[str, torch.Tensor]:
    """A layer of a kind for a weight of this shape, by its endings."""
    return KINDS[kind][0](rng, tuple(shape))


def file(rng: random.Random, weights: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A file with a layer of some kind for some of the weights; weights: the layers' names in the file -> the weights' shapes."""
    names, tensors = rng.sample(sorted(weights), rng.randint(1, min(3, len(weights)))), {}
    for name in names:
        shape = tuple(weights[name])
        kind = rng.choice([kind for kind, (_, axes) in KINDS.items() if len(shape) >= axes])
        tensors |= {name + ending: tensor for ending, tensor in layer(rng, kind, shape).items()}
    return tensors
