"""Names of a file's layers against a model's, whatever program spelled them: compared in one form.

A name is its words, without the beginnings that programs put before a model's own path (`base_model.model.`,
`lora_unet_`, `transformer.`), whether "." or "_" stands between them, and with one word for what trainers call
differently (`attn1.to_q`, `self_attn.q`). Two names of one form are two spellings of one layer. The form is made of the
model's names as well as of the file's, so that what it throws together in a model is seen, and never used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import Tensor

from .errors import TriLoRAError
from .files.kinds import Found, by_layer, is_ending, read_layer
from .naming import PREFIX, split_target

LONGEST = 400  # letters of a name that are looked at; no model has such names
_ALIKE = 0.6  # of 1: how much of two forms must be the same in the same order for the one to be called near the other
_SEPARATORS = re.compile(r"[._]+")
# what files put before the path of the denoiser, in any order and number
_LEADING = re.compile(
    r"^(?:(?:lora|lycoris|unet|transformer|diffusion|base|model|module|dit|pipe|net|denoiser|orig_mod)_)+"
)
# what wraps a module, anywhere in its path
_WRAPPERS = re.compile(r"(?<=_)(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|base_layer|processor)_")
_TEXT = re.compile(
    r"^(?:base_model\.model\.)?"
    r"(?:text_encoders\.[^.]+\.|(?:lora_)?(?:prior_)?(?:te\d?|text_encoder(?:_\d)?)[._]|(?=text_model[._]))"
)
_TEXT_LEADING = re.compile(r"^(?:(?:base_model|transformer|model|text_model|language_model|bert|module|orig_mod)_)+")
# diffusers, transformers and the models' own repositories: one word for the same thing
_WORDS = {
    "self_attn": "attn1", "self_attention": "attn1", "cross_attn": "attn2", "cross_attention": "attn2",
    "attention": "attn", "to_q": "q", "to_k": "k", "to_v": "v", "q_proj": "q", "k_proj": "k", "v_proj": "v",
    "add_q_proj": "q_img", "add_k_proj": "k_img", "add_v_proj": "v_img", "to_out_0": "o", "to_out": "o",
    "out_proj": "o", "o_proj": "o", "output_proj": "o", "attention_out": "attn_o", "attn_out": "attn_o",
    "mlp": "ffn", "ff": "ffn", "feed_forward": "ffn", "net_0_proj": "0", "net_2": "2", "fc1": "0", "fc2": "2",
    "layer1": "0", "layer2": "2",
    "condition_embedder_text_embedder_linear_1": "text_embedding_0",
    "condition_embedder_text_embedder_linear_2": "text_embedding_2",
    "condition_embedder_time_embedder_linear_1": "time_embedding_0",
    "condition_embedder_time_embedder_linear_2": "time_embedding_2",
    "condition_embedder_time_proj": "time_projection_1",
    "condition_embedder_image_embedder_ff_net_0_proj": "img_emb_proj_1",
    "condition_embedder_image_embedder_ff_net_2": "img_emb_proj_3",
}  # fmt: skip
_WORD = re.compile("(?<=_)(?:" + "|".join(sorted(_WORDS, key=len, reverse=True)) + ")(?=_)")


def names_in(key: str, names: Collection[str]) -> list[str]:
    """The names in `names` that a file's key may begin with, the longest first: cut off at any of its dots.

    The diffusers of old put "_lora" between a name and the dot.
    """
    heads, place = [], len(key) if len(key) <= LONGEST else key.rfind(".", 0, LONGEST)
    while place > 0:
        head = key[:place]
        if head in names:
            heads.append(head)
        if head.endswith("_lora") and head.removesuffix("_lora") in names:
            heads.append(head.removesuffix("_lora"))
        place = key.rfind(".", 0, place)
    return heads


def is_text(name: str) -> bool:
    """Whether a layer's name in a file is one of a text encoder."""
    return _TEXT.match(name) is not None


def form(name: str) -> str:
    """The form of a name of the denoiser, or of a text encoder's; "" for one that is too long for any model."""
    text = _TEXT.match(name)
    return _form(name[text.end() :], _TEXT_LEADING) if text else _form(name, _LEADING)


