"""Every text encoder that a host can load, built on the `meta` device."""

import importlib
import inspect
from typing import NamedTuple

import torch

# what the host finds in a file and passes to those that ask for it
FOUND = {"dtype_t5": torch.bfloat16, "dtype_llama": torch.bfloat16, "llama_quantization_metadata": None, "t5_quantization_metadata": None}


class Encoders(NamedTuple):
    """module: below comfy; maker: a class, or with options a function that gives one; layers: group -> how many.

    layouts: the known models that use them; vision: whether there is a part for images.
    """

    module: str
    maker: str
    layers: dict[str, int]
    layouts: tuple[str, ...] = ()
    options: dict | None = None
    vision: bool = False


_TE, _CLIP, _T5, _LLM = "text_encoders.", {"TE1": 12, "TE2": 32}, {"T5": 24}, {"LLM": 36}
ENCODERS: dict[str, Encoders] = {
    "SD1": Encoders("sd1_clip", "SD1ClipModel", {"TE1": 12}, ("SD1.5",)),
    "SD2": Encoders(_TE + "sd2_clip", "SD2ClipModel", {"TE1": 24}, ("SD2",)),
    "SDXL": Encoders("sdxl_clip", "SDXLClipModel", _CLIP, ("SDXL", "SSD-1B")),
    "SDXL refiner": Encoders("sdxl_clip", "SDXLRefinerClipModel", {"TE2": 32}, ("SDXL refiner",)),
    "Stable Cascade": Encoders("sdxl_clip", "StableCascadeClipModel", {"TE2": 32}),
    "SD3": Encoders(_TE + "sd3_clip", "sd3_clip", {**_CLIP, **_T5}, ("SD3 Medium", "SD3.5 Large"), {}),
    "Flux": Encoders(_TE + "flux", "flux_clip", {"TE1": 12, **_T5}, ("Flux.1",), {}),
    "Flux.2": Encoders(_TE + "flux", "flux2_te", {"LLM": 40}, ("Flux.2 dev",), {}),
    "Flux.2, pruned": Encoders(_TE + "flux", "flux2_te", {"LLM": 30}, (), {"pruned": True}),
    "Klein 4B": Encoders(_TE + "flux", "klein_te", _LLM, ("Flux.2 Klein 4B",), {"model_type": "qwen3_4b"}),
    "Klein 9B": Encoders(_TE + "flux", "klein_te", _LLM, ("Flux.2 Klein 9B",), {"model_type": "qwen3_8b"}),
    "PixArt": Encoders(_TE + "pixart_t5", "pixart_te", _T5, ("PixArt", "Chroma"), {}),
    "AuraFlow": Encoders(_TE + "aura_t5", "AuraT5Model", _T5, ("AuraFlow",)),
    "HunyuanDiT": Encoders(_TE + "hydit", "HyditModel", {"TE1": 24, **_T5}, ("HunyuanDiT",)),
    "Mochi": Encoders(_TE + "genmo", "mochi_te", _T5, ("Mochi",), {}),
    "CogVideoX": Encoders(_TE + "cogvideo", "cogvideo_te", _T5, ("CogVideoX 5B",), {}),
    "LTX-Video": Encoders(_TE + "lt", "ltxv_te", _T5, ("LTXV 2B", "LTXV 13B"), {}),
    "LTX-2": Encoders(_TE + "lt", "ltxav_te", {"LLM": 48}, ("LTX-2",), {}, vision=True),
    "Cosmos": Encoders(_TE + "cosmos", "te", _T5, ("Cosmos-Predict2 2B", "Cosmos-Predict2 14B"), {}),
    "Wan": Encoders(_TE + "wan", "te", _T5, ("Wan 14B", "Wan 14B VACE", "Wan 1.3B", "Wan 2.2 5B"), {}),
    "HunyuanVideo": Encoders(_TE + "hunyuan_video", "hunyuan_video_clip", {"TE1": 12, "LLM": 32}, ("HunyuanVideo",), {}),
    "HunyuanImage": Encoders(_TE + "hunyuan_image", "te", {"T5": 12, "LLM": 28}, ("HunyuanImage 2.1", "HunyuanVideo 1.5"), {}, vision=True),
    "HiDream": Encoders(_TE + "hidream", "hidream_clip", {**_CLIP, **_T5, "LLM": 32}, ("HiDream-I1",), {}),
    "Lumina-Image 2": Encoders(_TE + "lumina2", "te", {"LLM": 26}, ("Lumina-Image 2",), {}),
    "Gemma 3 4B": Encoders(_TE + "lumina2", "te", {"LLM": 34}, (), {"model_type": "gemma3_4b"}),
    "NewBie": Encoders(_TE + "newbie", "te", {"TE1": 24, "LLM": 34}, (), {}),
    "Jina CLIP": Encoders(_TE + "jina_clip_2", "JinaClip2TextModelWrapper", {"TE1": 24}),
    "Z-Image": Encoders(_TE + "z_image", "te", _LLM, ("Z-Image",), {}),
    "OmniGen2": Encoders(_TE + "omnigen2", "te", _LLM, ("OmniGen2",), {}),
    "Boogu": Encoders(_TE + "boogu", "te", _LLM, (), {}, vision=True),
    "Qwen-Image": Encoders(_TE + "qwen_image", "te", {"LLM": 28}, ("Qwen-Image",), {}, vision=True),
    "Kandinsky 5": Encoders(_TE + "kandinsky5", "te", {"TE1": 12, "LLM": 28}, ("Kandinsky 5 Lite",), {}, vision=True),
    "LongCat-Image": Encoders(_TE + "longcat_image", "te", {"LLM": 28}, (), {}, vision=True),
    "Anima": Encoders(_TE + "anima", "te", {"LLM": 28}, ("Anima",), {}),
    "Krea 2": Encoders(_TE + "krea2", "te", _LLM, ("Krea 2",), {}, vision=True),
    "Ideogram 4": Encoders(_TE + "ideogram4", "te", _LLM, ("Ideogram 4",), {}),
    "Ernie-Image": Encoders(_TE + "ernie", "te", {"LLM": 26}, ("Ernie-Image",), {}),
    "Mage-Flow": Encoders(_TE + "mage_flow", "te", _LLM, (), {}, vision=True),
    "JoyImage": Encoders(_TE + "joyimage", "te", _LLM, (), {}, vision=True),
    "Lens": Encoders(_TE + "gpt_oss", "lens_te", {"LLM": 24}, (), {}),
    "Ovis": Encoders(_TE + "ovis", "te", {"LLM": 28}, (), {}),
    "Qwen3-VL": Encoders(_TE + "qwen3vl", "te", _LLM, (), {}, vision=True),
    "Qwen3.5": Encoders(_TE + "qwen35", "te", {"LLM": 24}, (), {}, vision=True),
    "MiniMax H3": Encoders(_TE + "minimax", "te", {"LLM": 50}, (), {}, vision=True),
    "MiniMax Music": Encoders(_TE + "minimax_music", "MiniMaxMusic3TEModel", _LLM),
    "PixelDiT": Encoders(_TE + "pixeldit", "pixeldit_te", {"LLM": 26}, (), {}),
    "ACE-Step": Encoders(_TE + "ace", "AceT5Model", {"T5": 12}),
    "ACE-Step 1.5": Encoders(_TE + "ace15", "te", {"LLM": 28, "LLM2": 28}, (), {}),
    "Stable Audio": Encoders(_TE + "sa_t5", "SAT5Model", {"T5": 12}),
    "Stable Audio 3": Encoders(_TE + "sa3", "SAT5GemmaModel", {"T5": 12}),
}


def build(encoders: Encoders) -> torch.nn.Module:
    """The host's `cond_stage_model`. Raises ModuleNotFoundError or AttributeError where the host has no such text encoder."""
    maker = getattr(importlib.import_module(f"comfy.{encoders.module}"), encoders.maker)
    if encoders.options is not None:
        known = inspect.signature(maker).parameters
        maker = maker(**{name: value for name, value in FOUND.items() if name in known}, **encoders.options)
    return maker(device=torch.device("meta"), dtype=torch.bfloat16, model_options={})
