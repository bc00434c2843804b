"""Every way that a file takes through the pack's nodes: each refuses it in one sentence, or computes finite numbers
of the right shape.

Import it only where the host is already imported.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import comfy.lora
import comfy.utils
import torch
from safetensors.torch import save_file

from ..host.tiny_run import run_node

LONGEST = 1000


class Errors(logging.Handler):
    """What the host logs as an error while it computes a weight."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record) -> None:
        self.said.append(record.getMessage())


def check(
    host_nodes, patcher, error: type[Exception], tensors: Mapping[str, torch.Tensor], path: Path
) -> dict[str, str]:
    """Way -> "ok" or the message with which the file was refused. Raises AssertionError for anything else.

    patcher: a MODEL, which is left alone; error: the pack's TriLoRAError; path: of a file in a lora folder, which is
    written and removed.
    """
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)

    def load():
        return run_node(host_nodes, "TriLoRALoadAdapter", lora_name=path.name)[0]

    ways = {
        "Loader": lambda: patched(run_node(host_nodes, "TriLoRALoader", model=patcher, lora_name=path.name)[0], patcher),
        "block weights": lambda: patched(run_node(host_nodes, "TriLoRALoader", model=patcher, lora_name=path.name, block_weights="default=0.5")[0], patcher),
        "keep_rank": lambda: patched(run_node(host_nodes, "TriLoRALoader", model=patcher, lora_name=path.name, keep_rank=1)[0], patcher),
        "Load": load, "Inspect": lambda: run_node(host_nodes, "TriLoRAInspectAdapter", adapter=load()),
        "Save": lambda: run_node(host_nodes, "TriLoRASaveAdapter", adapter=load(), name="fuzzed", dtype="fp32"),
        "Bake": lambda: finite(run_node(host_nodes, "TriLoRABakeAdapter", model=patcher, adapter=load(), strength_model=0.5)[0]),
        "Resize": lambda: finite(run_node(host_nodes, "TriLoRAResizeAdapter", adapter=load(), rank=1, energy=0.0, power=1.0, cap=0.0)[0]),
    }  # fmt: skip
    outcomes = {}
    try:
        for way, go in ways.items():
            try:
                go()
                outcomes[way] = "ok"
            except error as refused:
                outcomes[way] = str(refused)
                assert 20 < len(str(refused)) <= LONGEST, f"{way}: a message of {len(str(refused))} letters"
            assert patcher.patches == {}, f"{way}: the model that came in was patched"
    finally:
        path.unlink()
    return outcomes


def finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Assert that no tensor holds NaN or infinity."""
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values() if tensor.is_floating_point())


@torch.inference_mode()
def patched(model, patcher) -> None:
    """Assert that the host computes every patched weight of a MODEL: finite, of its shape or the one it is given,
    without an error in the log."""
    errors = Errors()
    logging.getLogger().addHandler(errors)
    try:
        for key, patches in model.patches.items():
            weight = comfy.utils.get_attr(patcher.model, key).detach().float()
            for dtype in (torch.float32, torch.bfloat16):
                found = comfy.lora.calculate_weight(patches, weight.to(dtype, copy=True), key)
                assert torch.isfinite(found).all(), f"{key} in {dtype} is not finite"
                assert len(found.shape) == len(weight.shape) and all(
                    new >= old for new, old in zip(found.shape, weight.shape, strict=True)
                ), key
    finally:
        logging.getLogger().removeHandler(errors)
    assert errors.said == [], errors.said
