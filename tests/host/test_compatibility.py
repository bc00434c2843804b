"""Every file that peft, diffusers and LyCORIS write is read as its writer means it, or refused with the reason.

The rows are those of docs/compatibility.md, which `tests/host/compatibility` writes.
"""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytest.importorskip("lycoris")

from comfyui_trilora.tests.host.compatibility import (  # noqa: E402
    diffusers_rows,
    lycoris_rows,
    peft_rows,
    peft_starts,
    text_rows,
)
from comfyui_trilora.tests.host.compatibility.outcomes import (  # noqa: E402
    EXACT,
    PARTLY,
    REFUSED,
    SAVED_AGAIN,
    UNWRITTEN,
    WRONG,
    compared,
    outcome,
)

ROWS = [row for module in (peft_rows, peft_starts, diffusers_rows, text_rows, lycoris_rows) for row in module.rows()]
# the first of each kind
KINDS = list({(row.writer, row.kind): row for row in reversed(ROWS)}.values())
# what people have most of: it must not be enough to refuse it
READ = ("LORA, lora", "LORA, use_rslora", "LORA, rank_pattern", "LORA, init_lora_weights=gaussian", "LORA, init_lora_weights=eva", "ADALORA", "LOHA", "LOKR, alpha",
        "LOKR, both", "LoCon", "Loha", "Lokr", "Full", "Norm", "save_lora_weights, lora_alpha", "save_lora_weights, lora_bias")  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_file_does_what_its_writer_means_or_is_refused(host_nodes, pack_module, row):
    found = outcome(host_nodes, pack_module, row)
    if found.verdict == UNWRITTEN:
        pytest.skip(found.text)
    assert found.verdict in ((EXACT, PARTLY) if any(name in row.name for name in READ) else (EXACT, PARTLY, REFUSED)), found


@pytest.mark.parametrize("options", ["bias=lora_only", "modules_to_save"])
def test_what_was_trained_whole_is_named_on_the_node(host_nodes, pack_module, options):
    """And the adapter itself is applied exactly."""
    (row,) = [row for row in ROWS if row.kind == "LORA" and row.options == options]
    found = outcome(host_nodes, pack_module, row)
    assert found.verdict == PARTLY and any("trained whole" in notice for notice in found.notices)


def test_the_measure_sees_what_is_wrong():
    """A scale that is off by a ten-thousandth, a layer that is missing, one too many, nothing at all."""
    delta = {"a": torch.ones(3, 3), "b": torch.ones(3)}
    assert compared(dict(delta), delta).verdict == EXACT
    for found in (delta | {"a": 1.0001 * delta["a"]}, {"a": delta["a"]}, delta | {"c": delta["b"]}, {}, delta | {"b": delta["b"] * float("nan")}):
        assert compared(found, delta).verdict == WRONG
    assert compared({"a": delta["a"]}, delta, ("one bias was left out",)).verdict == PARTLY
    assert compared({"a": 2 * delta["a"]}, delta, ("one bias was left out",)).verdict == WRONG


@pytest.mark.parametrize("row", KINDS, ids=lambda row: row.name)
def test_a_stack_reads_it_so_too(host_nodes, pack_module, row):
    found = outcome(host_nodes, pack_module, row, "TriLoRAApplyStack")
    if found.verdict == UNWRITTEN:
        pytest.skip(found.text)
    assert found.verdict in (EXACT, PARTLY, REFUSED), found


AGAIN = [row for row in ROWS if row.kind in ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT")]


@pytest.mark.parametrize("row", AGAIN, ids=lambda row: row.name)
def test_saved_again_it_needs_no_configuration(host_nodes, pack_module, row):
    """One file, without adapter_config.json beside it, that does the same."""
    first = outcome(host_nodes, pack_module, row).verdict
    if first not in (EXACT, PARTLY):
        pytest.skip(first)
    assert outcome(host_nodes, pack_module, row, SAVED_AGAIN).verdict == first
