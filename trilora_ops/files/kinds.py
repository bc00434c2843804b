"""The one table of the kinds of layers that adapter files hold.

Every reader, check, tool and message asks it. Adding a kind is a class of `layer.Layer` and its line in KINDS.

| kind | tensors, after the layer's name | change W_1 - W (A, scale alpha / r) | a share can be written |
|---|---|---|---|
| low rank | a pair of `low_rank.PAIRS`, `.alpha` | A = up down | yes |
| Tucker LoCon | and `.lora_mid.weight` | A = core x up x down | yes |
| widening LoRA | a pair and `.reshape_weight` | W padded with zeros, + A | yes |
| LoHa, LoKr | `.hada_*`, `.lokr_*` | see `products` | yes |
| GLoRA | `.a1.weight`, `.a2.weight`, `.b1.weight`, `.b2.weight` | W a1 a2 + b1 b2, scaled | yes |
| DoRA | one of the above but GLoRA, and `.dora_scale` or `.lora_magnitude_vector` | m (W + A) / ||W + A|| - W | no |
| OFT, BOFT | `.oft_blocks` of 3 or 4 axes, `.rescale`, `.alpha` as the largest norm | see `rotations` | no |
| PEFT's OFT and BOFT | `.oft_angles` and `.oft_terms`; `.boft_R` and `.boft_s` | see `input_rotations` | no |
| IA3 | `.weight` and `.on_input` | W w | yes |
| full difference, bias | `.diff` or `.w_norm`; `.diff_b` or `.b_norm` | the tensor | yes |
| replaced weight | `.set_weight` | the tensor - W | no |
| transform | `.transform.*`, `.residual.*` | W (T - I) + R | where T is diagonal or a ring |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import TriLoRAError
from .input_rotations import PeftBOFTLayer, PeftOFTLayer
from .layer import BROKEN, Layer
from .low_rank import MID, PAIRS, LowRankLayer
from .numbers import ALPHA, COMPANIONS, MAGNITUDES, factor, number
from .products import GLoRALayer, LoHaLayer, LoKrLayer
from .rotations import IA3Layer, OFTLayer
from .transform import TransformLayer, part_of
from .whole import BiasLayer, DifferenceLayer, ReplacedLayer

# ending of a tensor that makes a layer's weight, by itself or with others -> its kind
KINDS: dict[str, type[Layer]] = {
    **{ending: LowRankLayer for pair in PAIRS for ending in pair}, MID: LowRankLayer,
    **{ending: kind for kind in (LoHaLayer, LoKrLayer, GLoRALayer) for ending in kind.ENDINGS},
    **{ending: kind for kind in (DifferenceLayer, ReplacedLayer) for ending in kind.ENDINGS},
    **{ending: kind for kind in (PeftOFTLayer, PeftBOFTLayer) for ending in kind.ENDINGS},
    ".oft_blocks": OFTLayer, ".on_input": IA3Layer,
}  # fmt: skip
# what PEFT calls the magnitudes of the outputs, (out,) or (1, out, 1, 1)
_PEFT_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight")
# ending of a tensor that is another method's -> that method, which nothing here computes
UNSUPPORTED = {
    **dict.fromkeys((".oft_R.weight", ".oft_R.default.weight"), "PEFT's OFT without its adapter_config.json"),
    **dict.fromkeys((".oft_R", ".oft_r"), "an older PEFT's OFT"), ".ia3_l": "PEFT's IA3",
    **dict.fromkeys((".q_layer.weight", ".p_layer.weight", ".lambda_layer"), "LyCORIS' T-LoRA"),
    **dict.fromkeys((".vera_lambda_b", ".vera_lambda_d"), "VeRA"), ".hra_u": "HRA", ".c3a_kernel": "C3A",
    ".fourierft_spectrum": "FourierFT",
    **dict.fromkeys((".lora_embedding_A", ".lora_embedding_B"), "a LoRA of an embedding"),
}  # fmt: skip
# the same where what stands beside it means something else because of it
_CHANGES_THE_REST = {
    ".lora_E": "AdaLoRA",
    ".lora_ranknum": "AdaLoRA",
    ".bm.weight": "GLoRA with a Tucker core",
    ".lokr_t1": "LoKr with two Tucker cores",
}
UNSUPPORTED |= _CHANGES_THE_REST
_ENDINGS = sorted({*KINDS, *BiasLayer.ENDINGS, *COMPANIONS, *_PEFT_MAGNITUDES, *UNSUPPORTED}, key=len, reverse=True)
_KNOWN = frozenset(_ENDINGS) | {".weight"}


@dataclass(frozen=True)
class Found:
    """What stands in a file under one name: a layer for the weight, one for the bias beside it, and the endings of
    tensors that belong to neither."""

    weight: Layer | None
    bias: Layer | None
    unread: tuple[str, ...]

    @property
    def unsupported(self) -> dict[str, str]:
        """Ending -> the method whose tensor it is, for the unread ones that are another method's."""
        return {ending: UNSUPPORTED[ending] for ending in self.unread if ending in UNSUPPORTED}


