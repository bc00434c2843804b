"""Which of a MODEL's options belong to the model that is trained, and which only act while it samples.

The model: its weights with their patches, its objects (noise schedule, latent format, layers), its plain values (such as
`rope_options`), and the forward passes that injections put on its layers. Not the model: functions that nodes hook into
the denoiser's forward pass or into the sampler, and the attention function, of which not every one has a backward pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping

_ATTENTION = "optimized_attention_override"
_HOOKED = ("patches", "patches_replace", "wrappers", "callbacks", _ATTENTION)
_HOST = ("comfy.", "comfy_api.")
_NAMED = 12  # in one sentence


def model_alone(patcher) -> tuple[dict, list[str]]:
    """(the transformer options that belong to the model, a sentence about what was left out, if anything was).

    Takes functions and compiled modules that stand in the denoiser's place off `patcher`, which must be a clone of one's own.
    """
    options = patcher.model_options.get("transformer_options", {})
    hooked = [patcher.object_patches.pop(name) for name, value in list(patcher.object_patches.items()) if _is_hook(name, value)]
    names = [
        *(_name(value, "a compiled model" if hasattr(value, "_orig_mod") else "forward") for value in hooked),
        *_names_in({key: options[key] for key in _HOOKED if key in options and key != "callbacks"}),
        *_names_in({key: value for key, value in options.items() if key not in _HOOKED and _is_function(value)}),
        *_names_in(getattr(patcher, "wrappers", {})),
        *_names_in({key: value for key, value in patcher.model_options.items() if key != "transformer_options" and _holds_functions(value)}),
    ]
    kept = {key: value for key, value in options.items() if key not in _HOOKED and not _is_function(value)}
    found = list(dict.fromkeys(names))
    if not found:
        return kept, []
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    attention = "; attention is computed by torch" if _ATTENTION in options else ""
    return kept, [f"trained without what acts only in sampling: {', '.join(found[:_NAMED])}{more}{attention}"]


def _is_function(value) -> bool:
    return inspect.isroutine(value) or isinstance(value, functools.partial)


def _holds_functions(value) -> bool:
    return _is_function(value) or (isinstance(value, list) and any(map(_is_function, value)))


def _is_hook(name: str, value) -> bool:
    """Whether an object patch is a forward pass in the place of the denoiser's own."""
    inside = name == "diffusion_model" or name.startswith("diffusion_model.")
    return inside and (_is_function(value) or name.endswith(".forward") or hasattr(value, "_orig_mod"))


def _names_in(hooks: Mapping) -> Iterator[str]:
    """Names of the functions anywhere in nested dictionaries and lists; those of ComfyUI's own go by the key that they are under."""
    for key, value in hooks.items():
        if isinstance(value, Mapping):
            yield from _names_in(value)
            continue
        for function in value if isinstance(value, Iterable) and not callable(value) else [value]:
            yield _name(function, str(key))


def _name(function, key: str) -> str:
    """The node or class whose function it is: the first part of its qualified name."""
    while isinstance(function, functools.partial):
        function = function.func
    named = function if inspect.isroutine(function) else type(function)
    if (getattr(named, "__module__", None) or "").startswith(_HOST):
        return key[:100]
    return named.__qualname__.split(".")[0][:100]
