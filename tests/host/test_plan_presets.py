"""Presets by name, as a plan's rank and as block weights: which layers they train, id by id, and that both readings choose the same."""

import pytest
from comfyui_trilora.tests.host import small_families, tiny_models
from comfyui_trilora.tests.host.test_block_plan import targets_of, train
from comfyui_trilora.tests.host.tiny_run import list_saved_adapters, random_dataset, run_node


def ids(group: str, first: int, last: int) -> set[str]:
    return {f"{group}{n:02d}" for n in range(first, last + 1)}


EVERY_SD = {"IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID1", *ids("OUT", 3, 11)}
EVERY_XL = {"IN04", "IN05", "IN07", "IN08", "MID1", *ids("OUT", 0, 5)}
DOUBLES, SINGLES = ids("D", 0, 18), ids("S", 0, 37)
# (model, target, preset, the blocks whose layers are trained)
CASES = [
    ("SD1.5", "attention", "Block-wise full (SD1.x)", EVERY_SD),
    ("SD1.5", "attention", "Block-wise upper (SD1.x)", {"IN01", "IN02", "OUT09", "OUT10", "OUT11"}),
    ("SD1.5", "attention", "Block-wise middle (SD1.x)", {"IN04", "IN05", "OUT06", "OUT07", "OUT08"}),
    ("SD1.5", "attention", "Block-wise bottom (SD1.x)", {"IN07", "IN08", "OUT03", "OUT04", "OUT05"}),
    ("SD1.5", "linear+conv", "Block-wise full (SD1.x)", {*ids("IN", 1, 11), "MID0", "MID1", "MID2", *ids("OUT", 0, 11)}),
    ("SD1.5", "linear+conv", "Block-wise upper (SD1.x)", {*ids("IN", 1, 3), *ids("OUT", 9, 11)}),
    ("SD1.5", "linear+conv", "Block-wise middle (SD1.x)", {*ids("IN", 4, 6), *ids("OUT", 6, 8)}),
    ("SD1.5", "linear+conv", "Block-wise bottom (SD1.x)", {*ids("IN", 7, 9), *ids("OUT", 3, 5)}),
    ("SD1.5", "everything", "Block-wise upper (SD1.x)", {*ids("IN", 1, 3), *ids("OUT", 9, 11)}),
    ("SDXL", "attention", "Block-wise full (SDXL)", EVERY_XL),
    ("SDXL", "attention", "Block-wise middle (SDXL)", {"IN04", "IN05", "OUT03", "OUT04", "OUT05"}),
    ("SDXL", "attention", "Block-wise bottom (SDXL)", {"IN07", "IN08", "MID1", "OUT00", "OUT01", "OUT02"}),
    ("SDXL", "attention", "B-LoRA content", {"OUT00"}),
    ("SDXL", "attention", "B-LoRA style", {"OUT01"}),
    ("SDXL", "attention", "InstantStyle style", {"OUT01"}),
    ("SDXL", "attention", "InstantStyle layout", {"IN08"}),
    ("SDXL", "attention", "InstantStyle style and layout", {"IN08", "OUT01"}),
    ("SDXL", "linear+conv", "Block-wise upper (SDXL)", {*ids("IN", 1, 3), *ids("OUT", 6, 8)}),
    ("SDXL", "linear+conv", "Block-wise middle (SDXL)", {*ids("IN", 4, 6), *ids("OUT", 3, 5)}),
    ("SDXL", "linear+conv", "Block-wise bottom (SDXL)", {"IN07", "IN08", "MID0", "MID1", "MID2", "OUT00", "OUT01", "OUT02"}),
    ("Flux.1", "transformer", "double blocks only", DOUBLES),
    ("Flux.1", "transformer", "single blocks only", SINGLES),
]
# (model, target, preset, the narrower target of which it leaves all layers)
KINDS = [("SD1.5", "linear+conv", "attention only", "attention"), ("SDXL", "linear+conv", "attention only", "attention"),
         ("Flux.1", "transformer", "attention only, fused layers too", "attention")]


@pytest.fixture(scope="module")
def tiny(host):
    """Function: name of a layout -> a model that has all of its blocks, and hardly any width."""
    made = {}

    def of(layout: str) -> tiny_models.TinyModel:
        if layout not in made:
            build = {"SD1.5": tiny_models.sd15_model, "SDXL": small_sdxl, "Flux.1": small_flux}
            made[layout] = build[layout]()
        return made[layout]

    return of


def small_sdxl() -> tiny_models.TinyModel:
    pooled = tiny_models.random_conditioning((1, 1, 1280), 7)[0][0][0]
    return tiny_models.TinyModel(small_families.sdxl(), (1, 4, 8, 8), tiny_models.random_conditioning((1, 5, 48), 6, pooled_output=pooled))