def is_ending(text: str) -> bool:
    """Whether a file's key that ends so holds a tensor of a known kind, and what is before it is the layer's name."""
    return text in _KNOWN or (text.startswith((".transform.", ".residual.")) and text.count(".") == 2)


def split_key(key: str) -> tuple[str, str] | None:
    """(layer's name, ending) of a file's key, None where it ends like no known kind's. IA3's `.weight` is the names'
    business."""
    ending = next((ending for ending in _ENDINGS if key.endswith(ending) and len(key) > len(ending)), None)
    if ending:
        return key.removesuffix(ending), ending
    part = part_of(key)
    return (part[0], f".{part[1]}.{part[2]}") if part else None


def by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(layer's name -> its tensors by ending, tensors that end like no known kind's), names told by the endings
    alone."""
    layers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        if found := split_key(key):
            layers.setdefault(found[0], {})[found[1]] = tensor
        else:
            others[key] = tensor
    for name, found in layers.items():
        if ".on_input" in found and name + ".weight" in others:
            found[".weight"] = others.pop(name + ".weight")
    return layers, others


def kind_of(endings: Iterable[str]) -> type[Layer] | None:
    """The kind of which these endings make (part of) a weight's layer, the first where there are several."""
    for ending in endings:
        if found := _kind(ending):
            return found
    return None


def read_layer(name: str, tensors: Mapping[str, Tensor]) -> Found:
    """What the tensors under one name make, by their endings.

    Only what is whole is read. Raises TriLoRAError, naming a key, for half a layer, two layers in one, tensors that
    do not fit each other, numbers that are no floating-point ones, and an alpha that is not one number. Whether the
    layer fits a weight is `Layer.check`'s business, whether its numbers stay finite `Layer.check_finite`'s.
    """
    left = {_today(ending): _rows(ending, tensor) for ending, tensor in tensors.items()}
    if len(left) < len(tensors):
        raise TriLoRAError(f"{name}{MAGNITUDES}: its magnitudes are in the file twice, under two endings; {BROKEN}")
    bias = _bias(name, left)
    marks = {kind: ending for ending in reversed(left) if (kind := _kind(ending))}
    if len(marks) > 1:
        one, other = list(marks.values())[-2:]
        raise TriLoRAError(
            f"{name}{other} and {name}{one} are two layers for one place of the model, so it is in the file twice; "
            "keep one of them, "
            "or merge them"
        )
    taken = set(BiasLayer.ENDINGS) & left.keys() if bias else set()
    weight = None
    if marks:
        (kind,) = marks
        own = {
            ending: tensor for ending, tensor in left.items() if ending in _own_endings(kind) or _kind(ending) is kind
        }
        weight = _read(name, kind, own, left)
        taken |= {*own, ALPHA}
    return Found(weight, bias, tuple(ending for ending in tensors if _today(ending) not in taken))


def _read(name: str, kind: type[Layer], own: dict[str, Tensor], left: Mapping[str, Tensor]) -> Layer:
    strange = next((ending for ending in _CHANGES_THE_REST if ending in left), None)
    if strange:
        raise TriLoRAError(
            f"{name}{strange} makes it {UNSUPPORTED[strange]}, which is not supported; merge it with the program that "
            "wrote it"
        )
    if MAGNITUDES in own:
        factor(name, own, MAGNITUDES)
    layer = kind.read(name, own, number(name + ALPHA, left[ALPHA]) if ALPHA in left else None)
    if MAGNITUDES in left and not kind.TAKES_MAGNITUDES:
        raise TriLoRAError(
            f"{name}{MAGNITUDES} stands beside {layer.kind}, for which no program writes magnitudes; {BROKEN}"
        )
    return layer


def _own_endings(kind: type[Layer]) -> set[str]:
    beside = {MAGNITUDES} if kind.TAKES_MAGNITUDES else set()
    if kind is LowRankLayer:
        beside.add(".reshape_weight")
    return beside | set(getattr(kind, "ENDINGS", ()))


def _kind(ending: str) -> type[Layer] | None:
    return TransformLayer if ending.startswith((".transform.", ".residual.")) else KINDS.get(ending)


def _bias(name: str, tensors: Mapping[str, Tensor]) -> Layer | None:
    found = [
        ending for ending in BiasLayer.ENDINGS if ending in tensors and (ending != ".b_norm" or ".w_norm" in tensors)
    ]
    if len(found) > 1:
        raise TriLoRAError(f"{name}{found[0]} and {name}{found[1]} are two layers for one place of the model; {BROKEN}")
    return BiasLayer.read(name, {found[0]: tensors[found[0]]}, None) if found else None


def _today(ending: str) -> str:
    return MAGNITUDES if ending in _PEFT_MAGNITUDES else ending


def _rows(ending: str, tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, *[1] * max(tensor.ndim - 1, 1)) if ending in _PEFT_MAGNITUDES else tensor
