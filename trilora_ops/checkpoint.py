"""The adapter file: which keys make a layer, strict reading of ours, safe reading of foreign ones, atomic writing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .atomic_files import NameTaken, publish
from .errors import TriLoRAError
from .factors import canonicalise
from .files.kinds import by_layer, read_layer
from .files.low_rank import DOWN, PEFT_DOWN, PEFT_UP, UP, FileLayer, LowRankLayer
from .files.numbers import ALPHA
from .files.transform import PARTS, part_of
from .key_forms import known_forms
from .message_words import short
from .one_alpha import one_alpha
from .peft_config import IN_METADATA, read_config
from .peft_tuners import translate
from .registry import is_known

FORMAT = "trilora"
VERSION = "1"
SVD_MARK = {"trilora.format": FORMAT, "trilora.version": VERSION, "trilora.form": "svd"}
PEFT_MARK = {**SVD_MARK, "trilora.form": "peft"}
# what other programs write of a file's own bytes
_HASHES = ("sshs_", "modelspec.hash")


class AdapterState(dict):
    """An adapter in memory: public key -> tensor, with the file's metadata (str -> str). The host's LORA_MODEL.

    notes: what a person should know of the file it was read from, () for any other.
    """

    def __init__(self, tensors: Mapping[str, Tensor] = (), metadata: Mapping[str, str] | None = None):
        super().__init__(tensors)
        self.metadata = dict(metadata or {})
        self.notes: tuple[str, ...] = ()

    @property
    def canonical(self) -> bool:
        """Whether the metadata mark it as ours and in SVD canonical form."""
        return self.metadata.get("trilora.format") == FORMAT and self.metadata.get("trilora.form") == "svd"


def split_layers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, FileLayer], dict[str, Tensor]]:
    """(layer name -> its plain low-rank factors, all tensors that are not part of one).

    Tucker cores, DoRA magnitudes and every other kind stay in the second part untouched. Raises TriLoRAError for a layer
    of any kind that is there twice, by half or in shapes that do not fit each other, and for factors whose product overflows.
    """
    layers, rest = {}, dict(tensors)
    for name, found in by_layer(tensors)[0].items():
        layer = read_layer(name, found).weight
        if layer is None:
            continue
        layer.check_finite()
        if isinstance(layer, LowRankLayer) and layer.is_plain:
            layers[name] = layer.file_layer()
            for ending in (*layer.tensors, ALPHA):
                rest.pop(name + ending, None)
    return layers, rest


def canonical_state(state: AdapterState) -> AdapterState:
    """The same adapter with every low-rank layer in SVD canonical form, all with one alpha; one that is so already is returned.

    Other kinds of layers are kept as they are. Names stay; the metadata gain our mark. Raises TriLoRAError for
    non-finite values.
    """
    layers, rest = split_layers(state)
    if state.canonical and len({layer.pair.alpha for layer in layers.values()}) < 2:
        return state
    check_finite(state)
    tensors = dict(rest)
    pairs = {name: layer.pair if state.canonical else canonicalise(layer.pair) for name, layer in layers.items()}
    for name, pair in one_alpha(pairs).items():
        tensors.update(FileLayer(pair, layers[name].kernel).tensors(name))
    return AdapterState(tensors, {**getattr(state, "metadata", {}), **({} if rest else SVD_MARK)})


def peft_state(state: AdapterState) -> AdapterState:
    """The same adapter under PEFT's endings, which know no alpha; names stay. Directions stay in order of importance.

    Raises TriLoRAError naming the first layer that is not plain low rank: PEFT and diffusers read no other kind here.
    """
    layers, rest = split_layers(canonical_state(state))
    if rest:
        raise TriLoRAError(f"keys=peft: {_said_of(rest)}, and PEFT files hold plain LoRA layers only; save with keys=kohya")
    tensors = {key: tensor for name, layer in layers.items() for key, tensor in layer.peft_tensors(name).items()}
    return AdapterState(tensors, {**state.metadata, **PEFT_MARK})


def _said_of(rest: Mapping[str, Tensor]) -> str:
    """The first layer that is not plain low rank with its kind, else the first key of no layer."""
    for name, tensors in sorted(by_layer(rest)[0].items()):
        found = read_layer(name, tensors)
        if layer := found.weight or found.bias:
            return f"{short(name)} is a layer of kind {layer.kind}"
    return f"{short(min(rest))} is of no layer"


def read_adapter(path: str | os.PathLike) -> AdapterState:
    """Read a .safetensors adapter whole; nothing of it is used before all of it is checked.

    What peft or diffusers say of the tensors beside them, see `peft_tuners`, goes into the tensors; `notes` of the result
    has what was left out or is in doubt. Raises TriLoRAError for another file type, a damaged file, a non-finite tensor, an
    adapter of peft that is not read and, in files with our mark, for every unknown, missing or mis-shaped tensor.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise TriLoRAError(f"{path.name}: only .safetensors files are read, because {path.suffix or 'other'} files can run "
                           "code; convert it to .safetensors first")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            state = AdapterState({key: file.get_tensor(key) for key in file.keys()}, file.metadata())
    except (SafetensorError, OSError) as error:
        raise TriLoRAError(f"{path.name}: damaged or incomplete ({error}); copy or download the file again") from error
    try:
        check_finite(state)
        if state.metadata.get("trilora.format") == FORMAT:
            _check_strict(state)
        else:
            state = AdapterState(known_forms(state), state.metadata)
            _take_config_of_peft(state, path)
    except TriLoRAError as error:
        raise TriLoRAError(f"{path.name}: {error}") from None
    return state


