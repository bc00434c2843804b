"""Which of a MODEL's options belong to the model that is trained, and which only act while it samples.

The model: its weights with their patches, its objects (noise schedule, latent format, layers), its plain values (such as
`rope_options`), and the forward passes that injections put on its layers. Not the model: functions that nodes hook into
the denoiser's forward pass or into the sampler, or run when sampling begins, and the attention function, of which not
every one has a backward pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping

from comfy.patcher_extension import CallbacksMP

from ..trilora_ops.message_words import few

_ATTENTION = "optimized_attention_override"
_HOOKED = ("patches", "patches_replace", "wrappers", "callbacks", _ATTENTION)  # of the transformer options
_OF_RUNS = (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP)
_APPLIES = ("apply_model", "_apply_model")  # the model's own functions around the denoiser
_HOST = ("comfy.", "comfy_api.")
_NAMED = 12  # in one sentence


def model_alone(patcher) -> tuple[dict, list[str]]:
    """(the transformer options that belong to the model, a sentence about what was left out, if anything was).

    Takes off `patcher`, which must be a clone of one's own, what stands in the place of the denoiser's own functions and what
    it would call when a run begins and ends.
    """
    options = patcher.model_options.get("transformer_options", {})
    hooked = {name: value for name, value in patcher.object_patches.items() if _is_hook(name, value)}
    for name in hooked:
        del patcher.object_patches[name]
    hooks = [
        hooked,
        {key: value for key, value in options.items() if key in _HOOKED or callable(value)},
        getattr(patcher, "wrappers", {}),
        {kind: patcher.callbacks.pop(kind) for kind in _OF_RUNS if patcher.callbacks.get(kind)},
        {
            key: value
            for key, value in patcher.model_options.items()
            if key != "transformer_options" and _holds_functions(value)
        },
    ]
    kept = {key: value for key, value in options.items() if key not in _HOOKED and not callable(value)}
    found = list(dict.fromkeys(name for each in hooks for name in _names_in(each)))
    if not found:
        return kept, []
    attention = "; attention is computed by torch" if _ATTENTION in options else ""
    return kept, [
        f"trained on the model alone, without what nodes hook into it for sampling: {few(found, _NAMED)}{attention}"
    ]


def _holds_functions(value) -> bool:
    return callable(value) or (isinstance(value, list) and any(map(callable, value)))


def _is_hook(name: str, value) -> bool:
    """Whether an object patch is a forward pass in the place of the denoiser's own."""
    inside = name in ("diffusion_model", *_APPLIES) or name.startswith("diffusion_model.")
    function = inspect.isroutine(value) or isinstance(value, functools.partial)
    return inside and (function or name.endswith(".forward") or hasattr(value, "_orig_mod"))


def _names_in(hooks, key: str = "") -> Iterator[str]:
    """Names of the functions anywhere in nested dictionaries and lists; those of ComfyUI's own go by the key that they are under."""
    if isinstance(hooks, Mapping):
        for inner, value in hooks.items():
            yield from _names_in(value, str(inner or key))
    elif isinstance(hooks, (list, tuple)):
        for value in hooks:
            yield from _names_in(value, key)
    elif callable(hooks) and not isinstance(hooks, type):  # a class says what a function is for
        yield _name(hooks, key)


def _name(function, key: str) -> str:
    """The node or class whose function it is: the first part of its qualified name."""
    if hasattr(function, "_orig_mod"):
        return "torch.compile"
    while isinstance(function, functools.partial):
        function = function.func
    named = function if inspect.isroutine(function) else type(function)
    if (getattr(named, "__module__", None) or "").startswith(_HOST):
        return key[:100]
    return named.__qualname__.split(".")[0][:100]
