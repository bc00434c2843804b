"""What the tensors of peft's tuners mean, said as other trainers say it, or why they are not read.

LoRA is scale * B A with scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`, and with `lora_bias` the same
scale times a bias. AdaLoRA is lora_alpha / (init_r + 1e-5) * B diag(E) A whatever its rank has become. LoHa and LoKr are
alpha / r times their product; LoKr also where both factors are whole, where other trainers have no scale. (Source: the
`update_layer` and `get_delta_weight` of each in peft 0.21.) Here all of it goes into the tensors: an `.alpha` for each
layer, E into A, the bias as `.diff_b`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import TriLoRAError
from .files.input_rotations import ANGLES, MOST_TERMS, TERMS
from .files.kinds import KINDS, split_key
from .files.low_rank import PAIRS
from .peft_config import WRAPPER, Component, component_of, shown

# tuners whose tensors are read, by peft's names
READ = {"LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT"}
# the others: peft's name -> what they do
REFUSED = {
    "ADAMSS": "trains parts of the weight's own subspaces", "BEFT": "trains biases alone", "C3A": "adds circulant blocks",
    "DEFT": "projects the model's own weights", "DELORA": "adds low-rank factors of fixed norms",
    "FOURIERFT": "adds frequencies at places drawn from a seed", "FROD": "adds random matrices shared by all layers",
    "GLORA": "scales the model's own weights and adds to them", "GRALORA": "adds low-rank blocks",
    "HIRA": "multiplies the model's own weights", "HRA": "reflects the model's own weights", "IA3": "scales the model's activations",
    "LILY": "mixes factors by the input", "LN_TUNING": "replaces whole layers", "BONE": "adds blocks that depend on the layer's size",
    "MISS": "adds blocks that depend on the layer's size", "OSF": "replaces a part of the weight's singular values",
    "PEANUT": "computes the change from the model's own weights", "POLY": "mixes factors by the task",
    "PSOFT": "rotates inside the weight's own subspace", "PVERA": "adds random matrices shared by all layers",
    "RANDLORA": "adds random matrices shared by all layers", "ROAD": "rotates and scales the model's activations",
    "SHADOW": "runs a second model beside the first", "SHIRA": "adds single entries", "SUPERTUNING": "adds single entries",
    "TINYLORA": "adds random matrices shared by all layers", "TRAINABLE_TOKENS": "trains embeddings of single tokens",
    "UNILORA": "puts factors together from one vector", "VBLORA": "puts factors together from a bank of vectors",
    "VERA": "adds random matrices shared by all layers", "WAVEFT": "adds wavelets at places drawn from a seed",
    "XLORA": "mixes adapters by the input",
}  # fmt: skip
# parameters of those, and of those that are read, in the names of tensors
_MARK = re.compile(rf"(?:^|\.)({'|'.join(REFUSED).lower()})_")
_OURS = re.compile(r"\.(?:lora|hada|lokr|oft|boft)_[^.]+(?:\.[^.]+)?\.(?:weight|bias)$")
# what LoRA's options need in training alone
_OF_TRAINING = re.compile(r"\.lora_(?:velora|monteclora)_")
# starts that take something out of the model's own weights, so that B A is not what the adapter adds to them
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN_STARTS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
# options of LoRA that make it another kind
_VARIANTS = {
    "alora_invocation_tokens": "acts on the tokens behind an invocation alone", "arrow_config": "mixes adapters by the input",
    "kasa_config": "takes singular values out of the model's own weights", "layer_replication": "repeats layers of the model",
    "target_parameters": "adapts parameters that are no layers", "use_bdlora": "has factors in blocks",
    "use_qalora": "adds up its inputs in groups", "fan_in_fan_out": "has weights the other way round",
}  # fmt: skip
_REMEDY = "merge it into its model with peft instead; nothing was applied"


def translate(tensors: dict[str, Tensor], components: list[Component]) -> list[str]:
    """Change peft's tensors, in place, to what they mean to other readers; returns what a person should know of the file.

    Raises TriLoRAError for what is not read, with the reason.
    """
    notes = [note for component in components for note in _check(component)]
    _refuse_unread(tensors)
    for key in [key for key in tensors if _OF_TRAINING.search(key)]:
        del tensors[key]
    _adalora(tensors, components)
    _low_rank(tensors, components)
    _loha(tensors, components)
    _lokr(tensors, components)
    _oft(tensors, components)
    return notes + _whole(tensors, components) + _without_scale(tensors, components)


def _check(component: Component) -> list[str]:
    tuner = component.tuner
    if tuner not in READ:
        raise TriLoRAError(
            f"an adapter of the kind {tuner} of peft, which {REFUSED.get(tuner, 'this release does not know')}, is not read; {_REMEDY}"
        )
    if tuner not in ("LORA", "ADALORA"):
        return []
    for option, does in _VARIANTS.items():
        if component.fields.get(option):
            raise TriLoRAError(f"a LoRA of peft with {component.prefix}{option}, which {does}, is not read; {_REMEDY}")
    start = shown(component.fields.get("init_lora_weights")).lower()
    if start.startswith(_BASE_CHANGING):
        raise TriLoRAError(
            f"{component.prefix}init_lora_weights={start}: its training began by taking a part out of the model's own weights, which "
            "this file does not hold; save it anew with peft's path_initial_model_for_weight_conversion; nothing was applied"
        )
    if start not in _PLAIN_STARTS:
        return [
            f"{component.prefix}init_lora_weights={start} is not known: if that start changes the model's own weights, the adapter acts otherwise than it should"
        ]
    return []


def _refuse_unread(tensors: Mapping[str, Tensor]) -> None:
    """Told from the tensors' names, where no configuration says it; beside layers that are read, they are left out as all are."""
    found = [(match[1].upper(), key) for key in tensors if (match := _MARK.search(key))]
    if found and not any((split := split_key(key)) and split[1] in KINDS for key in tensors):
        tuner, key = min(found)
        raise TriLoRAError(
            f"an adapter of the kind {tuner} of peft ({shown(key, 120)}), which {REFUSED[tuner]}, is not read; {_REMEDY}"
        )


