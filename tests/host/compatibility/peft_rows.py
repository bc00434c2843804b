"""Files of peft: every tuner of the installed version, and the options that change what its tensors mean."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.compatibility.outcomes import NotWritten, Row
from comfyui_trilora.tests.host.foreign_writers import Twin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import Tensor, nn

WRITER = f"peft {peft.__version__}"
_BLOCK = "mid_block.attentions.0.transformer_blocks.0"
# square, with more inputs, with more outputs; 3 x 3, with a stride, 1 x 1
LINEAR = (f"{_BLOCK}.attn1.to_q", f"{_BLOCK}.ff.net.2", f"{_BLOCK}.ff.net.0.proj")
CONV = ("up_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", "up_blocks.0.resnets.0.conv_shortcut")
BIASED = (*LINEAR[1:], *CONV)
_LORA = {"r": 4, "lora_alpha": 6}
# what keeps the sizes of the smallest layer, where the defaults do not
_SMALL = {
    "ADALORA": {"init_r": 6, "lora_alpha": 5, "total_step": 10}, "C3A": {"block_size": 16}, "FOURIERFT": {"n_frequency": 100}, "MISS": {"r": 8},
    "OFT": {"oft_block_size": 16, "use_cayley_neumann": False}, "WAVEFT": {"n_frequency": 100}, "VBLORA": {"vector_length": 16, "num_vectors": 32},
    "XLORA": {"hidden_size": 8, "adapters": {}}, "IA3": {"feedforward_modules": [LINEAR[1]]}, "TRAINABLE_TOKENS": {"token_indices": [0, 1]},
}  # fmt: skip
_PATTERNS = {"rank_pattern": {"conv1": 2, "attn1.to_q": 3}, "alpha_pattern": {"conv1": 5, f"^{LINEAR[1]}": 1}}
_REGEX = {"alpha_pattern": {r".*attn\d\.to_[qkv]": 3, "net.(0.proj|2)": 2}}

# kind -> options by what they are called in the table
OPTIONS: dict[str, dict[str, dict]] = {
    "LORA": {
        "lora_alpha = r": {"lora_alpha": 4}, "lora_alpha = 1.5 r": {}, "use_rslora": {"use_rslora": True}, "rank_pattern, alpha_pattern": _PATTERNS,
        "alpha_pattern of expressions": _REGEX, "use_rslora, rank_pattern": {"use_rslora": True, **_PATTERNS},
        "use_dora": {"use_dora": True}, "use_dora, use_rslora": {"use_dora": True, "use_rslora": True},
        "lora_bias": {"lora_bias": True, "target_modules": list(BIASED)}, "bias=lora_only": {"bias": "lora_only"},
        "modules_to_save": {"modules_to_save": ["conv_in", "conv_norm_out"]}, "target_modules as an expression": {"target_modules": r".*(attn1\.to_q|resnets\.0\.conv1)"},
        "init_lora_weights=gaussian": {"init_lora_weights": "gaussian"}, "velora_config": {"velora_config": VeloraConfig(num_groups=8), "target_modules": list(LINEAR)},
        "monteclora_config": {"monteclora_config": MontecloraConfig(), "target_modules": list(LINEAR)},
        "kasa_config": {"kasa_config": KasaConfig(), "target_modules": list(LINEAR)},
        "use_bdlora": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["to_q"], nblocks=2, match_strict=False), "target_modules": list(LINEAR)},
        **{f"init_lora_weights={init}": {"init_lora_weights": init, "target_modules": list(LINEAR)}
           for init in ("orthogonal", "mica", "pissa", "pissa_niter_4", "olora")},
    },
    "ADALORA": {"": {}, "lora_alpha = 1": {"lora_alpha": 1}},
    "LOHA": {"alpha = r": {"r": 4, "alpha": 4}, "alpha = 4 r": {"r": 4, "alpha": 16}, "use_effective_conv2d": {"r": 4, "alpha": 2, "use_effective_conv2d": True},
             "rank_pattern, alpha_pattern": {"r": 4, **_PATTERNS}},
    "LOKR": {"alpha = r": {"r": 4, "alpha": 4}, "alpha = 4 r": {"r": 4, "alpha": 16}, "decompose_both": {"r": 2, "alpha": 5, "decompose_both": True},
             "both factors whole": {"r": 256, "alpha": 64}, "both factors whole, rank_pattern": {"r": 256, "rank_pattern": {"to_q": 128}},
             "use_effective_conv2d": {"r": 4, "alpha": 2, "use_effective_conv2d": True}, "decompose_factor": {"r": 4, "alpha": 2, "decompose_factor": 4},
             "rank_pattern, alpha_pattern": {"r": 4, **_PATTERNS}},
    "OFT": {"": {}, "r": {"r": 4, "oft_block_size": 0}, "coft": {"coft": True, "eps": 0.5}, "block_share": {"block_share": True},
            "use_cayley_neumann": {"use_cayley_neumann": True}},
    "BOFT": {"": {}, "boft_block_size=8": {"boft_block_size": 8}, "boft_n_butterfly_factor=2": {"boft_block_size": 8, "boft_n_butterfly_factor": 2}},
    "VERA": {"": {}, "save_projection=False": {"save_projection": False}},
    "IA3": {"": {}}, "FOURIERFT": {"": {}},
}  # fmt: skip


@functools.cache
def twin() -> Twin:
    """The host's tiny U-Net and diffusers', made once for all rows."""
    return Twin(tiny_models.eps_prediction_model().patcher)


def rows() -> Iterator[Row]:
    """Every tuner that peft can merge, those of OPTIONS with each of their options; peft says itself which cannot."""
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if hasattr(PEFT_TYPE_TO_TUNER_MAPPING[kind], "merge_and_unload"):
            for name, options in OPTIONS.get(kind.value, {"": {}}).items():
                yield Row(WRITER, kind.value, name, _writer(config, _SMALL.get(kind.value, {}) | options))


def _writer(config, options: dict) -> Callable[[Path], tuple]:
    def write(folder: Path) -> tuple:
        fields = dict(options)
        if issubclass(config, peft.LoraConfig):
            fields = _LORA | fields
        elif "r" in config.__dataclass_fields__ and "r" not in fields and "oft_block_size" not in fields:
            fields["r"] = 4
        try:
            if "target_modules" in fields:
                model = _wrapped(config, fields)
            else:
                model = _widest(config, fields)
            path = save(model, folder)
            return path, twin().patcher, change(model.merge_and_unload())
        except (TypeError, ValueError, NotImplementedError, AttributeError, ImportError, KeyError, RuntimeError) as why:
            raise NotWritten(f"{type(why).__name__}: {why}".splitlines()[0]) from why

    return write


def _widest(config, fields: dict):
    """peft's model on linear layers and convolutions, or on linear layers alone where it takes no others."""
    if "target_modules" not in config.__dataclass_fields__:
        return _wrapped(config, fields)
    try:
        return _wrapped(config, fields | {"target_modules": [*LINEAR, *CONV]})
    except (TypeError, ValueError, NotImplementedError, AttributeError, KeyError):
        biased = {"BEFT": LINEAR[1:]}.get(config.__name__.removesuffix("Config").upper(), LINEAR)
        return _wrapped(config, fields | {"target_modules": list(biased)})


def _wrapped(config, fields: dict):
    return moved(peft.get_peft_model(twin().fresh(), config(**fields)))


def moved(model: nn.Module) -> nn.Module:
    """Every trained tensor moved from its start, as if it had been trained."""
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).to(parameter.dtype)
    return model


def save(model, folder: Path, **options) -> Path:
    """peft's own save_pretrained."""
    model.save_pretrained(folder, **options)
    return folder / "adapter_model.safetensors"


def change(unet: nn.Module) -> dict[str, Tensor]:
    """The host's key of a weight or bias -> what has been merged into it, where anything has."""
    state, found = unet.state_dict(), {}
    for module, target in twin().targets.items():
        for end in ("weight", "bias"):
            before = twin().state.get(f"{module}.{end}")
            if before is not None and not torch.equal(state[f"{module}.{end}"], before):
                found[target.removesuffix("weight") + end] = state[f"{module}.{end}"].detach() - before
    return found
