"""Files of LyCORIS: every algorithm it exports, with the options that change what its tensors mean.

The measure is what a layer computes with LyCORIS' module on it, for inputs that are one entry each: so it is the weight
that the module makes, whatever its merging functions do. Where what was trained is not what LyCORIS makes of the file
(READ_BACK), the module that it makes of the file is the measure.
"""

import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import comfy.utils
import torch
from comfyui_trilora.tests.host.compatibility.outcomes import NotWritten, Row
from comfyui_trilora.tests.host.compatibility.peft_rows import twin
from lycoris.modules import MODULE_LIST, get_module, make_module
from safetensors.torch import save_file
from torch import Tensor, nn

WRITER = f"LyCORIS {version('lycoris_lora')}"
_BLOCK = "diffusion_model.middle_block"
# square, with more inputs, with more outputs; 3 x 3, with a stride, 1 x 1
LAYERS = (f"{_BLOCK}.1.transformer_blocks.0.attn1.to_q", f"{_BLOCK}.1.transformer_blocks.0.ff.net.2", f"{_BLOCK}.1.transformer_blocks.0.ff.net.0.proj",
          f"{_BLOCK}.0.in_layers.2", "diffusion_model.input_blocks.2.0.op", "diffusion_model.output_blocks.0.0.skip_connection")  # fmt: skip
NORMS = (f"{_BLOCK}.1.transformer_blocks.0.norm1", f"{_BLOCK}.0.in_layers.0")
# rs_lora is not saved for GLoRA, nor for a LoKr of two whole factors; DyLoRA trains a random part of its rank at a time
READ_BACK = {("GLoRAModule", "rs_lora"), ("LokrModule", "rs_lora"), ("LokrModule", "full_matrix, rs_lora"), ("DyLoraModule", "")}
# LyCORIS itself fails to compute the one on convolutions, and to read the other's back
LINEAR_ALONE = ("TLoraModule", "DyLoraModule")
# what an algorithm of LyCORIS is called in a module's `name`, or its class -> options by what they are called in the table
_DORA = {"DoRA, wd_on_out": {"weight_decompose": True}, "DoRA, wd_on_out=False": {"weight_decompose": True, "wd_on_out": False}}
_COMMON = {"": {}, "use_scalar": {"use_scalar": True}, "rs_lora": {"rs_lora": True}}
OPTIONS: dict[str, dict[str, dict]] = {
    "LoConModule": {**_COMMON, "use_tucker": {"use_tucker": True}, "use_tucker, use_scalar": {"use_tucker": True, "use_scalar": True},
                    **_DORA, "use_tucker, DoRA": {"use_tucker": True, "weight_decompose": True}},
    "LohaModule": {**_COMMON, "use_tucker": {"use_tucker": True}, **_DORA, "use_tucker, DoRA": {"use_tucker": True, "weight_decompose": True}},
    "LokrModule": {**_COMMON, "factor=8": {"factor": 8}, "decompose_both": {"factor": 8, "decompose_both": True, "lora_dim": 2},
                   "full_matrix": {"full_matrix": True}, "use_tucker": {"factor": 4, "use_tucker": True},
                   "use_tucker, decompose_both": {"factor": 8, "lora_dim": 2, "use_tucker": True, "decompose_both": True},
                   "unbalanced_factorization": {"factor": 8, "unbalanced_factorization": True}, "full_matrix, rs_lora": {"full_matrix": True, "rs_lora": True},
                   **_DORA, "full_matrix, DoRA": {"full_matrix": True, "weight_decompose": True},
                   "use_tucker, DoRA": {"factor": 4, "use_tucker": True, "weight_decompose": True}},
    "DiagOFTModule": {"": {"lora_dim": 8}, "constraint": {"lora_dim": 8, "constraint": 0.5}, "rescaled": {"lora_dim": 8, "rescaled": True}},
    "ButterflyOFTModule": {"": {"lora_dim": 8}, "constraint": {"lora_dim": 8, "constraint": 0.5}, "rescaled": {"lora_dim": 8, "rescaled": True}},
    "GLoRAModule": {**_COMMON, "weight_decompose": {"weight_decompose": True}},
    "FullModule": {"": {}}, "IA3Module": {"": {}, "train_on_input": {"train_on_input": True}},
    "DyLoraModule": {"": {"block_size": 2}}, "TLoraModule": {"": {}, "use_data_init=False": {"use_data_init": False}},
}  # fmt: skip