def small_flux() -> tiny_models.TinyModel:
    pooled = tiny_models.random_conditioning((1, 1, 24), 7)[0][0][0]
    return tiny_models.TinyModel(small_families.flux(), (1, 16, 4, 4), tiny_models.random_conditioning((1, 5, 48), 6, pooled_output=pooled))


@pytest.fixture(scope="module")
def adapter(host_nodes, pack_module, tiny):
    """Function: model, target, plan -> the adapter that one step gives; those without a plan are made once."""
    whole = {}

    def of(layout: str, target: str, rank: str = ""):
        data = random_dataset(pack_module("nodes.types"), tiny(layout), count=1)
        method = run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)[0]
        if rank:
            return train(host_nodes, tiny(layout), data, {"rank": rank}, method, target, steps=1)[1]
        if (layout, target) not in whole:
            whole[layout, target] = train(host_nodes, tiny(layout), data, None, method, target, steps=1)[1]
        return whole[layout, target]

    return of


@pytest.fixture
def applied(host_nodes, tiny):
    """Function: model, adapter, block weights -> the keys that TriLoRA Loader patches."""

    folder = list_saved_adapters()

    def of(layout: str, state, text: str) -> set[str]:
        file = run_node(host_nodes, "TriLoRASaveAdapter", adapter=state, name="preset", dtype="fp32")[0]
        try:
            return set(run_node(host_nodes, "TriLoRALoader", model=tiny(layout).patcher, lora_name=file, block_weights=text)[0].patches)
        finally:
            (folder / file).unlink()

    return of


def label(value) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("layout", "target", "preset", "expected"), CASES, ids=label)
def test_a_preset_trains_its_blocks(adapter, pack_module, tiny, layout, target, preset, expected):
    """Of the target's layers all that are in the preset's blocks, and no others."""
    patcher = tiny(layout).patcher
    blocks = pack_module("nodes.block_plan").blocks_of(patcher.model)
    whole = {key: blocks.place(key).block for key in targets_of(pack_module, adapter(layout, target), patcher)}
    found = set(targets_of(pack_module, adapter(layout, target, preset), patcher))
    assert {whole[key] for key in found} == expected
    assert found == {key for key, block in whole.items() if block in expected}


@pytest.mark.parametrize(("layout", "target", "preset", "kept"), KINDS, ids=label)
def test_attention_only_leaves_the_layers_of_that_target(adapter, pack_module, tiny, layout, target, preset, kept):
    found, expected = (set(targets_of(pack_module, state, tiny(layout).patcher)) for state in (adapter(layout, target, preset), adapter(layout, kept)))
    assert found == expected


@pytest.mark.parametrize(("layout", "target", "preset"), [case[:3] for case in CASES + KINDS if case[1] != "everything"], ids=label)
def test_as_block_weights_it_leaves_on_what_it_would_train(adapter, applied, pack_module, tiny, layout, target, preset):
    """The whole adapter with the preset at inference, and the preset at training, patch the same layers."""
    trained = set(targets_of(pack_module, adapter(layout, target, preset), tiny(layout).patcher))
    assert applied(layout, adapter(layout, target), preset) == trained


@pytest.mark.parametrize("target", ["attention", "transformer"])
def test_a_level_without_attention_asks_for_convolutions(adapter, target):
    """SDXL's upper level has residual blocks alone; their linear layers, which only modulate, are no remedy."""
    with pytest.raises(ValueError, match=rf"target='{target}' has no layer in what the plan trains \(IN01-IN03, OUT06-OUT08\); "
                                         r"choose target='linear\+conv', which makes it a LoCon"):
        adapter("SDXL", target, "Block-wise upper (SDXL)")


def test_a_level_without_attention_beside_one_with_it_is_a_warning(adapter, caplog):
    adapter("SDXL", "attention", "default=0, IN01-IN03=2, IN04-IN06=2, OUT06-OUT08=2")
    assert any("target='attention' has no layer in IN01-IN03, OUT06-OUT08; a wider target has" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("preset", ["Block-wise upper (SD1.x)", "Block-wise bottom (SD1.x)"])
def test_what_a_preset_does_not_mean_is_no_warning(adapter, preset, caplog):
    """Its list has a 1 for the text encoder, which stands for the layers outside the blocks too."""
    caplog.clear()
    adapter("SD1.5", "attention", preset)
    assert not [r.getMessage() for r in caplog.records if "has no layer in" in r.getMessage()]


def test_a_preset_of_another_model_is_refused(adapter):
    with pytest.raises(ValueError, match=r"block plan: rank: .*B-LoRA style"):
        adapter("SD1.5", "attention", "B-LoRA style")
