"""What block weights mean, id by id: for the tests of the dialects."""

import pytest
from comfyui_trilora.trilora_ops.block_syntax import BlockWeights
from comfyui_trilora.trilora_ops.blocks import TEXT_GROUPS, Blocks, Place

SD, SDXL, FLUX, ZIMAGE = map(Blocks.layout, ("SD1.5", "SDXL", "Flux.1", "Z-Image"))
DOUBLES = "D00 D01 D02 D03 D04 D05 D06 D07 D08 D09 D10 D11 D12 D13 D14 D15 D16 D17 D18"
SINGLES = ("S00 S01 S02 S03 S04 S05 S06 S07 S08 S09 S10 S11 S12 S13 S14 S15 S16 S17 S18 S19 S20 S21 S22 S23 S24 S25 S26 S27 S28 S29 S30 S31 S32 "
           "S33 S34 S35 S36 S37")  # fmt: skip


def numbers(weights: BlockWeights, blocks: Blocks) -> dict[str, float]:
    """Every id's number; a text encoder that has one number is one id, all of them together are TE."""
    at = {block: weights.at(Place(block, group, frozenset(), "")) for group, members in blocks.groups.items() for block in members}
    for group in [group for group in TEXT_GROUPS if len({at[block] for block in blocks.groups.get(group, ())}) == 1]:
        at = {group: at[blocks.groups[group][0]], **{block: value for block, value in at.items() if block not in blocks.groups[group]}}
    encoders = [group for group in TEXT_GROUPS if group in at]
    if len({at[group] for group in encoders}) == 1:
        at = {"TE": at[encoders[0]], **{block: value for block, value in at.items() if block not in encoders}}
    return at


def check(weights: BlockWeights, blocks: Blocks, wanted: dict[float, str], rest: float = 0.0) -> None:
    at = numbers(weights, blocks)
    expected = dict.fromkeys(at, rest) | {block: value for value, ids in wanted.items() for block in ids.split()}
    assert at == pytest.approx(expected, abs=1e-12)
