"""Spellings of a file's keys that mean one thing whatever the model: brought to those that every reader here knows."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .errors import TriLoRAError
from .message_words import short

# XLabs' processors for Flux, which USO uses too
_XLABS = re.compile(
    r"(?:diffusion_model\.)?(double|single)_blocks\.(\d{1,4})\.processor\.(qkv|proj)_lora([12]?)"
    r"\.(?:(up|down)\.weight|alpha)"
)
_XLABS_PARTS = {
    ("double", "qkv", "1"): "img_attn.qkv", ("double", "proj", "1"): "img_attn.proj",
    ("double", "qkv", "2"): "txt_attn.qkv", ("double", "proj", "2"): "txt_attn.proj",
    ("single", "qkv", ""): "linear1_qkv", ("single", "proj", ""): "linear2",
}  # fmt: skip
# a state dict of peft has the adapter's own name in it: `.lora_A.default.weight`, of a parameter `.lora_E.default`
_PEFT = re.compile(
    r"(.+\.lora_(?:[ABE]|magnitude_vector))\.(?!(?:weight|bias)$)(?:(?P<name>[\w-]{1,60})(\.weight)|(?P<own>default))"
)
_LONGEST = 1000  # letters of a key


def known_forms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, XLabs' names as those of the weights they are for, PEFT's without the adapter's own name.

    Raises TriLoRAError where two tensors would get one name.
    """
    named = {key: match for key in tensors if len(key) <= _LONGEST and (match := _PEFT.fullmatch(key))}
    one_adapter = len({match["name"] or match["own"] for match in named.values()}) == 1
    new = {}
    for key in tensors:
        if key in named and one_adapter:
            new[key] = named[key][1] + (named[key][3] or "")
        elif match := _XLABS.fullmatch(key[:_LONGEST]):
            side, number, which, stream, half = match.groups()
            if part := _XLABS_PARTS.get((side, which, stream)):
                ending = f"lora_{half}.weight" if half else "alpha"
                new[key] = f"diffusion_model.{side}_blocks.{number}.{part}.{ending}"
    return renamed(tensors, new)


def renamed(tensors: Mapping[str, Tensor], new: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under other keys; those that `new` does not have keep theirs.

    Raises TriLoRAError where two would get one key.
    """
    found, first = {}, {}
    for key, tensor in tensors.items():
        name = new.get(key, key)
        if name in found:
            both = f"{short(first[name])} and {short(key)}"
            raise TriLoRAError(f"{both} are two names of one tensor, and only one could be used; the file is broken")
        found[name], first[name] = tensor, key
    return found
