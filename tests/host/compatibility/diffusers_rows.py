"""Files of diffusers' pipelines, `save_lora_weights`, for models of the host that have all the blocks of their families.

diffusers' model beside the host's has the same weights; which of its layers is which of the host's weights, or which part
of one, is told by the host's own tables for checkpoints.
"""

import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here asks the network for anything

from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import comfy.utils  # noqa: E402
import diffusers  # noqa: E402
import torch  # noqa: E402
from comfyui_trilora.tests.host import small_families, tiny_models  # noqa: E402
from comfyui_trilora.tests.host.compatibility.outcomes import Row  # noqa: E402
from comfyui_trilora.tests.host.compatibility.peft_rows import moved  # noqa: E402
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya  # noqa: E402
from peft import LoraConfig  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402
from torch import Tensor, nn  # noqa: E402

WRITER = f"diffusers {diffusers.__version__}"
FILE = "pytorch_lora_weights.safetensors"
PLAIN = (nn.Linear, nn.Conv2d)
_UNET = {"sample_size": 8, "layers_per_block": 2, "cross_attention_dim": 48, "attention_head_dim": 4}


@dataclass(frozen=True)
class Family:
    """host: () -> the host's patcher; model: () -> diffusers' model; pipeline, part: the pipeline's class and its name for the model."""

    host: Callable
    model: Callable[[], nn.Module]
    pipeline: str
    part: str
    table: Callable[[dict], dict]


def _sd15() -> nn.Module:
    kinds = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    return diffusers.UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), down_block_types=kinds, up_block_types=_up(kinds), **_UNET)


def _sdxl() -> nn.Module:
    kinds = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64), down_block_types=kinds, up_block_types=_up(kinds), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, **_UNET)  # fmt: skip


def _up(kinds: list[str]) -> list[str]:
    return [kind.replace("Down", "Up") for kind in reversed(kinds)]


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=48,
        caption_projection_dim=128, pooled_projection_dim=32, out_channels=16, pos_embed_max_size=16, qk_norm="rms_norm")  # fmt: skip


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48,
        pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(8, 12, 12))  # fmt: skip


def _unet_table(config: dict) -> dict:
    return {name: f"diffusion_model.{key}" for name, key in comfy.utils.unet_to_diffusers(config).items()}


FAMILIES = {
    "SD1.5": Family(small_families.sd15, _sd15, "StableDiffusionPipeline", "unet", _unet_table),
    "SDXL": Family(small_families.sdxl, _sdxl, "StableDiffusionXLPipeline", "unet", _unet_table),
    "SD3": Family(lambda: tiny_models.flow_model().patcher, _sd3, "StableDiffusion3Pipeline", "transformer",
                  lambda config: comfy.utils.mmdit_to_diffusers(config, output_prefix="diffusion_model.")),
    "Flux": Family(lambda: tiny_models.flux_model().patcher, _flux, "FluxPipeline", "transformer",
                   lambda config: comfy.utils.flux_to_diffusers(config, output_prefix="diffusion_model.")),
}  # fmt: skip
_PATTERNS = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 1, "ff.net.2": 7}}
OPTIONS: dict[str, dict] = {
    "lora_alpha = r": {"lora_alpha": 3}, "lora_alpha = 2 r": {}, "use_rslora": {"use_rslora": True}, "rank_pattern, alpha_pattern": _PATTERNS,
    "use_dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}, "init_lora_weights=gaussian": {"init_lora_weights": "gaussian"},
    "init_lora_weights=pissa": {"init_lora_weights": "pissa"},
}  # fmt: skip


