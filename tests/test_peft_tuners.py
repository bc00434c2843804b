"""What peft's configuration says of a file's tensors: refused kinds, starts and options, doubts, bounds. Needs no peft."""

import json
import time

import pytest
import torch
from comfyui_trilora.trilora_ops.checkpoint import read_adapter, split_layers
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.peft_tuners import REFUSED
from safetensors.torch import save_file

LAYER = "base_model.model.block.to_q"
PLAIN = {f"{LAYER}.lora_A.weight": torch.ones(2, 4), f"{LAYER}.lora_B.weight": torch.ones(3, 2)}


@pytest.fixture
def read(tmp_path):
    """Function: tensors and configuration -> the AdapterState of peft's two files; without a configuration of one file."""

    def run(tensors, config=None, metadata=None):
        path = tmp_path / "adapter_model.safetensors"
        save_file(tensors, path, metadata=metadata)
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
        return read_adapter(path)

    return run


def refusal(read, *arguments) -> str:
    with pytest.raises(TriLoRAError) as caught:
        read(*arguments)
    assert len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize("tuner", REFUSED)
def test_a_kind_that_is_not_read_is_named_by_its_configuration(read, tuner):
    sentence = refusal(read, PLAIN, {"peft_type": tuner, "r": 2})
    assert f" {tuner} " in sentence and REFUSED[tuner] in sentence and "nothing was applied" in sentence


@pytest.mark.parametrize("tuner", REFUSED)
def test_or_by_the_names_of_its_tensors(read, tuner):
    """In a file whose configuration is lost."""
    sentence = refusal(read, {f"{LAYER}.{tuner.lower()}_x": torch.ones(2)})
    assert f" {tuner} " in sentence and REFUSED[tuner] in sentence


def test_a_kind_from_the_future_is_named(read):
    assert " QUANTUM " in refusal(read, PLAIN, {"peft_type": "QUANTUM", "lora_alpha": 1})


def test_beside_layers_that_are_read_it_does_not_keep_them_from_being_read(read):
    """What has no reader is named by the loaders, as in every file."""
    state = read(PLAIN | {"base_model.model.other.ia3_l": torch.ones(4), "base_model.model.other.road_theta": torch.ones(4)})
    assert set(split_layers(state)[0]) == {LAYER} and len(state) == 4


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "loftq", "lora_ga"])
def test_a_start_that_changes_the_base_is_refused(read, start):
    assert f"init_lora_weights={start.lower()}" in refusal(read, PLAIN, {"peft_type": "LORA", "lora_alpha": 2, "init_lora_weights": start})


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_a_start_that_leaves_the_base_alone_is_read(read, start):
    assert read(PLAIN, {"lora_alpha": 2, "init_lora_weights": start}).notes == ()


def test_a_start_that_is_not_known_is_a_doubt(read):
    (note,) = read(PLAIN, {"lora_alpha": 2, "init_lora_weights": "lunar"}).notes
    assert "init_lora_weights=lunar" in note


@pytest.mark.parametrize("option", ["alora_invocation_tokens", "arrow_config", "kasa_config", "use_bdlora", "use_qalora", "layer_replication"])
def test_an_option_that_makes_it_another_kind_is_refused(read, option):
    assert option in refusal(read, PLAIN, {"lora_alpha": 2, option: [1]})


@pytest.mark.parametrize("extra", ["lora_velora_embed", "lora_monteclora_sampler.expert_weights"])
def test_what_only_training_needs_is_left_out_without_a_word(read, extra):
    state = read(PLAIN | {f"{LAYER}.{extra}": torch.ones(2)}, {"lora_alpha": 2})
    assert state.keys() == PLAIN.keys() and state.notes == ()


def test_each_part_of_a_model_has_its_own(read):
    """diffusers' metadata: what is wrong with one part is said of it."""
    config = {"unet.lora_alpha": 4, "text_encoder.lora_alpha": 2, "text_encoder.init_lora_weights": "pissa"}
    assert "text_encoder.init_lora_weights=pissa" in refusal(read, PLAIN, None, {"lora_adapter_metadata": json.dumps(config)})


ADALORA = {f"{LAYER}.lora_A": torch.ones(2, 4), f"{LAYER}.lora_B": torch.ones(3, 2), f"{LAYER}.lora_E": torch.tensor([[3.0], [5.0]])}
SCALE = {"peft_type": "ADALORA", "lora_alpha": 6, "init_r": 4}


