"""Transforms and the tensor-ring residual against their dense formulas, their published sizes and their starts."""

import math

import pytest
import torch
from comfyui_trilora.trilora_ops.adapter import LayerShape
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.registry import Method, read_part
from comfyui_trilora.trilora_ops.residuals.lora import LoraConfig
from comfyui_trilora.trilora_ops.residuals.none import NoResidualConfig
from comfyui_trilora.trilora_ops.residuals.tensor_ring import TensorRingResidualConfig
from comfyui_trilora.trilora_ops.tensorisation import TABLE, factorise
from comfyui_trilora.trilora_ops.transforms.block_orthogonal import BlockOrthogonalConfig
from comfyui_trilora.trilora_ops.transforms.diagonal import DiagonalConfig
from comfyui_trilora.trilora_ops.transforms.none import NoTransformConfig
from comfyui_trilora.trilora_ops.transforms.tensor_ring import TensorRingConfig, ring_product
from torch import nn

# (input, output) of every attention layer: hidden sizes with their number of blocks, width of the text context
SD15 = ([(320, 5), (640, 5), (1280, 6)], 768)
SDXL = ([(640, 10), (1280, 60)], 2048)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def attention(model):
    sizes, context = model
    for hidden, blocks in sizes:
        for _ in range(blocks):
            yield from [(hidden, hidden)] * 6 + [(context, hidden)] * 2


def parameters(method, model) -> int:
    """Trained numbers over all attention layers, built on `meta` weights."""
    count = {}
    for inp, out in set(attention(model)):
        adapter = method.build(nn.Linear(inp, out, bias=False, device="meta"), torch.empty(0), generator())
        count[inp, out] = sum(p.numel() for p in adapter.parameters())
    return sum(count[size] for size in attention(model))


@pytest.mark.parametrize(
    ("model", "transform", "residual", "millions"),
    [(SD15, None, LoraConfig(4), 0.797), (SD15, TensorRingConfig(2), TensorRingResidualConfig(6), 0.400),
     (SD15, TensorRingConfig(2), LoraConfig(4), 0.941), (SDXL, None, LoraConfig(1), 1.452),
     (SDXL, TensorRingConfig(1), TensorRingResidualConfig(2), 0.397), (SDXL, TensorRingConfig(1), LoraConfig(1), 1.697),
     (SDXL, TensorRingConfig(1), TensorRingResidualConfig(1), 0.283), (SDXL, TensorRingConfig(1), TensorRingResidualConfig(4), 0.850),
     (SDXL, TensorRingConfig(2), TensorRingResidualConfig(2), 1.133), (SDXL, TensorRingConfig(2), TensorRingResidualConfig(4), 1.587),
     (SDXL, None, TensorRingResidualConfig(2), 0.151), (SDXL, TensorRingConfig(1), NoResidualConfig(), 0.246)],
    ids=["sd15-lora4", "sd15-tlora-2-6", "sd15-tlora*-2-4", "sdxl-lora1", "sdxl-tlora-1-2", "sdxl-tlora*-1-1", "sdxl-tlora-1-1",
         "sdxl-tlora-1-4", "sdxl-tlora-2-2", "sdxl-tlora-2-4", "sdxl-ring-2", "sdxl-kronecker"],
)  # fmt: skip
def test_published_parameter_counts(model, transform, residual, millions):
    """TLoRA(R_T, R) = ring transform and ring residual, TLoRA*(R_T, r) = ring transform and LoRA (arXiv:2501.08727)."""
    method = Method(residual, transform or NoTransformConfig())
    assert round(parameters(method, model) / 1e6, 3) == millions


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 4), (1, 5, 2), (7,)], ids=str)
def test_ring_product_is_the_dense_matrix(sizes, rank):
    """T[i, j] = tr(A1[i1, j1] .. AD[iD, jD]) with C-ordered indices, entry by entry."""
    cores = [torch.randn(s, s, rank, rank, generator=generator(d), dtype=torch.float64) for d, s in enumerate(sizes)]
    J = math.prod(sizes)
    T = torch.empty(J, J, dtype=torch.float64)
    for i in range(J):
        for j in range(J):
            product = torch.eye(rank, dtype=torch.float64)
            for core, a, b in zip(cores, torch.unravel_index(torch.tensor(i), sizes), torch.unravel_index(torch.tensor(j), sizes), strict=True):
                product = product @ core[a, b]
            T[i, j] = product.trace()
    x = torch.randn(5, J, generator=generator(9), dtype=torch.float64)
    torch.testing.assert_close(ring_product(cores, x), x @ T.t())


def test_ring_residual_is_the_dense_trace():
    shape = LayerShape(12, 10)
    residual = TensorRingResidualConfig(3, factors_out=(3, 4), factors_in=(2, 5)).build(shape, torch.empty(0), generator())
    for d, parameter in enumerate(residual.parameters()):
        parameter.data.normal_(generator=generator(d))
    cores = [core.detach() for core in residual.parameters()]
    dense = residual.scale * torch.einsum("apq,bqr,crs,dsp->abcd", *cores).reshape(12, 10)
    torch.testing.assert_close(residual.delta().detach(), dense, rtol=1e-5, atol=1e-5)
    assert residual.rank == 9


