"""Files of diffusers' pipelines with layers of their text encoders: the first layer of encoders as wide as the host's.

The host's encoders are on `meta`: what a plain LoRA adds to a weight does not depend on the weight.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.model_patcher
import comfy.sd
import diffusers
import torch
from comfyui_trilora.tests.host import meta_encoders
from comfyui_trilora.tests.host.compatibility.diffusers_rows import FAMILIES, FILE, WRITER
from comfyui_trilora.tests.host.compatibility.outcomes import Row
from comfyui_trilora.tests.host.compatibility.peft_rows import moved
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

# family -> the host's text encoders, and its names for those that diffusers trains
ENCODERS = {"SD1.5": ("SD1", ("clip_l",)), "SDXL": ("SDXL", ("clip_l", "clip_g")), "SD3": ("SD3", ("clip_l", "clip_g")), "Flux": ("Flux", ("clip_l",))}
_SIZES = {"clip_l": (768, 3072, 12), "clip_g": (1280, 5120, 20)}
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def rows() -> Iterator[Row]:
    """The text encoders of each pipeline, with and without their configuration."""
    for family, (host, encoders) in ENCODERS.items():
        for options, alpha in (("lora_alpha = 2 r", 6), ("without its configuration", 3)):
            shown = " and ".join(("text_encoder", "text_encoder_2")[: len(encoders)])
            yield Row(WRITER, f"{family}, {FAMILIES[family].pipeline}.save_lora_weights of {shown}", options, _writer(family, host, encoders, alpha))


def _writer(family: str, host: str, encoders: tuple[str, ...], alpha: int) -> Callable[[Path], tuple]:
    def write(folder: Path) -> tuple:
        layers, expected = {}, {}
        for number, name in enumerate(encoders):
            part = "text_encoder" + ("_2" if number else "")
            model, tensors, change = _trained(name, alpha)
            layers[f"{part}_lora_layers"] = tensors
            if alpha != 3:
                layers[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
            expected |= change
        getattr(diffusers, FAMILIES[family].pipeline).save_lora_weights(folder, **layers)
        return folder / FILE, (FAMILIES[family].host(), _clip(host)), expected

    return write


def _trained(name: str, alpha: int) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """(peft's model, its tensors as diffusers saves them, the host's key -> what peft merges into the weight)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width, inner, heads = _SIZES[name]
    config = CLIPTextConfig(vocab_size=20, num_hidden_layers=1, hidden_size=width, intermediate_size=inner, num_attention_heads=heads)
    with torch.device("meta"):
        encoder = (CLIPTextModel if name == "clip_l" else CLIPTextModelWithProjection)(config)
    encoder = encoder.to_empty(device="cpu")
    for parameter in encoder.parameters():
        nn.init.zeros_(parameter)
    model = moved(get_peft_model(encoder, LoraConfig(r=3, lora_alpha=alpha, target_modules=TARGETS)))
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in get_peft_model_state_dict(model).items()}
    merged = model.merge_and_unload()
    change = {}
    for module, layer in merged.named_modules():
        if module.endswith(tuple(TARGETS)):
            _, _, path = module.rpartition("encoder.layers.")
            change[f"{name}.transformer.text_model.encoder.layers.{path}.weight"] = layer.weight.detach()
    return model, tensors, change


def _clip(host: str):
    """The host's CLIP without a tokenizer."""
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = meta_encoders.build(meta_encoders.ENCODERS[host])
    clip.patcher = comfy.model_patcher.ModelPatcher(clip.cond_stage_model, torch.device("cpu"), torch.device("cpu"))
    clip.tokenizer, clip.layer_idx, clip.tokenizer_options = None, None, {}
    clip.use_clip_schedule, clip.apply_hooks_to_conds = False, None
    return clip