def _low_rank(tensors: dict[str, Tensor], components: list[Component]) -> None:
    alphas = {c.prefix: c.numbers("lora_alpha", "alpha_pattern") for c in components if c.tuner == "LORA"}
    for key in list(tensors):
        for up, down in PAIRS:
            name = key.removesuffix(up)
            if name == key or name + down not in tensors or not tensors[name + down].ndim:
                continue
            rank, component = tensors[name + down].shape[0], component_of(name, components)
            if component is not None and component.prefix in alphas:
                alpha = alphas[component.prefix](name) * (
                    math.sqrt(rank) if component.fields.get("use_rslora") else 1.0
                )
                if alpha != rank:
                    tensors.setdefault(name + ".alpha", torch.tensor(alpha))
            _bias(tensors, name, name + up.removesuffix(".weight") + ".bias", rank)
            break


def _bias(tensors: dict[str, Tensor], name: str, key: str, rank: int) -> None:
    """`lora_B.bias` of a layer as what is added to the layer's own, under the name that the host knows."""
    alpha = tensors.get(name + ".alpha")
    broken = not rank or (alpha is not None and (alpha.numel() != 1 or alpha.is_complex()))
    if key in tensors and not broken and not tensors[key].is_complex():
        tensors[name + ".diff_b"] = tensors.pop(key).float() * (1.0 if alpha is None else float(alpha) / rank)


def _adalora(tensors: dict[str, Tensor], components: list[Component]) -> None:
    for key in [key for key in tensors if key.endswith(".lora_E")]:
        name = key.removesuffix(".lora_E")
        component = component_of(name, components)
        if component is None or component.tuner != "ADALORA":
            raise TriLoRAError(
                f"{shown(key, 120)}: an AdaLoRA, whose scale only its configuration tells; put peft's adapter_config.json beside the file, "
                "and name the file adapter_model.safetensors"
            )
        values, down, up = tensors.pop(key), tensors.get(name + ".lora_A"), tensors.get(name + ".lora_B")
        if (
            down is None
            or up is None
            or down.ndim != 2
            or values.shape != (down.shape[0], 1)
            or values.is_complex()
            or down.is_complex()
        ):
            raise TriLoRAError(
                f"{shown(key, 120)} is {tuple(values.shape)}: expected (r, 1) beside a lora_A of (r, in) and a lora_B of (out, r); the file is broken"
            )
        if not len(values):  # every direction of the layer was given away to others
            del tensors[name + ".lora_A"], tensors[name + ".lora_B"]
            continue
        tensors[name + ".lora_A"] = down.float() * values.float()
        alpha = component.numbers("lora_alpha")(name) / (component.numbers("init_r")(name) + 1e-5) * len(values)
        tensors[name + ".alpha"] = torch.tensor(alpha)


