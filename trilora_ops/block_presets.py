"""Block weights by name, as texts of one dialect or another; a preset belongs to the models for which its text has a reading.

Lists are bound by their length and by whose they are: `lbw=` is webui's form in a prompt, `LBW=...;` Inspire's. Sources: the defaults
of sd-webui-lora-block-weight; the presets of Inspire-Pack (SD-, SDXL-, FLUX-) and its examples, whose SD-LyCO lists are
webui's 26; the set for SD1.x that circulates among users (BODY to KEEPBG); Realtime-Lora's Face Focus; and the blocks
that papers name: Block-wise LoRA (arXiv:2403.07500), B-LoRA (arXiv:2403.14572), InstantStyle (arXiv:2404.02733).
"""

from __future__ import annotations


def _list(runs: str) -> str:
    """"1 0*3 R" -> "1,0,0,0,R"."""
    slots = []
    for run in runs.split():
        value, _, count = run.partition("*")
        slots += [value] * int(count or 1)
    return ",".join(slots)


_LISTS = {
    # sd-webui-lora-block-weight
    "NONE": "0*17", "ALL": "1*17", "INS": "1*4 0*13", "IND": "1 0*3 1*3 0*10", "INALL": "1*7 0*10", "MIDD": "1 0*3 1*8 0*5", "OUTD": "1 0*7 1*4 0*5",
    "OUTS": "1 0*11 1*5", "OUTALL": "1 0*7 1*9", "ALL0.5": "0.5*17", "ROUT": "X 1*11 X*5",
    # Inspire-Pack
    "SD-NONE": "0*17", "SD-ALL": "1*17", "SD-INS": "1*4 0*13", "SD-IND": "1 0*3 1*3 0*10", "SD-INALL": "1*7 0*10", "SD-MIDD": "1 0*3 1*8 0*5",
    "SD-MIDD0.2": "1 0*5 0.2 0.4*2 0.2 0*7", "SD-MIDD0.8": "1 0*4 0.5 0.8*2 0.4 0*8", "SD-MOUT": "1 0*5 1*8 0.5 0*2", "SD-OUTD": "1 0*7 1*4 0*5",
    "SD-OUTS": "1 0*11 1*5", "SD-OUTALL": "1 0*7 1*9", "SD-AOUT": "A 1*11 A*5", "SD-AB": "A B*11 A*5", "SD-ALL0.5": "0.5*17",
    "SD-LyC-NONE": "0*27", "SD-LyC-ALL": "1*27", "SD-LyC-INALL": "1*12 0*15", "SD-LyC-MIDALL": "1 0*11 1*3 0*12", "SD-LyC-OUTALL": "1 0*14 1*12",
    "SDXL-NONE": "0*12", "SDXL-ALL": "1*12", "SDXL-INALL": "1*5 0*7", "SDXL-MIDALL": "1 0*4 1 0*6", "SDXL-OUTALL": "1 0*5 1*6",
    "SDXL-LyC-NONE": "0*21", "SDXL-LyC-ALL": "1*21", "SDXL-LyC-INALL": "1*9 0*12", "SDXL-LyC-MIDALL": "1 0*8 1*3 0*9", "SDXL-LyC-OUTALL": "1 0*11 1*9",
    "FLUX-SINGLE-ALL": "1 0*19 1*38", "FLUX-SINGLE-1to10": "1 0*19 1*10 0*28", "FLUX-SINGLE-11to20": "1 0*29 1*10 0*18",
    "FLUX-SINGLE-21to30": "1 0*39 1*10 0*8", "FLUX-SINGLE-31to37": "1 0*49 1*8", "FLUX-ALL": "1*58",
    # its examples
    "SD-BODY": "1*8 0*3 1*6", "SD-BODY0.5": "1*6 0.2 1 0.2 0*2 0.8 1*5", "SD-FACE": "1 0*7 1*3 0*6", "SD-FACE0.5": "1 0*7 0.8 1*2 0.2 0*5",
    "SD-FACE0.2": "1 0*7 0.2 0.6 0.8 0.2 0*5", "SD-HAND": "1 0 1*2 0.2 0*12", "SD-CLOTHING": "1*5 0 0.2 0 0.8 1*2 0.2 0*5",
    "SD-POSE": "1 0*5 0.2 1*3 0*7", "SD-PALETTE": "1 0*10 0.8 1*5", "SD-KEEPCHAR": "1*5 0*3 1*7 0*2", "SD-KEEPBG": "1*6 0.2 1 0.2 0*2 0.8 1*3 0*2",
    "SD-REDUCEFIT": "1 0*7 1*9",
    # community
    "BODY": "1*8 0*3 1*6", "FACE": "1 0*7 1*3 0*6", "FACE0.5": "1 0*7 0.8 1*2 0.2 0*5", "HAND": "1 0 1*2 0.2 0*12",
    "CLOTHING": "1*5 0 0.2 0 0.8 1*2 0.2 0*5", "POSE": "1 0*5 0.2 1*3 0*7", "PALETTE": "1 0*10 0.8 1*5", "KEEPCHAR": "1*5 0*3 1*7 0*2",
    "KEEPBG": "1*6 0.2 1 0.2 0*2 0.8 1*3 0*2",
    # Realtime-Lora: the blocks named are on, all else is off (12: BASE first; 58: BASE, doubles, singles)
    "Face Focus (SDXL)": "0*3 1*7 0*2", "Face Focus (Flux)": "0 0*7 1 0*4 1 0*3 1 0*2 0*7 1 0*4 1 0*3 1 0*3 1 0*17",
    # the transformers that B-LoRA and InstantStyle name
    "B-LoRA content": "0*6 1 0*5", "B-LoRA style": "0*7 1 0*4", "InstantStyle style": "0*7 1 0*4", "InstantStyle layout": "0*4 1 0*7",
    "InstantStyle style and layout": "0*4 1 0*2 1 0*4",
}

