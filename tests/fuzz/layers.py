"""The property that every file has: a layer of it is refused in one sentence, or it computes to finite numbers of the
right shape."""

import time
from collections.abc import Mapping

import torch

LONGEST, SLOWEST = 1000, 2.0  # letters of a message, seconds for a file


def check(
    kinds, error: type[Exception], tensors: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> int:
    """How many layers of a file were accepted. Raises AssertionError where one was and does not compute, or was
    refused otherwise than in one sentence.

    kinds: the pack's `files.kinds`; error: its TriLoRAError; weights: layer's name -> the weight it is for. Layers
    with other names are only read.
    """
    accepted, start = 0, time.perf_counter()
    before = {name: weight.clone() for name, weight in weights.items()}
    grouped, _ = kinds.by_layer(tensors)
    for name, found in grouped.items():
        try:
            read = kinds.read_layer(name, found)
            layers = [layer for layer in (read.weight, read.bias) if layer is not None]
            for layer in layers:
                layer.check_finite()
                if name in weights:
                    layer.check(weights[name].shape if layer is read.weight else weights[name].shape[:1])
        except error as refused:
            assert 20 < len(str(refused)) <= LONGEST, f"a message of {len(str(refused))} letters"
            continue
        for layer in layers if name in weights else ():
            computes(
                layer,
                weights[name] if layer is read.weight else weights[name].reshape(len(weights[name]), -1)[:, 0].clone(),
            )
            accepted += 1
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items()), "a weight was changed"
    assert time.perf_counter() - start <= SLOWEST, f"took {time.perf_counter() - start:.1f} s"
    return accepted


@torch.no_grad()
def computes(layer, weight: torch.Tensor) -> None:
    """Assert that the layer's change of a weight is finite, has the right shape, and that a share of it is a share
    wherever one can be written."""
    wide = layer.widened(weight)
    assert tuple(wide.shape) == (layer.new_shape() or tuple(weight.shape))
    if layer.LABEL == "transform":
        from comfyui_trilora.trilora_ops.adapter import LayerShape

        delta = layer.adapter(LayerShape(*weight.shape[:2], tuple(weight.shape[2:]))).delta(weight)
    else:
        delta = layer.delta(weight)
        assert delta.shape == wide.shape
    assert torch.isfinite(delta).all(), f"{layer.kind} is not finite"
    if not layer.fixed:
        share = type(layer).read(
            layer.name,
            {ending: tensor for ending, tensor in layer.scaled(-0.5).items() if ending != ".alpha"},
            _alpha(layer.scaled(-0.5)),
        )
        if layer.LABEL != "transform":
            torch.testing.assert_close(
                share.delta(weight), -0.5 * delta, rtol=2e-2, atol=2e-2 * float(delta.abs().max()) + 1e-20
            )


def _alpha(tensors) -> float | None:
    return float(tensors[".alpha"]) if ".alpha" in tensors else None