def _loha(tensors: dict[str, Tensor], components: list[Component]) -> None:
    for component in (c for c in components if c.tuner == "LOHA"):
        alpha = component.numbers("alpha", "alpha_pattern")
        for name in _layers(tensors, components, component, (".hada_w1_a",)):
            tensors.setdefault(name + ".alpha", torch.tensor(alpha(name)))


def _lokr(tensors: dict[str, Tensor], components: list[Component]) -> None:
    for component in (c for c in components if c.tuner == "LOKR"):
        alpha, rank = component.numbers("alpha", "alpha_pattern"), component.numbers("r", "rank_pattern")
        for name in _layers(tensors, components, component, (".lokr_w1", ".lokr_w1_a")):
            whole = name + ".lokr_w1"
            # of two whole factors others read no alpha
            if whole in tensors and name + ".lokr_w2" in tensors and not tensors[whole].is_complex():
                tensors[whole] = tensors[whole].float() * (alpha(name) / rank(name))
            else:
                tensors.setdefault(name + ".alpha", torch.tensor(alpha(name)))


def _oft(tensors: dict[str, Tensor], components: list[Component]) -> None:
    """The angles within COFT's bound, and how the blocks are made of them."""
    for component in (c for c in components if c.tuner == "OFT"):
        terms = component.fields.get("num_cayley_neumann_terms", 5) if component.fields.get("use_cayley_neumann") else 0
        if isinstance(terms, bool) or not isinstance(terms, int) or not 0 <= terms <= MOST_TERMS:
            raise TriLoRAError(
                f"{component.prefix}num_cayley_neumann_terms={shown(terms)}: expected 1 to {MOST_TERMS}; the file is broken"
            )
        eps = component.numbers("eps")("") if component.fields.get("coft") else math.inf
        for name in _layers(tensors, components, component, (".oft_R.weight",)):
            angles = tensors.pop(name + ".oft_R.weight")
            if eps < math.inf and angles.ndim == 2 and angles.is_floating_point() and len(angles):
                norms = math.sqrt(2) * torch.linalg.vector_norm(angles.float(), dim=1, keepdim=True)
                most = eps / math.sqrt(len(angles))
                angles = torch.where(norms <= most, angles.float(), angles.float() * (most / norms))
            tensors[name + ANGLES], tensors[name + TERMS] = angles, torch.tensor(float(terms))


def _layers(
    tensors: Mapping[str, Tensor], components: list[Component], component: Component, marks: tuple[str, ...]
) -> list[str]:
    names = {key.removesuffix(mark): None for key in tensors for mark in marks if key.endswith(mark)}
    return [name for name in names if component_of(name, components) is component]


def _whole(tensors: dict[str, Tensor], components: list[Component]) -> list[str]:
    """Leave out what was trained beside the adapter and is in the file as it is: `modules_to_save` and biases."""
    found, ends = {}, tuple(end for pair in PAIRS for end in pair)
    for key in list(tensors):
        component = component_of(key, components)
        if component is None or not key.endswith((".weight", ".bias")) or key.endswith(ends):
            continue
        if not _OURS.search(key) and not _MARK.search(key):
            found[component.module(key).replace(".base_layer.", ".")] = tensors.pop(key)
    if not found:
        return []
    names = ", ".join(shown(name, 120) for name in list(found)[:3])
    return [
        f"{len(found)} weights and biases that were trained whole beside the adapter (modules_to_save, bias) were left out ({names}"
        + (", ...)" if len(found) > 3 else ")")
    ]


def _without_scale(tensors: Mapping[str, Tensor], components: list[Component]) -> list[str]:
    """peft's own files hold no scale; one that was renamed has lost it with its configuration."""
    ends = (*(up for up, _ in PAIRS), ".hada_w1_a", ".lokr_w1", ".lokr_w1_a")
    names = {key.removesuffix(end) for key in tensors if key.startswith(WRAPPER) for end in ends if key.endswith(end)}
    if all(component_of(name, components) is not None or name + ".alpha" in tensors for name in names):
        return []
    return [
        "a file of peft without its adapter_config.json: its alpha is unknown, and its scale is taken as 1; keep it as adapter_model.safetensors in a "
        "folder of its own with that file beside it"
    ]
