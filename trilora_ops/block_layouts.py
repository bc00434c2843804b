"""Known models by name: their blocks without the model, for a menu and for text that is written before one is loaded."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """family: a name of FAMILIES. blocks: group -> how many (of a place that is no list: 1). encoders: group -> layers.

    vision: whether the LLM comes with the part that sees images.
    """

    family: str
    blocks: dict[str, int]
    encoders: dict[str, int]
    vision: bool = False


# How many blocks a model has is a fact of its published weights; tests/host/test_block_registry.py builds each of these.
LAYOUTS: dict[str, Layout] = {
    "SD1.5": Layout("unet", dict(EMB=1, IN=12, MID=3, OUT=12, FINAL=1), dict(TE1=12)),
    "SD2": Layout("unet", dict(EMB=1, IN=12, MID=3, OUT=12, FINAL=1), dict(TE1=24)),
    "SDXL": Layout("unet", dict(EMB=1, IN=9, MID=3, OUT=9, FINAL=1), dict(TE1=12, TE2=32)),
    "SDXL refiner": Layout("unet", dict(EMB=1, IN=12, MID=3, OUT=12, FINAL=1), dict(TE2=32)),
    "SSD-1B": Layout("unet", dict(EMB=1, IN=9, MID=1, OUT=9, FINAL=1), dict(TE1=12, TE2=32)),
    "SD3 Medium": Layout("sd3", dict(EMB=1, J=24, FINAL=1), dict(TE1=12, TE2=32, T5=24)),
    "SD3.5 Large": Layout("sd3", dict(EMB=1, J=38, FINAL=1), dict(TE1=12, TE2=32, T5=24)),
    "Flux.1": Layout("flux", dict(IN=1, D=19, S=38, FINAL=1), dict(TE1=12, T5=24)),
    "Flux.2 dev": Layout("flux", dict(IN=1, MOD=1, D=8, S=48, FINAL=1), dict(LLM=40)),
    "Flux.2 Klein 4B": Layout("flux", dict(IN=1, MOD=1, D=5, S=20, FINAL=1), dict(LLM=36)),
    "Flux.2 Klein 9B": Layout("flux", dict(IN=1, MOD=1, D=8, S=24, FINAL=1), dict(LLM=36)),
    "Chroma": Layout("flux", dict(IN=1, GUID=1, D=19, S=38, FINAL=1), dict(T5=24)),
    "HunyuanVideo": Layout("hunyuan_video", dict(IN=1, R=2, D=20, S=40, FINAL=1), dict(TE1=12, LLM=32)),
    "HunyuanImage 2.1": Layout("hunyuan_video", dict(IN=1, R=2, D=20, S=40, FINAL=1), dict(T5=12, LLM=28), vision=True),
    "HunyuanVideo 1.5": Layout("hunyuan_video", dict(IN=1, R=2, D=54, FINAL=1), dict(T5=12, LLM=28), vision=True),
    "Wan 14B": Layout("wan", dict(EMB=1, B=40, FINAL=1), dict(T5=24)),
    "Wan 14B VACE": Layout("wan", dict(EMB=1, V=8, B=40, FINAL=1), dict(T5=24)),
    "Wan 1.3B": Layout("wan", dict(EMB=1, B=30, FINAL=1), dict(T5=24)),
    "Wan 2.2 5B": Layout("wan", dict(EMB=1, B=30, FINAL=1), dict(T5=24)),
    "Qwen-Image": Layout("qwen_image", dict(EMB=1, B=60, FINAL=1), dict(LLM=28), vision=True),
    "Lumina-Image 2": Layout("lumina2", dict(EMB=1, NR=2, CR=2, L=26, FINAL=1), dict(LLM=26)),
    "Z-Image": Layout("lumina2", dict(EMB=1, NR=2, CR=2, L=30, FINAL=1), dict(LLM=36)),
    "LTXV 2B": Layout("ltx", dict(EMB=1, B=28, FINAL=1), dict(T5=24)),
    "LTXV 13B": Layout("ltx", dict(EMB=1, B=48, FINAL=1), dict(T5=24)),
    "LTX-2": Layout("ltx", dict(EMB=1, VC=2, AC=2, B=48, FINAL=1), dict(LLM=48), vision=True),
    "AuraFlow": Layout("auraflow", dict(EMB=1, D=4, S=32, FINAL=1), dict(T5=24)),
    "HiDream-I1": Layout("hidream", dict(EMB=1, D=16, S=32, FINAL=1), dict(TE1=12, TE2=32, T5=24, LLM=32)),
    "Cosmos-Predict2 2B": Layout("cosmos2", dict(EMB=1, B=28, FINAL=1), dict(T5=24)),
    "Cosmos-Predict2 14B": Layout("cosmos2", dict(EMB=1, B=36, FINAL=1), dict(T5=24)),
    "Anima": Layout("cosmos2", dict(EMB=1, A=6, B=28, FINAL=1), dict(LLM=28)),
    "Krea 2": Layout("krea2", dict(EMB=1, TL=2, TR=2, B=28, FINAL=1), dict(LLM=36), vision=True),
    "OmniGen2": Layout("omnigen2", dict(EMB=1, NR=2, RR=2, CR=2, L=32, FINAL=1), dict(LLM=36)),
    "Kandinsky 5 Lite": Layout("kandinsky5", dict(EMB=1, T=2, V=32, FINAL=1), dict(TE1=12, LLM=28), vision=True),
    "PixArt": Layout("pixart", dict(EMB=1, B=28, FINAL=1), dict(T5=24)),
    "HunyuanDiT": Layout("hunyuan_dit", dict(EMB=1, B=40, FINAL=1), dict(TE1=24, T5=24)),
    "Mochi": Layout("mochi", dict(EMB=1, B=48, FINAL=1), dict(T5=24)),
    "CogVideoX 5B": Layout("cogvideox", dict(EMB=1, B=42, FINAL=1), dict(T5=24)),
    "Ernie-Image": Layout("ernie_image", dict(EMB=1, L=36, FINAL=1), dict(LLM=26)),
    "Ideogram 4": Layout("ideogram4", dict(EMB=1, L=34, FINAL=1), dict(LLM=36)),
}
