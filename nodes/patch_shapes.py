"""Whether a file's layers fit the weights they are for, of every kind that the host reads, before any of it is applied."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..trilora_ops.adapter import LayerShape
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.naming import split_target
from .comfy_transforms import TransformPatch


def target_shapes(model, clip) -> dict[str, torch.Size]:
    """Shape of every weight of a MODEL and an optional CLIP, by the host's target key."""
    # parameters, not the state dict: a quantised layer's state dict holds its packed storage
    shapes = {key: tensor.shape for key, tensor in model.model.named_parameters(remove_duplicate=False)}
    if clip is not None:
        shapes |= {key: tensor.shape for key, tensor in clip.cond_stage_model.named_parameters(remove_duplicate=False)}
    return shapes


def check_shape(name: str, target, patch, shapes: Mapping[str, torch.Size]) -> None:
    """Raise TriLoRAError where the layer that `patch` holds is not the size of its target.

    name: the file's; target: the host's key, or a tuple of it, a slice (axis, start, length) and a function. Weights that
    are not in `shapes`, and layers that give a weight a new shape, are let through.
    """
    key, offset, _ = split_target(target)
    if key not in shapes:
        return
    expected = list(shapes[key])
    if offset is not None:
        expected[offset[0]] = offset[2]
    try:
        if isinstance(patch, TransformPatch):
            _check_transform(patch, expected)
        elif isinstance(patch, WeightAdapterBase) and patch.name in _KINDS:
            size, magnitudes = _KINDS[patch.name]
            if patch.name == "lora" and patch.weights[5] is not None and any(n < m for n, m in zip(patch.weights[5], expected, strict=False)):
                raise TriLoRAError(f"gives it the shape {tuple(patch.weights[5])}, smaller than {tuple(expected)}; it was made for another model")
            if offset is not None and patch.name == "lora" and patch.weights[5] is not None:
                raise TriLoRAError("gives a new shape to a part of a fused weight, which cannot be done; leave this file out")
            _check_size(size(patch.weights), expected)
            if patch.name == "glora":
                _check_inputs(_either_way(*patch.weights[:2]), expected)
            _check_magnitudes(patch.weights[magnitudes], expected)
        elif isinstance(patch, tuple) and len(patch[1]) == 1 and list(patch[1][0].shape) != expected:
            raise TriLoRAError(f"is {tuple(patch[1][0].shape)}, expected {tuple(expected)}; it was made for another model")
    except TriLoRAError as error:
        raise TriLoRAError(f"{name}: its layer for {key} {error}; nothing was applied") from None


def _check_transform(patch: TransformPatch, expected: list[int]) -> None:
    if len(expected) < 2:
        raise TriLoRAError(f"is a transform, and the weight is {tuple(expected)}, not a matrix; it was made for another model")
    try:
        patch.adapter(LayerShape(expected[0], expected[1], tuple(expected[2:])), torch.device("cpu"))
    except TriLoRAError as error:
        raise TriLoRAError(f"cannot be read: {error}") from None


def _check_size(got: tuple[int, int | None] | None, expected: list[int]) -> None:
    wanted = (expected[0], torch.Size(expected[1:]).numel())
    if got is not None and (got[0] != wanted[0] or got[1] not in (None, wanted[1])):
        shown, wanted = (got[:1], wanted[:1]) if got[1] is None else (got, wanted)
        raise TriLoRAError(f"is {shown}, expected {wanted}; it was made for another model")


def _check_inputs(got: tuple[int, int], expected: list[int]) -> None:
    """GLoRA's first pair, which mixes the inputs: a convolution's channels, or its columns as LyCORIS once wrote it."""
    channels, columns = expected[1], torch.Size(expected[1:]).numel()
    if got not in ((channels, channels), (columns, columns)):
        raise TriLoRAError(f"has a first pair of {got} that mixes {channels} inputs, expected {(channels, channels)}; the file is broken")