def size_of(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """(rows, columns) of the weight that a layer is for, None where its tensors do not tell.

    tensors: by ending.
    """
    try:
        return size_told(read_layer(name, tensors))
    except TriLoRAError:  # not whole, which its reader says
        return None


def size_told(found: Found) -> tuple[int, int] | None:
    """The same of a layer that was read."""
    layer = found.weight
    try:
        rows, columns = (0, None) if layer is None or layer.new_shape() is not None else layer.size
    except NotImplementedError:  # of a kind that tells no size
        return None
    return None if columns is None else (rows, columns)


def size_at(target, weights: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """(rows, columns) of a weight or of a slice of it; None for what is a single number, or is not there."""
    key, part, _ = split_target(target)
    shape = list(weights.get(key, ()))
    if part is not None and part[0] < len(shape):
        shape[part[0]] = part[2]
    return (shape[0], prod(shape[1:])) if shape else None


def parts_of_qkv(weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple]:
    """Name -> (key, (0, start, rows)) of q, k and v in every weight that holds all three: `X.to_q` in `X.qkv`.

    q has as many rows as the output projection beside it has columns, k and v share the rest.
    """
    found = {}
    for key, shape in weights.items():
        if not (key.startswith(PREFIX) and key.endswith(".qkv.weight") and len(shape) == 2):
            continue
        path = key.removesuffix("qkv.weight")
        outputs = [weights[path + name] for name in ("out.weight", "proj.weight") if path + name in weights]
        q = outputs[0][1] if outputs and len(outputs[0]) == 2 else shape[0] // 3
        rest = (shape[0] - q) // 2
        if rest > 0 and q + 2 * rest == shape[0]:
            parts = {"q": (0, q), "k": (q, rest), "v": (q + rest, rest)}
            found |= {f"{path}to_{name}": (key, (0, start, rows)) for name, (start, rows) in parts.items()}
    return found


@dataclass(frozen=True)
class Spellings:
    """A model's names in their forms, for finding what other spellings mean.

    names: every name that is known -> its target; weights: shapes by key.
    """

    names: Mapping[str, object]
    weights: Mapping[str, tuple[int, ...]]

    @cached_property
    def known(self) -> frozenset[str]:
        """The names whose weight is there."""
        return frozenset(name for name, target in self.names.items() if split_target(target)[0] in self.weights)

    @cached_property
    def targets(self) -> dict[str, set]:
        """Form -> the targets that have it."""
        found: dict[str, set] = {}
        for name, target in self.names.items():
            if split_target(target)[0].startswith(PREFIX):
                found.setdefault(form(name), set()).add(target)
        for key, path in self._own[True].items():
            found.setdefault(path, set()).add(f"{key}.weight")
        found.pop("", None)
        return found

    @cached_property
    def _own(self) -> dict[bool, dict[str, str]]:
        """Whether of a text encoder -> the model's own names and their forms."""
        found: dict[bool, dict[str, str]] = {False: {}, True: {}}
        for key in self.weights:
            path, text = key.removesuffix(".weight"), not key.startswith(PREFIX)
            if path != key:  # t5xxl.transformer.encoder. ...
                found[text][path] = _form(path.partition(".")[2], _TEXT_LEADING) if text else form(path)
        return found

    def certain(self, layers: Mapping[str, tuple[int, int] | None], taken: Collection) -> dict[str, object]:
        """Name -> target of the layers whose name means one weight of the model and no other.

        layers: name that the model does not know -> `size_of` it; taken: targets that other layers of the file have. A
        name is certain if one target alone has its form, is of its size, and is meant by no other name.
        """
        meant = self.meant(layers)
        counts = Counter(meant.values())
        return {name: target for name, target in meant.items() if counts[target] == 1 and target not in taken}

    def meant(self, layers: Mapping[str, tuple[int, int] | None]) -> dict[str, object]:
        """Name -> the one target that has its form and is of its size, which other layers of the file may have too."""
        fits = {}
        for name, size in layers.items():
            fits[name] = [target for target in self.targets.get(form(name), ()) if self._fits(target, size, name)]
        encoders = self._encoders({name: found for name, found in fits.items() if is_text(name)})
        for name, found in fits.items():
            if is_text(name):
                fits[name] = [target for target in found if target.partition(".")[0] == encoders.get(_beginning(name))]
        return {name: found[0] for name, found in fits.items() if len(found) == 1}

    def _fits(self, target, size: tuple[int, int] | None, name: str) -> bool:
        key, part, _ = split_target(target)
        if key not in self.weights or is_text(name) == key.startswith(PREFIX):
            return False
        if size is None:  # the check of its kind decides; but encoders have layers of one name, told apart by size
            return part is None and not is_text(name)
        return size_at(target, self.weights) == size

    def _encoders(self, fits: Mapping[str, list]) -> dict[str, str]:
        """Beginning of names -> the one text encoder that has a place for every layer so named."""
        found: dict[str, set[str]] = {}
        for name, targets in fits.items():
            there = {target.partition(".")[0] for target in targets}
            found[_beginning(name)] = found.get(_beginning(name), there) & there
        return {beginning: next(iter(there)) for beginning, there in found.items() if len(there) == 1}

    def nearest(self, name: str, count: int = 3) -> list[str]:
        """The model's own names that are most like one, the most like first; none where nothing is like it."""
        from difflib import SequenceMatcher  # for messages alone

        asked, own = form(name[:LONGEST]), self._own[is_text(name)]
        words = set(asked.split("_"))
        likely = sorted(own, key=lambda path: -len(words & set(own[path].split("_"))))[:40]
        alike = {path: SequenceMatcher(None, asked, own[path], autojunk=False).ratio() for path in likely}
        near = [path for path in likely if alike[path] >= _ALIKE]
        return sorted(near, key=lambda path: -alike[path])[:count]


def grouped(
    tensors: Mapping[str, Tensor], spellings: Spellings | None = None
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """(layer -> its tensors by ending, keys that belong to no layer): a name that is known, or what a known ending leaves.

    Of several known names that a key may begin with, the one that leaves an ending of the table of kinds, else the longest.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = {}
    for key, tensor in tensors.items():
        heads = names_in(key, spellings.known) if spellings else []
        if heads:
            layer = next((head for head in heads if is_ending(key[len(head) :])), heads[0])
            layers.setdefault(layer, {})[key[len(layer) :]] = tensor
        else:
            unknown[key] = tensor
    others, extra = by_layer(unknown)
    return layers | others, tuple(extra)


def _form(path: str, leading: re.Pattern) -> str:
    if len(path) > LONGEST:
        return ""
    flat = leading.sub("", _SEPARATORS.sub("_", path.lower()).strip("_") + "_")
    flat = _WORD.sub(lambda match: _WORDS[match[0]], _WRAPPERS.sub("", f"_{flat}"))
    return flat.replace("norm_scale_", "norm_").strip("_")


def _beginning(name: str) -> str:
    return _TEXT.match(name)[0]