@pytest.mark.parametrize(
    ("config", "exact"),
    [(TensorRingConfig(1), True), (TensorRingConfig(2, ring_init="paper"), True), (TensorRingConfig(2), True),
     (TensorRingConfig(4), True), (TensorRingConfig(3, ring_init="paper"), False), (DiagonalConfig(), True), (BlockOrthogonalConfig(8), True)],
    ids=["R1", "R2-paper", "R2-asym", "R4-asym", "R3-paper", "diagonal", "orthogonal"],
)  # fmt: skip
def test_every_transform_starts_at_the_identity(config, exact):
    """Exactly, but for the published ring start with R >= 3, which has fp32 rounding (<= 5e-6)."""
    transform = config.build(LayerShape(5, 48), torch.empty(0), generator())
    eye = torch.eye(48)
    found = transform.rows(eye).detach()
    assert torch.equal(found, eye) if exact else (found - eye).abs().max() <= 5e-6


def test_the_published_start_locks_a_ring_of_rank_2_and_ours_does_not():
    """All slices of a core start equal, so their gradients are equal and T stays a Kronecker product; `asym` breaks that."""
    target = torch.randn(64, 64, generator=generator(1)) * 0.2 + torch.eye(64)
    spread = {}
    for init in ("paper", "asym"):
        transform = TensorRingConfig(2, (4, 4, 4), init).build(LayerShape(1, 64), torch.empty(0), generator())
        optimizer = torch.optim.Adam(transform.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            (transform.rows(torch.eye(64)) - target.t()).square().mean().backward()
            optimizer.step()
        slices = transform.core1.detach().flatten(2)
        spread[init] = float((slices - slices[..., :1]).abs().max())
    assert spread["paper"] == 0 and spread["asym"] > 0.1


def test_a_block_orthogonal_transform_is_orthogonal_and_block_diagonal():
    transform = BlockOrthogonalConfig(8).build(LayerShape(3, 24), torch.empty(0), generator())
    transform.skew.data.normal_(generator=generator(2))
    T = transform.rows(torch.eye(24)).t().detach()
    torch.testing.assert_close(T @ T.t(), torch.eye(24), atol=1e-5, rtol=0)
    assert not (T * (1 - torch.block_diag(*[torch.ones(8, 8)] * 3))).any() and (T - torch.eye(24)).abs().max() > 0.1


def test_penalties():
    """identity: sum_d |A_d - its start|^2; orthogonal: |T Tt - I|^2 / J; both 0 at the start."""
    transform = TensorRingConfig(2, (3, 4), identity_penalty=0.5, orthogonal_penalty=2.0).build(LayerShape(5, 12), torch.empty(0), generator())
    assert transform.penalty() == 0
    starts = [core.detach().clone() for core in transform.cores]
    for d, core in enumerate(transform.cores):
        core.data += 0.1 * torch.randn(core.shape, generator=generator(d))
    T = transform.rows(torch.eye(12)).t()
    expected = 0.5 * sum((core - start).square().sum() for core, start in zip(transform.cores, starts, strict=True))
    expected = expected + 2.0 * (T @ T.t() - torch.eye(12)).square().sum() / 12
    torch.testing.assert_close(transform.penalty(), expected, rtol=1e-4, atol=1e-6)


def test_factors():
    """The published table, its balanced continuation, and padding with ones; always ascending with the right product."""
    assert {size: factorise(size) for size in TABLE} == TABLE
    assert [factorise(n) for n in (1024, 1536, 2432, 3072, 4096)] == [(8, 8, 16), (8, 12, 16), (8, 16, 19), (12, 16, 16), (16, 16, 16)]
    assert factorise(13) == (1, 1, 13) and factorise(77) == (1, 7, 11) and factorise(12, 2) == (3, 4)
    for size in range(1, 200):
        factors = factorise(size)
        assert math.prod(factors) == size and list(factors) == sorted(factors)


@pytest.mark.parametrize(
    ("part", "tensors", "words"),
    [("transform", {"core0": torch.zeros(3, 3, 2, 2), "core1": torch.zeros(5, 5, 2, 2)}, "multiply to 15, but the layer's input size is 12"),
     ("transform", {"core0": torch.zeros(12, 12, 2, 3)}, "expected (J, J, R, R)"), ("transform", {"m": torch.ones(11)}, "expected (12,)"),
     ("transform", {"skew": torch.zeros(3, 5)}, "expected (blocks, b (b - 1) / 2)"), ("transform", {"other": torch.ones(12)}, "no kind reads"),
     ("residual", {"up": torch.zeros(5, 2), "down": torch.zeros(3, 12), "scale": torch.ones(())}, "expected (5, r) and (r, 12)"),
     ("residual", {"core0": torch.zeros(5, 2, 2), "core1": torch.zeros(6, 2, 2)}, "do not multiply to the layer's 5 and 12")],
    ids=["factors", "ring-shape", "diagonal", "skew", "unknown", "low-rank", "ring-residual"],
)  # fmt: skip
def test_malformed_tensors_are_refused(part, tensors, words):
    with pytest.raises(TriLoRAError) as error:
        read_part(part, LayerShape(5, 12), tensors)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda: TensorRingConfig(0), "ring_rank=0"), (lambda: TensorRingConfig(1, ring_init="other"), "ring_init='other'"),
     (lambda: TensorRingConfig(1, identity_penalty=-1.0), "identity_penalty=-1.0"), (lambda: BlockOrthogonalConfig(1), "block=1"),
     (lambda: TensorRingResidualConfig(0), "rank=0"), (lambda: TensorRingResidualConfig(2, alpha=0.0), "alpha=0.0"),
     (lambda: TensorRingResidualConfig(2, scaling="cube"), "scaling='cube'"),
     (lambda: TensorRingConfig(1, (3, 5)).build(LayerShape(5, 12), torch.empty(0), generator()), "use 3x4")],
    ids=["ring-rank", "init", "penalty", "block", "rank", "alpha", "scaling", "factors"],
)  # fmt: skip
def test_bad_options_are_refused(make, words):
    with pytest.raises(TriLoRAError) as error:
        make()
    assert words in str(error.value)
