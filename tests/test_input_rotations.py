"""PEFT's OFT and BOFT as layers: rotations of the inputs, and what does not make one. PEFT's own files: host/test_compatibility.py."""

import pytest
import torch
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.files.kinds import read_layer

WEIGHT = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def draw(*shape, seed=0):
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def oft(angles, terms=0.0):
    return read_layer("x", {".oft_angles": angles, ".oft_terms": torch.tensor(terms)}).weight


def boft(blocks, scales):
    return read_layer("x", {".boft_R": blocks, ".boft_s": scales}).weight


def test_rows_keep_their_lengths():
    changed = oft(draw(3, 6)).changed(WEIGHT)
    torch.testing.assert_close(changed.norm(dim=1), WEIGHT.norm(dim=1))
    assert not torch.allclose(changed, WEIGHT, atol=1e-2)
    scales = 1 + draw(5, 1)
    torch.testing.assert_close(boft(draw(1, 3, 4, 4), scales).changed(WEIGHT).norm(dim=1), (scales[:, 0] * WEIGHT.norm(dim=1)).abs())


def test_a_block_turns_its_own_inputs():
    angles = torch.zeros(3, 6)
    angles[1] = draw(6)
    delta = oft(angles).delta(WEIGHT)
    assert delta[:, 4:8].any() and not delta[:, :4].any() and not delta[:, 8:].any()


def test_one_block_for_all_is_the_same_for_each():
    angles = draw(1, 6)
    torch.testing.assert_close(oft(angles).delta(WEIGHT), oft(angles.expand(3, 6).contiguous()).delta(WEIGHT))


def test_convolutions_turn_inputs_and_kernel_together():
    angles = draw(3, 6)
    torch.testing.assert_close(oft(angles).delta(WEIGHT.view(5, 3, 2, 2)).reshape(5, 12), oft(angles).delta(WEIGHT))


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 6])
def test_the_cut_series(terms):
    """I + 2 Q + 2 Q^2 + ... + Q^(n - 1), of three terms as of four; of very many the other way round of what is exact."""
    skew = torch.zeros(1, 4, 4)
    rows, columns = torch.triu_indices(4, 4, 1)
    skew[:, rows, columns] = angles = draw(1, 6)
    skew = skew - skew.transpose(-1, -2)
    powers = [torch.linalg.matrix_power(skew[0], n) for n in range(max(terms, 4))]
    wanted = powers[0] + (2 * powers[1] if terms == 2 else 0) if terms < 3 else powers[0] + 2 * sum(powers[1:-1]) + powers[-1]
    torch.testing.assert_close(oft(angles, float(terms)).rotation(WEIGHT)[0], wanted)
    torch.testing.assert_close(oft(0.1 * angles, 40.0).rotation(WEIGHT), oft(-0.1 * angles).rotation(WEIGHT))


@pytest.mark.parametrize(
    "read",
    [lambda: oft(draw(3, 5)), lambda: oft(draw(6)), lambda: oft(draw(3, 6), 0.5), lambda: oft(draw(3, 6), 1e9), lambda: oft(torch.zeros(3, 6, dtype=torch.int64)),
     lambda: boft(draw(2, 3, 4, 4), draw(5, 1)), lambda: boft(draw(1, 3, 4, 3), draw(5, 1)), lambda: boft(draw(3, 4, 4), draw(5, 1)),
     lambda: boft(draw(1, 3, 4, 4), torch.tensor(1.0)), lambda: boft(draw(1, 3, 4, 4), draw(5, 2)), lambda: read_layer("x", {".boft_R": draw(1, 3, 4, 4)}),
     lambda: read_layer("x", {".oft_angles": draw(3, 6)}), lambda: read_layer("x", {".oft_terms": torch.tensor(0.0)})],
)  # fmt: skip
def test_what_makes_no_layer_is_refused(read):
    with pytest.raises(TriLoRAError, match=r"x\.b?oft_"):
        read()


@pytest.mark.parametrize("shape", [(5, 10), (5, 24), (5,), (6, 12), (5, 12, 2)])
def test_what_does_not_fit_the_weight_is_refused(shape):
    with pytest.raises(TriLoRAError, match="made for another model"):
        boft(draw(1, 3, 4, 4), draw(5, 1)).check(shape)
    if shape != (6, 12):
        with pytest.raises(TriLoRAError, match="made for another model"):
            oft(draw(3, 6)).check(shape)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("make", [lambda n: oft(torch.full((3, 6), n), 5.0), lambda n: boft(draw(1, 3, 4, 4), torch.full((5, 1), n))])
def test_numbers_that_overflow_are_refused(make, broken):
    with pytest.raises(TriLoRAError):
        make(broken).check_finite()


def test_a_rotation_that_fp32_does_not_find_is_refused():
    """Angles that differ too much in size: the blocks that come out would stretch the weight."""
    angles = torch.tensor([[1e6, 1.0, 1e-3, 1e5, 1e-6, 3e6]])
    try:
        oft(angles).check_finite()
    except TriLoRAError as refused:
        assert "beyond" in str(refused)
    else:
        changed = oft(angles).changed(WEIGHT)
        torch.testing.assert_close(changed.norm(dim=1), WEIGHT.norm(dim=1), rtol=2e-3, atol=0)
