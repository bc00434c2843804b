"""The names of the weights of whole models, without ".weight" and ".bias"; against the models themselves: tests/host/test_model_names.py."""

from __future__ import annotations

_PREFIX = "diffusion_model."


def sdxl() -> list[str]:
    found = ["time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.0", "out.2"]
    for block, depth in ((1, 0), (2, 0), (4, 2), (5, 2), (7, 10), (8, 10)):
        found += _resnet(f"input_blocks.{block}.0", block in (4, 7)) + _transformer(f"input_blocks.{block}.1", depth)
    found += ["input_blocks.3.0.op", "input_blocks.6.0.op"]
    found += _resnet("middle_block.0", False) + _transformer("middle_block.1", 10) + _resnet("middle_block.2", False)
    for block in range(9):
        found += _resnet(f"output_blocks.{block}.0", True) + _transformer(f"output_blocks.{block}.1", (10, 2, 0)[block // 3])
    found += ["output_blocks.2.2.conv", "output_blocks.5.2.conv"]
    return sorted(_PREFIX + name for name in found)


def flux() -> list[str]:
    found = ["img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    found += [f"{part}_in.{end}_layer" for part in ("time", "vector", "guidance") for end in ("in", "out")]
    of_double = ["mod.lin", "attn.qkv", "attn.norm.query_norm", "attn.norm.key_norm", "attn.proj", "mlp.0", "mlp.2"]
    found += [f"double_blocks.{n}.{part}_{end}" for n in range(19) for part in ("img", "txt") for end in of_double]
    of_single = ["linear1", "linear2", "norm.query_norm", "norm.key_norm", "modulation.lin"]
    found += [f"single_blocks.{n}.{end}" for n in range(38) for end in of_single]
    return sorted(_PREFIX + name for name in found)


def _resnet(path: str, has_skip: bool) -> list[str]:
    ends = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", *(["skip_connection"] if has_skip else [])]
    return [f"{path}.{end}" for end in ends]


def _transformer(path: str, depth: int) -> list[str]:
    if not depth:
        return []
    ends = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    ends += ["ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
    return [f"{path}.{end}" for end in ("norm", "proj_in", "proj_out")] + [f"{path}.transformer_blocks.{n}.{end}" for n in range(depth) for end in ends]