def _check_magnitudes(dora_scale: Tensor | None, expected: list[int]) -> None:
    rows, columns = ([n if axis == kept else 1 for axis, n in enumerate(expected)] for kept in (0, 1))
    if dora_scale is not None and list(dora_scale.shape) not in (rows, columns):
        raise TriLoRAError(f"has a dora_scale of {tuple(dora_scale.shape)}, expected {tuple(rows)} or {tuple(columns)}; the file is broken")


def _product(a: Tensor, b: Tensor) -> tuple[int, int]:
    if a.ndim < 2 or b.ndim < 2 or a.flatten(1).shape[1] != b.shape[0] or b.shape[0] == 0:
        raise TriLoRAError(f"has factors of {tuple(a.shape)} and {tuple(b.shape)}, which cannot be multiplied; the file is broken")
    return a.shape[0], b.flatten(1).shape[1]


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> tuple[int, int]:
    """core (r, s, *kernel), a (r, rows), b (s, columns): core times both, one row per column of a."""
    if core.ndim < 3 or a.ndim < 2 or b.ndim < 2 or core.shape[:2] != (a.shape[0], b.shape[0]):
        raise TriLoRAError(f"has a core of {tuple(core.shape)} between factors of {tuple(a.shape)} and {tuple(b.shape)}; the file is broken")
    return a.shape[1], b.shape[1] * core.shape[2:].numel()


def _lora(weights) -> tuple[int, int] | None:
    up, down, _, mid, _, reshape = weights
    if reshape is not None:
        return None  # the weight takes this shape
    return _product(up, down) if mid is None else _tucker(mid, up.flatten(1).t(), down)


def _loha(weights) -> tuple[int, int]:
    a1, b1, _, a2, b2, core1, core2, _ = weights
    first, second = (_product(a1, b1), _product(a2, b2)) if core1 is None else (_tucker(core1, a1, b1), _tucker(core2, a2, b2))
    if first != second:
        raise TriLoRAError(f"has halves of {first} and {second}, which must be of one size; the file is broken")
    return first


def _lokr(weights) -> tuple[int, int]:
    w1, w2, _, a1, b1, a2, b2, core, _ = weights
    if (w1 is None and (a1 is None or b1 is None)) or (w2 is None and (a2 is None or b2 is None)):
        raise TriLoRAError("lacks a factor of its Kronecker product; the file is incomplete")
    if any(whole is not None and whole.ndim < 2 for whole in (w1, w2)):
        raise TriLoRAError("has a factor of its Kronecker product that is no matrix; the file is broken")
    left = tuple(w1.flatten(1).shape) if w1 is not None else _product(a1, b1)
    if w2 is not None:
        right = tuple(w2.flatten(1).shape)
    else:
        right = _product(a2, b2) if core is None else _tucker(core, a2, b2)
    return left[0] * right[0], left[1] * right[1]


def _glora(weights) -> tuple[int, int]:
    return _either_way(*weights[2:4])


def _either_way(first: Tensor, second: Tensor) -> tuple[int, int]:
    # LyCORIS once wrote the two the other way round; the longer one is (out, r)
    return _product(first, second) if first.shape[0] >= second.shape[0] else _product(second, first)


def _blocks(blocks: Tensor, axes: int) -> tuple[int, None]:
    """Square blocks (.., count, b, b) make count * b rows."""
    if blocks.ndim != axes or blocks.shape[-1] != blocks.shape[-2]:
        raise TriLoRAError(f"has blocks of {tuple(blocks.shape)}, which are not square; the file is broken")
    return blocks.shape[-3] * blocks.shape[-1], None


# the host's name of a kind -> (its size in rows and columns, None where it fits any; where among its tensors DoRA's magnitudes are)
_KINDS = {
    "lora": (_lora, 4), "loha": (_loha, 7), "lokr": (_lokr, 8), "glora": (_glora, 5),
    "oft": (lambda weights: _blocks(weights[0], 3), 3),
    "boft": (lambda weights: _blocks(weights[0], 4), 3),
}  # fmt: skip