class Pair:
    """A model of the host's and one of diffusers' with the same weights. `places`: diffusers' name -> (key, slice, function)."""

    def __init__(self, family: Family):
        self.family, self.patcher = family, family.host()
        table = family.table(self.patcher.model.model_config.unet_config)
        self.weights = {key: tensor.detach().float() for key, tensor in self.patcher.model.state_dict().items()}
        places = {name: (place if isinstance(place, tuple) else (place,)) for name, place in table.items()}
        self.places = {name: (*place, None, None)[:3] for name, place in places.items() if place[0] in self.weights or isinstance(table[name], tuple)}

    def fresh(self) -> nn.Module:
        """diffusers' model with the host's weights in it."""
        model = self.family.model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.places and self.places[name][0] in self.weights:
                    key, part, function = self.places[name]
                    weight = self.weights[key] if part is None else self.weights[key].narrow(*part)
                    parameter.copy_((function or _same)(weight))
        return model

    def change(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
        """The host's key -> what diffusers' change is in the host's weight, zero in the parts of it that no layer changes."""
        found: dict[str, Tensor] = {}
        for name, (key, part, function) in self.places.items():
            if name in after and not torch.equal(before[name], after[name]):
                whole = found.setdefault(key, torch.zeros(self.weights[key].shape))
                (whole if part is None else whole.narrow(*part)).copy_((function or _same)(after[name] - before[name]))
        return found


def _same(tensor: Tensor) -> Tensor:
    return tensor


@functools.cache
def _pair(family: str) -> Pair:
    return Pair(FAMILIES[family])


def rows() -> Iterator[Row]:
    """Each pipeline with each of the options, and the other ways in which its files are written."""
    for name, family in FAMILIES.items():
        for options, fields in OPTIONS.items():
            yield Row(WRITER, f"{name}, {family.pipeline}.save_lora_weights", options, _writer(name, fields, _with_config))
        yield Row(WRITER, f"{name}, {family.pipeline}.save_lora_weights", "without its configuration", _writer(name, {"lora_alpha": 3}, _without_config))
        yield Row(WRITER, f"{name}, save_lora_adapter", "lora_alpha = 2 r", _writer(name, {}, _by_the_model))
        if family.part == "unet":
            yield Row(WRITER, f"{name}, {family.pipeline}.save_lora_weights", "older keys of the training scripts", _writer(name, {"lora_alpha": 3}, _older_keys))
            yield Row(WRITER, f"{name}, convert_state_dict_to_kohya", "lora_alpha = r", _writer(name, {"lora_alpha": 3}, _kohya))


def _writer(family: str, fields: dict, write: Callable) -> Callable[[Path], tuple]:
    def run(folder: Path) -> tuple:
        pair = _pair(family)
        model = pair.fresh()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        biased = {name.removesuffix(".bias") for name in before if name.endswith(".bias")}
        attention = "attn" if write is _older_keys else ""
        names = [name for name, module in model.named_modules() if isinstance(module, PLAIN) and f"{name}.weight" in pair.places and attention in name]
        names = [name for name in names if not fields.get("lora_bias") or name in biased]
        if fields:  # the rows without options have every layer
            names = names[::5]
        if fields.get("init_lora_weights") == "pissa":
            names = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
        model.add_adapter(LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": names, **fields}))
        moved(model)
        write(pair, model, folder)
        model.fuse_lora()
        model.unload_lora()
        return folder / FILE, pair.patcher, pair.change(before, dict(model.named_parameters()))

    return run


def _save(pair: Pair, folder: Path, tensors: dict, **more) -> None:
    part = pair.family.part
    metadata = {f"{part}_lora_adapter_metadata": more["config"]} if "config" in more else {}
    getattr(diffusers, pair.family.pipeline).save_lora_weights(folder, **{f"{part}_lora_layers": tensors}, **metadata)


def _with_config(pair: Pair, model: nn.Module, folder: Path) -> None:
    _save(pair, folder, get_peft_model_state_dict(model), config=model.peft_config["default"].to_dict())


def _without_config(pair: Pair, model: nn.Module, folder: Path) -> None:
    _save(pair, folder, get_peft_model_state_dict(model))


def _older_keys(pair: Pair, model: nn.Module, folder: Path) -> None:
    _save(pair, folder, convert_state_dict_to_diffusers(get_peft_model_state_dict(model)))


def _by_the_model(pair: Pair, model: nn.Module, folder: Path) -> None:
    model.save_lora_adapter(folder)


def _kohya(pair: Pair, model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in get_peft_model_state_dict(model).items()})
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / FILE)