def write_adapter(path: str | os.PathLike, state: AdapterState, dtype: torch.dtype) -> Path:
    """Write atomically (a complete file appears or none, see `atomic_files`). Never overwrites.

    dtype: of all floating-point tensors but alpha, scales and transforms, which stay fp32: half precision cannot hold an
    identity plus something small. Hashes that the metadata have of another file are left out. Raises NameTaken where the file
    exists, and TriLoRAError where the dtype cannot hold a value or the file cannot be written.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise NameTaken(f"{path.name}: a file of this name exists already; choose another name")
    check_finite(state, "holds NaN or infinite values; train it again with a lower learning rate")
    tensors = {k: _cast(k, v, dtype) for k, v in sorted(state.items())}
    check_finite(tensors, f"holds a value too large for {str(dtype).removeprefix('torch.')}; save the adapter as bf16 or fp32")
    publish(path, save(tensors, metadata={k: v for k, v in state.metadata.items() if not k.startswith(_HASHES)}))
    return path


def check_finite(tensors: Mapping[str, Tensor], problem: str = "holds NaN or infinite values; the file is broken; train or download it again") -> None:
    """Raise TriLoRAError naming the first tensor that holds NaN or infinity."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        values = tensor.float() if tensor.element_size() == 1 else tensor
        # a finite sum proves it in a quarter of the time; an infinite one may be the sum of large finite values
        if not torch.isfinite(values.sum(dtype=torch.float32)) and not torch.isfinite(values).all():
            raise TriLoRAError(f"{key}: {problem}")


def _take_config_of_peft(state: AdapterState, path: Path) -> None:
    state.notes = tuple(translate(state, read_config(path, state.metadata)))
    # said with tensors now, and no longer true of a copy with other ranks
    state.metadata.pop(IN_METADATA, None)


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    place = part_of(key)
    if not tensor.is_floating_point() or key.endswith(ALPHA) or (place and (place[1] == "transform" or place[2] == "scale")):
        return tensor.detach().cpu().contiguous()
    return tensor.detach().to("cpu", dtype).contiguous()


def _check_strict(state: AdapterState) -> None:
    version = state.metadata.get("trilora.version")
    if version != VERSION:
        raise TriLoRAError(f"trilora.version={version!r}: this release reads version {VERSION}; update ComfyUI-TriLoRA")
    forms = ((UP, DOWN, ALPHA), (PEFT_UP, PEFT_DOWN))  # the tensors of a whole layer, kohya's and PEFT's
    parts = _parts(state)
    unknown = [key for key in state if not key.endswith(sum(forms, ())) and part_of(key) is None]
    unknown += [f"{name}.{part}.{tensor}" for name, found in parts.items() for part, names in found.items()
                if not is_known(part, names) for tensor in sorted(names)]
    missing = sorted({key.removesuffix(end) + other for key in state for form in forms for end in form if key.endswith(end)
                      for other in form} - state.keys())
    if unknown or missing:
        found = "; ".join(f"{what}: {', '.join(keys[:5])}" for what, keys in (("unknown", unknown), ("missing", missing)) if keys)
        raise TriLoRAError(f"not a complete TriLoRA file ({found}); copy or save it again")
    alone = sorted(name for name, found in parts.items() if not found["transform"])
    if alone:
        raise TriLoRAError(f"{alone[0]}.residual has no transform beside it: not a complete TriLoRA file; copy or save it again")
    split_layers(state)


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, set[str]]]:
    """Layer name -> {"transform": tensor names, "residual": tensor names}, for layers that have either."""
    layers: dict[str, dict[str, set[str]]] = {}
    for key in tensors:
        if place := part_of(key):
            name, part, tensor = place
            layers.setdefault(name, {p: set() for p in PARTS})[part].add(tensor)
    return layers
