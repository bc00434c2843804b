"""Kernels of ComfyUI that came before its own way of leaving them out for training get a backward pass."""

import pytest
import torch


def plain(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding by its formula, y_i = F_ij x_j on every pair of channels."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.einsum("...ij,...j->...i", frequencies, pairs).flatten(-2)


@pytest.mark.parametrize("heads_of_k", [2, 3])
def test_rotary_embeddings_have_the_gradient_of_their_formula(pack_module, host_nodes, heads_of_k):
    kitchen = getattr(torch.ops, "comfy_kitchen", None)
    if not hasattr(kitchen, "apply_rope1"):
        pytest.skip("this host has no such kernels")
    pack_module("nodes.kernel_gradients").add_rope_gradients()
    pack_module("nodes.kernel_gradients").add_rope_gradients()  # as every run does
    angles = torch.rand(1, 1, 5, 4)
    turn = torch.stack([angles.cos(), -angles.sin(), angles.sin(), 2 * angles.cos()], dim=-1).unflatten(-1, (2, 2))  # no rotation: F and Ft differ
    q, k = torch.randn(2, 2, 5, 8, requires_grad=True), torch.randn(2, heads_of_k, 5, 8, requires_grad=True)
    probes = torch.randn_like(q), torch.randn_like(k)

    def gradients(outputs):
        return torch.autograd.grad(sum((y * probe).sum() for y, probe in zip(outputs, probes, strict=True)), (q, k))

    expected = gradients((plain(q, turn), plain(k, turn)))
    for outputs in ((kitchen.apply_rope1(q, turn), kitchen.apply_rope1(k, turn)), kitchen.apply_rope(q, k, turn)):
        for grad, wanted in zip(gradients(outputs), expected, strict=True):
            torch.testing.assert_close(grad, wanted)


def test_a_run_gives_them_where_the_host_does_not_leave_them_out(pack_module, host_nodes, monkeypatch):
    """The feature, not the version, decides."""
    import comfy.model_management

    compat, asked = pack_module("nodes.compat"), []
    monkeypatch.setattr(compat, "add_rope_gradients", lambda: asked.append(1))
    with compat.training_kernels():
        pass
    assert len(asked) == (not hasattr(comfy.model_management, "in_training"))
