"""Inspect Adapter in the host: what it says and shows of adapters as other nodes hand them on."""

import logging

import numpy as np
import pytest
import torch
from comfyui_trilora.tests.host import adapter_files
from comfyui_trilora.tests.host.adapter_files import CONV, LINEAR, low_rank
from comfyui_trilora.tests.host.tiny_run import run_node


def inspect(host_nodes, adapter):
    return run_node(host_nodes, "TriLoRAInspectAdapter", adapter=adapter)


def test_a_file_from_disk(host_nodes, saved):
    """Load Adapter -> Inspect Adapter: metadata, ranks, size and the strongest layer are those of the file."""
    tensors = low_rank(LINEAR, 128, 128, rank=3) | low_rank(CONV, 128, 128, rank=2, kernel=(3, 3))
    name = saved(tensors, {"ss_network_module": "networks.lora", "modelspec.trigger_phrase": "sks", "ss_base_model_version": "sd_v2", "modelspec.title": "a style"})
    adapter = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)[0]
    pictures, report = inspect(host_nodes, adapter)
    assert pictures.shape == (4, 1200, 1600, 3) and pictures.dtype == torch.float32 and 0 <= float(pictures.min()) and float(pictures.max()) == 1
    assert "networks.lora" in report and "sks" in report and "sd_v2" in report and "2 low-rank" in report
    assert "2 in 1 layer, 3 in 1 layer" in report
    energies = {}
    for layer, scale in ((LINEAR, 0.5), (CONV, 0.5)):
        R = scale * tensors[f"{layer}.lora_up.weight"].flatten(1) @ tensors[f"{layer}.lora_down.weight"].flatten(1)
        energies[layer] = float(R.double().square().sum())
    whole = sum(energies.values())
    assert f"‖R‖ = {whole**0.5:.4g} over 2 layers" in report
    assert f"{max(energies.values()) / whole:6.1%}  MID0 · in_layers_2" in report
    assert f"{sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20:.1f} MiB" in report


def test_a_plain_dict_of_another_node(host_nodes):
    """Core's trainer hands on a dict without metadata, made in inference mode."""
    with torch.inference_mode():
        adapter = low_rank(LINEAR, 128, 128)
    pictures, report = inspect(host_nodes, adapter)
    assert len(pictures) == 4 and report.count("not said") == 3


def test_every_kind_of_file(host_nodes, pack_module, tiny):
    """LyCORIS' kinds and ours: each is drawn, counted under its name, and measured where it is low-rank or has a transform."""
    pytest.importorskip("lycoris")
    kinds = adapter_files.every_kind(tiny.patcher, pack_module("trilora_ops.registry"), pack_module("trilora_ops.checkpoint"))
    named = {"lora": "low-rank", "trilora": "low-rank", "locon": "low-rank", "tlora": "tensor_ring+tensor_ring", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr",
             "oft": "2 OFT", "boft": "2 BOFT", "glora": "GLoRA", "full": "full difference", "norms and biases": "1 bias"}  # fmt: skip
    for kind, (tensors, metadata) in kinds.items():
        pictures, report = inspect(host_nodes, pack_module("trilora_ops.checkpoint").AdapterState(tensors, metadata))
        assert named.get(kind, "") in report, (kind, report)
        assert "unknown" not in report, (kind, report)
        measured = kind in ("lora", "trilora", "locon", "tlora")
        low_rank_layers = sum(key.endswith("lora_up.weight") for key in tensors) and kind != "dora"
        assert len(pictures) == (5 if kind == "tlora" else 4 if measured or low_rank_layers else 1), kind
        assert ("not measured" in report) is not measured, (kind, report)


def test_an_extracted_adapter_says_so(host_nodes, pack_module, tiny, saved):
    registry = pack_module("trilora_ops.registry")
    (tuned,) = run_node(host_nodes, "LoraLoaderModelOnly", model=tiny.patcher, lora_name=saved(low_rank(LINEAR, 128, 128)), strength_model=1.0)
    adapter, _ = run_node(host_nodes, "TriLoRAExtractAdapter", model_tuned=tuned, model_base=tiny.patcher, method=registry.Method(registry.RESIDUALS["trilora"](2)))
    _, report = inspect(host_nodes, adapter)
    error = pack_module("trilora_ops.metadata").json.loads(adapter.metadata["trilora.provenance"])[0]["error"]
    assert f"extract, target attention, error {error:.4g}" in report and "fingerprint" in report


def test_an_empty_adapter_is_an_error(host_nodes, pack_module):
    with pytest.raises(pack_module("trilora_ops.errors").TriLoRAError, match="holds no tensors"):
        inspect(host_nodes, {})


def test_metadata_of_other_programs_do_no_harm(host_nodes, pack_module, caplog):
    state = pack_module("trilora_ops.checkpoint").AdapterState(low_rank(LINEAR, 128, 128), {"trilora.provenance": "{", "modelspec.title": "x" * 300})
    pictures, report = inspect(host_nodes, state)
    assert "made by" not in report and np.isfinite(pictures.numpy()).all()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