def rows() -> Iterator[Row]:
    """Every class of LyCORIS' list, those of OPTIONS with each of their options."""
    for kind in MODULE_LIST:
        for name, options in OPTIONS.get(kind.__name__, {"": {}}).items():
            back = (kind.__name__, name) in READ_BACK
            shown = ", ".join(filter(None, [name, "as LyCORIS reads it back" if back else ""]))
            yield Row(WRITER, kind.__name__.removesuffix("Module"), shown, _writer(kind, options, back))


def _writer(kind: type, options: dict, back: bool) -> Callable[[Path], tuple]:
    names = {"NormModule": NORMS, **dict.fromkeys(LINEAR_ALONE, LAYERS[:3])}.get(kind.__name__, LAYERS)
    known = inspect.signature(kind).parameters
    fields = {name: value for name, value in ({"lora_dim": 4, "alpha": 2.0} | options).items() if name in known}

    def write(folder: Path) -> tuple:
        patcher, modules, expected = twin().patcher, nn.ModuleDict(), {}
        for number, name in enumerate(names):
            layer = layer_of(patcher, name)
            shape, before = layer.weight.shape, effective(layer, layer.weight.shape)
            try:
                module = kind(_public(name), layer, 1.0, **fields)
            except ValueError as why:
                raise NotWritten(str(why)) from why
            modules[_public(name)] = _moved(module, number)
            if back:
                state = modules.state_dict()
                module, layer = _read_back(state, name, layer_of(patcher, name))
            module.eval().apply_to()
            for end, after in effective(layer, shape).items():
                if not torch.equal(after, before[end]):
                    expected[f"{name}.{end}"] = after - before[end]
        path = folder / "lycoris.safetensors"
        save_file({key: value.detach().contiguous() for key, value in modules.state_dict().items()}, path)
        return path, patcher, expected

    return write


@torch.no_grad()
def _moved(module: nn.Module, seed: int) -> nn.Module:
    """Every trained tensor moved from its start, as if it had been trained; a lone number by more, so that it is not small."""
    for number, parameter in enumerate(module.parameters()):
        moved = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * seed + number))
        parameter += 0.1 * moved if parameter.ndim else 0.7 + 0.1 * moved
    return module


def _read_back(state: dict[str, Tensor], name: str, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    kind, tensors = get_module(state, _public(name))
    return make_module(kind, tensors, _public(name), layer), layer


def layer_of(patcher, name: str) -> nn.Module:
    """A layer of torch's own with the weights of the model's layer of this name, in fp32."""
    found = {end: comfy.utils.get_attr(patcher.model, f"{name}.{end}") for end in ("weight", "bias")}
    weight, bias = (None if tensor is None else tensor.detach().float().clone() for tensor in found.values())
    if weight.ndim == 1:
        layer = nn.GroupNorm(32, len(weight)) if "in_layers" in name else nn.LayerNorm(len(weight))
    elif weight.ndim == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    else:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


@torch.no_grad()
def effective(layer: nn.Module, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """ "weight" and "bias" with which a layer computes its outputs, read from outputs alone; shape: of the weight."""
    if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
        return _of_norm(layer, *shape)
    _, inp, *kernel = shape
    if not kernel:
        bias = layer(torch.zeros(1, inp))[0]
        return {"weight": (layer(torch.eye(inp)) - bias).T.contiguous(), "bias": bias}
    # one entry in the middle of a picture as large as the kernel: the outputs around it are the kernel, turned about
    pictures = torch.zeros(inp, inp, *kernel)
    pictures[range(inp), range(inp), kernel[0] // 2, kernel[1] // 2] = 1.0
    bias = layer(torch.zeros(1, inp, *kernel))[0, :, 0, 0]
    return {"weight": (layer(pictures) - bias[:, None, None]).flip(-1, -2).transpose(0, 1).contiguous(), "bias": bias}


def _of_norm(layer: nn.Module, size: int) -> dict[str, Tensor]:
    """Of inputs whose normalised values are -1 and 1, in turn."""
    shape = (1, size, 2) if isinstance(layer, nn.GroupNorm) else (1, size)
    ones = torch.ones(shape)
    ones[..., ::2] = -1.0
    positive, negative = layer(ones), layer(-ones)
    at = positive[0, :, 1] - negative[0, :, 1] if isinstance(layer, nn.GroupNorm) else (positive - negative)[0] * ones[0]
    both = positive[0, :, 1] + negative[0, :, 1] if isinstance(layer, nn.GroupNorm) else (positive + negative)[0]
    return {"weight": at / 2, "bias": both / 2}


def _public(name: str) -> str:
    return "lora_unet_" + name.removeprefix("diffusion_model.").replace(".", "_")