def test_adalora_is_low_rank_with_its_values_and_the_scale_of_its_first_rank(read):
    state = read(ADALORA, SCALE)
    layers, rest = split_layers(state)
    assert not rest and state.notes == ()
    torch.testing.assert_close(layers[LAYER].pair.dense(), torch.full((3, 4), 8.0 * 6 / 4), rtol=1e-5, atol=0)


def test_a_layer_of_adalora_without_directions_adds_nothing(read):
    empty = {"base_model.model.e.lora_A": torch.ones(0, 4), "base_model.model.e.lora_B": torch.ones(3, 0), "base_model.model.e.lora_E": torch.ones(0, 1)}
    assert set(split_layers(read(ADALORA | empty, SCALE))[0]) == {LAYER}


@pytest.mark.parametrize(
    ("tensors", "config"),
    [(ADALORA, None), (ADALORA, {"peft_type": "LORA", "lora_alpha": 2}), (ADALORA, {**SCALE, "init_r": 0}), (ADALORA, {**SCALE, "init_r": "many"}),
     ({key: tensor for key, tensor in ADALORA.items() if not key.endswith("lora_B")}, SCALE), ({**ADALORA, f"{LAYER}.lora_E": torch.ones(2)}, SCALE),
     ({**ADALORA, f"{LAYER}.lora_A": torch.ones(3, 4)}, SCALE), ({**ADALORA, f"{LAYER}.lora_E": torch.ones(2, 1, dtype=torch.complex64)}, SCALE)],
)  # fmt: skip
def test_adalora_that_cannot_be_computed_is_refused(read, tensors, config):
    refusal(read, tensors, config)


def test_the_bias_of_a_low_rank_layer_has_its_scale(read):
    state = read(PLAIN | {f"{LAYER}.lora_B.bias": torch.tensor([1.0, 2.0, 4.0])}, {"lora_alpha": 6, "lora_bias": True})
    assert state[f"{LAYER}.diff_b"].tolist() == [3.0, 6.0, 12.0] and f"{LAYER}.lora_B.bias" not in state


def test_what_was_trained_whole_is_named(read):
    whole = {"base_model.model.head.weight": torch.ones(3, 3), "base_model.model.block.to_q.bias": torch.ones(3)}
    state = read(PLAIN | whole, {"lora_alpha": 2, "modules_to_save": ["head"], "bias": "lora_only"})
    (note,) = state.notes
    assert "2 weights and biases" in note and "head.weight" in note and "block.to_q.bias" in note
    assert state.keys() == PLAIN.keys()


def test_a_file_of_peft_that_lost_its_scale_says_so(read):
    (note,) = read(PLAIN).notes
    assert "adapter_config.json" in note and "taken as 1" in note
    assert read(PLAIN | {f"{LAYER}.alpha": torch.tensor(1.0)}).notes == ()


def test_whole_factors_of_lokr_take_the_rank_from_the_configuration(read):
    tensors = {f"{LAYER}.lokr_w1": torch.ones(2, 2), f"{LAYER}.lokr_w2": torch.ones(2, 3)}
    config = {"peft_type": "LOKR", "r": 8, "alpha": 4, "rank_pattern": {"to_k": 2, "block.to_q": 16}, "alpha_pattern": {"^block.to_q": 2}}
    state = read(tensors, config)
    assert torch.equal(state[f"{LAYER}.lokr_w1"], torch.full((2, 2), 2 / 16)) and f"{LAYER}.alpha" not in state


@pytest.mark.parametrize("pattern", ["(?=to_q)", r"(a)\1", "(", "[", "x{9999}", "*"])
def test_an_expression_that_is_not_read_is_refused(read, pattern):
    assert "alpha_pattern=" in refusal(read, PLAIN, {"lora_alpha": 2, "alpha_pattern": {"to_k": 1, pattern: 3}})


OFT = {f"{LAYER}.oft_R.weight": torch.full((2, 3), 0.5)}


