"""What files written by peft and diffusers keep elsewhere, or under another name, than those of other trainers.

Scale: their layers are scale * B * A with scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (peft's LoraConfig).
peft writes that configuration to `adapter_config.json` beside `adapter_model.safetensors`; diffusers writes it into the
file's metadata, `lora_adapter_metadata`, one set of fields for each component ("unet.lora_alpha"). Here it becomes what
every other trainer writes: an `.alpha` for each layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from .errors import TriLoRAError

IN_METADATA = "lora_adapter_metadata"
BESIDE = {"adapter_model.safetensors": "adapter_config.json"}
_WRAPPER = "base_model.model."  # what peft puts before every module's name
_MAX_BYTES = 2**20


def read_config(path: Path, metadata: Mapping[str, str]) -> dict:
    """The LoraConfig that belongs to a file, {} where there is none. Raises TriLoRAError if it is no JSON object."""
    text, place = metadata.get(IN_METADATA), IN_METADATA
    beside = path.parent / BESIDE.get(path.name, "")
    try:
        if text is None and beside.is_file():
            place = beside.name
            with beside.open("rb") as file:
                text = file.read(_MAX_BYTES)
        config = json.loads(text) if text is not None else {}
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}")
    except (ValueError, RecursionError, OSError) as error:
        raise TriLoRAError(f"{place}: expected a JSON object with the adapter's configuration, got {error}; "
                           "without it the adapter's scale is unknown; copy or download it again") from None
    return config


def alphas(config: Mapping, ranks: Mapping[str, int]) -> dict[str, float]:
    """Layer name -> alpha = rank * scale, for the layers whose scale the configuration sets.

    ranks: layer name in the file -> its rank. Raises TriLoRAError for a scale that is no positive number, and for an
    `alpha_pattern` that is more than the name of a module: patterns of strangers are not run.
    """
    found = {}
    for name, rank in ranks.items():
        component = next((c for c in _components(config) if not c or name.startswith(c)), None)
        if component is None:
            continue
        module = name.removeprefix(component).removeprefix(_WRAPPER)
        alpha = _alpha(config, component, module)
        # 1e19: the square root of what fp32 holds, so that its multiples are finite too
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e19:
            raise TriLoRAError(f"{component}lora_alpha={alpha!r:.40}: expected a positive number; the file is broken")
        found[name] = float(alpha) * (math.sqrt(rank) if config.get(f"{component}use_rslora") else 1.0)
    return found


def _components(config: Mapping) -> list[str]:
    """Prefixes under which there is a LoraConfig: "unet." and the like, or "" for all of the file."""
    return sorted((key.removesuffix("lora_alpha") for key in config if key.endswith("lora_alpha")), reverse=True)


def _alpha(config: Mapping, component: str, module: str):
    patterns = config.get(f"{component}alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise TriLoRAError(f"{component}alpha_pattern={patterns!r:.80}: expected names of modules with their alphas; the file is broken")
    for pattern, alpha in patterns.items():
        literal = pattern.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", literal):
            raise TriLoRAError(f"{component}alpha_pattern={pattern!r}: only names of modules are read; save the adapter without patterns, "
                               "for example by writing each layer's alpha into its tensors")
        if module == literal or (literal == pattern and module.endswith("." + literal)):
            return alpha
    return config[f"{component}lora_alpha"]