# 20 numbers are Flux's doubles here and SDXL in webui, and R is another number there
_INSPIRE_LISTS = {
    "FLUX-DBL-ALL": "1*20", "FLUX-DBL-FRONT7": "1*8 0*12", "FLUX-DBL-MID6": "1 0*7 1*6 0*6", "FLUX-DBL-TAIL6": "1 0*13 1*6",
    "SD-ROUT": "1*8 R*9",
}
# 20, 26 and 61 numbers are lists of Inspire's too, for other models
_WEBUI_LISTS = {
    "FLUXALL": "1*61",
    # from Inspire-Pack's examples, where webui's lists land one block late; SD-LyCOBODY0.5 is left out, it has 25 numbers and no reading
    "SD-LyCOBODY": "1*13 0*5 1*8", "SD-LyCOFACE": "1 0*13 1*7 0*5", "SD-LyCOFACE0.5": "1 0*13 0.2 0.5 0.8 1*3 0.2 0*5",
    "SD-LyCOCLOTH": "1*8 0 0.2*3 0*4 0.5 0.8 1*2 0.2 0*5", "SD-LyCOPOSE": "1 0*8 0.2 1*9 0*7",
    "SD-LyCOKEEPBG": "1*9 0.2 0.4 0.8 1*2 0.8 0.4 0.2*2 0*2 0.8 1*3 0*2", "SD-LyCOPALETTE": "1 0*19 0.8 1*5",
    # Block-wise LoRA's levels of the U-Net, with the text encoder
    "Block-wise full (SD1.x)": "1*26", "Block-wise full (SDXL)": "1*20",
}
# in which BASE means the text encoders alone; the upper one of SDXL holds no attention
_WEBUI_LISTS_OF_BLOCKS = {
    "Block-wise upper (SD1.x)": "1 0 1*3 0*18 1*3", "Block-wise middle (SD1.x)": "1 0*4 1*3 0*12 1*3 0*3", "Block-wise bottom (SD1.x)": "1 0*7 1*3 0*6 1*3 0*6",
    "Block-wise upper (SDXL)": "1 0 1*3 0*12 1*3", "Block-wise middle (SDXL)": "1 0*4 1*3 0*6 1*3 0*3", "Block-wise bottom (SDXL)": "1 0*7 1*6 0*6",
}

BUILT_IN: dict[str, str] = {
    **{name: _list(runs) for name, runs in _LISTS.items()},
    **{name: f"lbw={_list(runs)}" for name, runs in _WEBUI_LISTS.items()},
    **{name: f"lbw={_list(runs)}, EMB=0, FINAL=0" for name, runs in _WEBUI_LISTS_OF_BLOCKS.items()},
    **{name: f"LBW={_list(runs)};" for name, runs in _INSPIRE_LISTS.items()},
    "double blocks only": "default=0, D=1",
    "single blocks only": "default=0, S=1",
    "attention only": "default=0, .attn=1",
    "attention only, fused layers too": "default=0, .attn=1, .fused=1",
}