@pytest.mark.parametrize(
    ("fields", "terms", "angle"),
    [({}, 0, 0.5), ({"use_cayley_neumann": False}, 0, 0.5), ({"use_cayley_neumann": True}, 5, 0.5), ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 7}, 7, 0.5),
     ({"coft": True, "eps": 1e6}, 0, 0.5), ({"coft": True, "eps": 0.6}, 0, 0.6 / 2**0.5 / 6**0.5)],
)  # fmt: skip
def test_oft_takes_from_the_configuration_how_its_blocks_are_made(read, fields, terms, angle):
    """A block's skew matrix has each angle twice: with COFT its norm is at most eps / sqrt(blocks)."""
    state = read(OFT, {"peft_type": "OFT", **fields})
    assert state.keys() == {f"{LAYER}.oft_angles", f"{LAYER}.oft_terms"} and float(state[f"{LAYER}.oft_terms"]) == terms
    torch.testing.assert_close(state[f"{LAYER}.oft_angles"], torch.full((2, 3), angle))


@pytest.mark.parametrize("fields", [{"num_cayley_neumann_terms": 10**9}, {"num_cayley_neumann_terms": "x"}, {"num_cayley_neumann_terms": True}, {"coft": True, "eps": -1}])
def test_oft_whose_configuration_is_broken(read, fields):
    refusal(read, OFT, {"peft_type": "OFT", "use_cayley_neumann": True, **fields})


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [({"to_q": 3, "block.to_q": 5}, 3), ({"to_k": 3, "block.to_q": 5}, 5), ({"^to_q": 3}, 2), ({"^block.to_q": 3}, 3), ({"o_q": 3}, 2), ({}, 2), (None, 2),
     ({".*": 3}, 3), ({".*to_[qk]": 3}, 3), ({"to_[kv]": 3}, 2), ({"to_k|to_q": 3}, 3), ({"lock.to_q|x": 3}, 2), ({"^to_.": 3}, 2), ({"^block.*": 3}, 3),
     ({"to_[qk]": 3, "to_q": 5}, 3), ({"to_q": 5, "to_[qk]": 3}, 5), ({r"block\.to_q": 4}, 4), ({"(a+)+$": 3}, 2), ({"(.*a)*": 3}, 2)],
)  # fmt: skip
def test_the_first_pattern_that_names_a_module_holds(read, patterns, alpha):
    state = read(PLAIN, {"lora_alpha": 2, "alpha_pattern": patterns})
    assert float(state.get(f"{LAYER}.alpha", 2.0)) == alpha


HOSTILE = {
    "patterns": {"lora_alpha": 1, "alpha_pattern": {f"block{n}.to_q": 2 for n in range(40_000)}},
    "parts": {f"part{n}.lora_alpha": 1 for n in range(40_000)},
    "a long kind": {"peft_type": "X" * 900_000},
    "a long start": {"lora_alpha": 1, "init_lora_weights": "x" * 900_000},
    "a long pattern": {"lora_alpha": 1, "alpha_pattern": {"(a+)+" * 100_000: 2}},
    "slow patterns": {"lora_alpha": 1, "alpha_pattern": {f"(.*a)*{n}(.*b.*)*": 2 for n in range(100)}},
    "too many patterns": {"lora_alpha": 1, "alpha_pattern": {f"a*{n}": 2 for n in range(5000)}},
    "a long number": '{"lora_alpha": ' + "9" * 900_000 + "}",
    "too much": {"lora_alpha": 1, "x": "x" * 1_100_000},
    "modules": {"lora_alpha": 1, "modules_to_save": [f"m{n}" for n in range(60_000)]},
    "kinds that are no text": {"peft_type": ["LORA"], "lora_alpha": 1}, "patterns that are no object": {"peft_type": "LOHA", "alpha": 1, "alpha_pattern": 3},
}  # fmt: skip


@pytest.mark.parametrize("config", HOSTILE.values(), ids=HOSTILE)
def test_hostile_configurations_end_in_bounded_time_and_words(read, config):
    tensors = {f"base_model.model.b{n}.to_q.lora_{half}.weight": torch.ones(1, 1) for n in range(1000) for half in "AB"}
    start = time.process_time()
    try:
        notes = read(tensors, config).notes
    except TriLoRAError as sentence:
        notes = (str(sentence),)
    assert time.process_time() - start < 2 and all(len(note) < 600 for note in notes)


def test_long_names_of_layers_are_cut_in_messages(read):
    name = "base_model.model." + "x" * 100_000
    assert len(refusal(read, {f"{name}.lora_E": torch.ones(1, 1)})) < 500
    assert len(refusal(read, {f"{name}.ia3_l": torch.ones(1)})) < 500
