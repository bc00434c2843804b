"""Bake Adapter: its saved file at strength 1 in core's loader is what the TriLoRA Loader or a stack did with strengths and block weights."""

import json
import random
import re

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from comfyui_trilora.tests.host import adapter_files, tiny_models
from comfyui_trilora.tests.host.adapter_files import low_rank, normal
from comfyui_trilora.tests.host.foreign_writers import Twin, deltas, weight_of, write_peft
from comfyui_trilora.tests.host.tiny_run import distance, list_saved_adapters, load_checkpoint, run_node, weights_hash
from safetensors import safe_open
from safetensors.torch import load_file

U = "diffusion_model"
NAMES = tuple(f"{U}.{name}" for name in (
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q", "input_blocks.1.0.in_layers.2", "input_blocks.3.1.transformer_blocks.0.attn2.to_k",
    "input_blocks.3.0.in_layers.2", "middle_block.1.transformer_blocks.0.attn1.to_q", "middle_block.0.in_layers.2",
    "output_blocks.1.1.transformer_blocks.0.ff.net.2", "output_blocks.1.0.in_layers.2",
))  # fmt: skip
TEXT, ZERO = "IN01=0.5, IN03=-1, MID=0, OUT01=1.7", "middle_block"
KEEP_OR_DROP = "default=0, IN01=1, OUT01.conv=1"  # what every kind can have
LYCORIS = {
    "LoCon": ("locon", {}), "Tucker": ("tucker", {}), "LoHa": ("loha", {}), "LoHa, Tucker": ("loha-tucker", {}), "LoKr": ("lokr", {}),
    "LoKr, full": ("lokr", {"full_matrix": True}), "LoKr, both halves": ("lokr", {"decompose_both": True}), "GLoRA": ("glora", {}), "full": ("full", {}),
    "DoRA": ("dora", {}), "OFT": ("oft", {}), "BOFT": ("boft", {}),
}  # fmt: skip
FIXED = {"DoRA": "DoRA", "OFT": "OFT", "BOFT": "BOFT", "whole weights": "replaced weight"}
KINDS = ("LoRA", "LoRA without alpha", "LoRA by PEFT's names", "half precision", "TriLoRA", "TLoRA", "norms and biases", "whole weights", *LYCORIS)
CLIP_LAYERS = tuple(f"text_model_encoder_layers_{n}_mlp_fc1" for n in (3, 7))


def plain(tiny, rank: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Low-rank layers under kohya's endings, alpha 3.3."""
    tensors = {}
    for number, name in enumerate(NAMES):
        out, inp, *kernel = weight_of(tiny.patcher, f"{name}.weight").shape
        tensors |= low_rank(name, out, inp, rank, tuple(kernel), seed + number) | {f"{name}.alpha": torch.tensor(3.3)}
    return tensors


def as_peft(tensors: dict) -> dict:
    return {key.replace("lora_up", "lora_B").replace("lora_down", "lora_A"): tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}


def whole_weights(tiny, ending: str) -> dict[str, torch.Tensor]:
    """Norms, and with `.diff` the convolutions' biases."""
    tensors = {}
    for seed, name in enumerate(NAMES):
        if name.endswith("in_layers.2"):
            norm = name.replace("in_layers.2", "in_layers.0")
            tensors[f"{norm}{ending}"] = weight_of(tiny.patcher, f"{norm}.weight") * (ending != ".diff") + 0.1 * normal(*weight_of(tiny.patcher, f"{norm}.weight").shape, seed=seed)
            if ending == ".diff":
                tensors[f"{name}.diff_b"] = 0.1 * normal(*weight_of(tiny.patcher, f"{name}.bias").shape, seed=seed)
    return tensors


@pytest.fixture(scope="module")
def files(tiny, saved, pack_module):
    """Kind -> file name."""
    pytest.importorskip("lycoris")
    checkpoint, registry = pack_module("trilora_ops.checkpoint"), pack_module("trilora_ops.registry")
    trilora = checkpoint.canonical_state(checkpoint.AdapterState(plain(tiny)))
    found = {
        "LoRA": (plain(tiny), {"modelspec.trigger_phrase": "sks", "ss_base_model_version": "sd_v1"}),
        "LoRA without alpha": ({key: tensor for key, tensor in plain(tiny).items() if not key.endswith(".alpha")}, None),
        "LoRA by PEFT's names": (as_peft(plain(tiny)), None),
        "half precision": ({key: tensor.half() for key, tensor in plain(tiny).items()}, None),
        "TriLoRA": (dict(trilora), trilora.metadata),
        "TLoRA": (adapter_files.transform(tiny.patcher, registry, names=NAMES), None),
        "norms and biases": (whole_weights(tiny, ".diff"), None), "whole weights": (whole_weights(tiny, ".set_weight"), None),
    }  # fmt: skip
    found |= {kind: (adapter_files.lycoris(tiny.patcher, name, seed, NAMES, **more), None) for seed, (kind, (name, more)) in enumerate(LYCORIS.items())}
    return {kind: saved(*found[kind]) for kind in KINDS}


def load(host_nodes, name: str):
    return run_node(host_nodes, "TriLoRALoadAdapter", lora_name=name)[0]


def stacked(host_nodes, entries):
    """The TRILORA_STACK of dicts of the Adapter Stack node's inputs."""
    stack = None
    for entry in entries:
        (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", **entry, **({"stack": stack} if stack else {}))
    return stack


def save(host_nodes, adapter, dtype: str = "fp32") -> str:
    return run_node(host_nodes, "TriLoRASaveAdapter", adapter=adapter, name="baked", dtype=dtype)[0]


def by_core(host_nodes, patcher, name: str) -> dict[str, torch.Tensor]:
    """Target key -> what the host's own loader adds at strength 1."""
    return deltas(run_node(host_nodes, "LoraLoaderModelOnly", model=patcher, lora_name=name, strength_model=1.0)[0], patcher)


def assert_same(found: dict, wanted: dict, tolerance: float = 2e-6) -> None:
    """Equal to fp32's rounding of the largest change that each weight gets."""
    assert found.keys() == wanted.keys() and wanted
    for key, delta in wanted.items():
        assert float((found[key] - delta).abs().max()) <= tolerance * float(delta.abs().max()) + 2e-7, key


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FIXED])
def test_I6_a_baked_file_is_the_loader_with_block_weights(host_nodes, tiny, files, kind):
    """Every kind that a ratio can be written into, with negative blocks, half a strength and blocks at 0, which the file has not.

    The host's patches are objects, which a writer of block weights cannot take for tuples.
    """
    adapter = load(host_nodes, files[kind])
    for strength in (1.0, -0.6):
        model, _ = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=files[kind], strength_model=strength, block_weights=TEXT)
        baked, report = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, adapter=adapter, strength_model=strength, block_weights=TEXT)
        name = save(host_nodes, baked)
        assert_same(by_core(host_nodes, tiny.patcher, name), deltas(model, tiny.patcher))
        assert not [key for key in load_file(folder_paths.get_full_path("loras", name)) if "mid_block" in key or "middle_block" in key]
        assert report.startswith("1 adapter: ") and "0 left out" not in report


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_at_one_and_zero_are_exact_for_every_kind(host_nodes, tiny, files, kind):
    model, _ = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=files[kind], block_weights=KEEP_OR_DROP)
    baked, _ = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, adapter=load(host_nodes, files[kind]), block_weights=KEEP_OR_DROP)
    name = save(host_nodes, baked)
    found = deltas(run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=name)[0], tiny.patcher) if kind == "DoRA" else by_core(host_nodes, tiny.patcher, name)
    assert_same(found, deltas(model, tiny.patcher), 5e-6)  # core has another formula for DoRA


@pytest.mark.parametrize("kind", FIXED)
def test_kinds_that_no_factor_scales_are_refused_with_the_reason(host_nodes, tiny, files, error, kind, base_dir):
    before, weights = set(base_dir.rglob("*")), weights_hash(tiny.patcher)
    adapter = load(host_nodes, files[kind])
    with pytest.raises(error, match=rf"\d layers? of kind {FIXED[kind]} with ratio 0.5 \(for example .*\): .*Extract Adapter"):
        run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, adapter=adapter, block_weights="IN01=0.5")
    assert set(base_dir.rglob("*")) == before and weights_hash(tiny.patcher) == weights and tiny.patcher.patches == {}


@pytest.mark.parametrize("kind", ["LoRA", "LoRA without alpha", "LoRA by PEFT's names"])
def test_a_saved_half_is_a_half_and_minus_one_keeps_its_sign(host_nodes, tiny, files, kind):
    """Not an eighth (scaled in up, down and alpha), not a quarter, and -1 not +1; in core's nodes without a file in between, too."""
    whole = by_core(host_nodes, tiny.patcher, files[kind])
    for value in (0.5, 1.5, -1.0):
        baked, _ = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, adapter=load(host_nodes, files[kind]), block_weights=f"default={value}")
        assert_same(by_core(host_nodes, tiny.patcher, save(host_nodes, baked)), {key: value * delta for key, delta in whole.items()})
        (model,) = run_node(host_nodes, "LoraModelLoader", model=tiny.patcher, lora=baked, strength_model=1.0)
        assert_same(deltas(model, tiny.patcher), {key: value * delta for key, delta in whole.items()})


def test_a_file_by_peft_itself(host_nodes, tiny, error):
    """save_pretrained with its alpha in adapter_config.json: half of what peft merges."""
    pytest.importorskip("diffusers"), pytest.importorskip("peft")
    folder = list_saved_adapters() / "by_peft"
    folder.mkdir(exist_ok=True)
    path, merged = write_peft(Twin(tiny.patcher), folder, rank=3, alpha=7.0)
    baked, _ = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, adapter=load(host_nodes, f"by_peft/{path.name}"), block_weights="IN=0.5, OUT=-1, MID=0")
    found = by_core(host_nodes, tiny.patcher, save(host_nodes, baked))
    ratios = {f"{U}.input_blocks": 0.5, f"{U}.output_blocks": -1.0, f"{U}.middle_block": 0.0}
    wanted = {key: next((r for start, r in ratios.items() if key.startswith(start)), 1.0) * delta for key, delta in merged.items()}
    wanted = {key: delta for key, delta in wanted.items() if delta.any()}
    assert found.keys() == wanted.keys()
    assert all(distance(found[key], wanted[key]) <= 1e-5 for key in wanted)


def test_half_precision_files_differ_by_its_rounding_alone(host_nodes, tiny, files):
    model, _ = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=files["half precision"], strength_model=0.01, block_weights=TEXT)
    baked, _ = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, adapter=load(host_nodes, files["half precision"]), strength_model=0.01, block_weights=TEXT)
    found, wanted = by_core(host_nodes, tiny.patcher, save(host_nodes, baked, "fp16")), deltas(model, tiny.patcher)
    assert found.keys() == wanted.keys() and all(distance(found[key], wanted[key]) <= 1e-3 for key in wanted)


def test_stacks_of_three_in_any_order(host_nodes, tiny, files, saved):
    """kohya's, PEFT's and ours, each with strength, block weights and keep_rank, on the same weights: one layer a weight, and one result."""
    other = saved(as_peft(plain(tiny, 3, seed=50)))
    entries = [
        {"lora_name": files["LoRA"], "strength_model": 0.8, "block_weights": TEXT}, {"lora_name": other, "strength_model": -0.5, "block_weights": "IN=0"},
        {"lora_name": files["TriLoRA"], "strength_model": 1.3, "keep_rank": 2, "block_weights": "OUT.conv=0.5"},
    ]  # fmt: skip
    shuffle, wanted = random.Random(7), None
    for _ in range(4):
        shuffle.shuffle(entries)
        stack = stacked(host_nodes, entries)
        wanted = wanted or deltas(run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, stack=stack)[0], tiny.patcher)
        baked, report = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, stack=stack)
        assert_same(by_core(host_nodes, tiny.patcher, save(host_nodes, baked)), wanted, 5e-6)
        assert report.startswith("3 adapters: 8 layers (8 low rank), 8 of them sums") and len(baked) == 24
        assert {key.split(".")[0] for key in baked} == {key.split(".")[0] for key in baked if key.startswith(("lora_unet_down_blocks_", "lora_unet_mid_block_", "lora_unet_up_blocks_"))}


def test_an_adapter_beside_a_stack_of_other_kinds(host_nodes, tiny, files):
    """LoHa where nothing else is, biases beside a LoRA: each kind once on a weight; the adapter has its own three inputs."""
    entries = [{"lora_name": files["LoHa"], "block_weights": "default=0, IN01=0.5"}, {"lora_name": files["norms and biases"], "strength_model": -0.4}]
    stack = stacked(host_nodes, entries)
    text = "IN01=0, OUT01=0.25"
    baked, _ = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, adapter=load(host_nodes, files["LoRA"]), strength_model=0.7, block_weights=text, stack=stack)
    both = stacked(host_nodes, [*entries, {"lora_name": files["LoRA"], "strength_model": 0.7, "block_weights": text}])
    wanted = deltas(run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, stack=both)[0], tiny.patcher)
    assert_same(by_core(host_nodes, tiny.patcher, save(host_nodes, baked)), wanted, 5e-6)


@pytest.mark.parametrize(("first", "second", "words"), [
    ("LoHa", "LoRA", "8 layers of several kinds in the adapters, LoHa and low rank"), ("LoKr", "LoKr", "8 layers of kind LoKr in several of the adapters"),
    ("TLoRA", "LoRA", "8 layers of several kinds in the adapters, transform and low rank"),
])  # fmt: skip
def test_kinds_that_cannot_be_one_layer(host_nodes, tiny, files, error, first, second, words):
    with pytest.raises(error, match=rf"{words} \(for example lora_unet_.*Extract Adapter"):
        run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, stack=stacked(host_nodes, [{"lora_name": files[first]}, {"lora_name": files[second]}]))


def test_the_text_encoder(host_nodes, models_dir, saved, error):
    """Its own strength and its own blocks; refused without CLIP, unless its strength is 0."""
    model, clip = load_checkpoint(host_nodes)[:2]
    unet = f"{U}.middle_block.1.transformer_blocks.0.attn1.to_q"
    files = [saved({k: t for n, name in enumerate(CLIP_LAYERS) for k, t in low_rank(f"lora_te_{name}", 3072, 768, seed=seed + n).items()} | low_rank(unet, 320, 320, seed=seed))
             for seed in (1, 5)]  # fmt: skip
    entries = [{"lora_name": files[0], "strength_model": 0.5, "strength_clip": -0.8, "block_weights": "TE1.03=0.5"},
               {"lora_name": files[1], "strength_model": 0.3, "strength_clip": 0.6, "block_weights": "TE1.03=2, MID=-1, TE1.07=0"}]
    stack = stacked(host_nodes, entries)
    wanted = run_node(host_nodes, "TriLoRAApplyStack", model=model, clip=clip, stack=stack)
    baked, _ = run_node(host_nodes, "TriLoRABakeAdapter", model=model, clip=clip, stack=stack)
    found = run_node(host_nodes, "LoraLoader", model=model, clip=clip, lora_name=save(host_nodes, baked), strength_model=1.0, strength_clip=1.0)
    assert_same(deltas(found[0], model), deltas(wanted[0], model), 5e-6)
    assert_same(deltas(found[1].patcher, clip.patcher), deltas(wanted[1].patcher, clip.patcher), 5e-6)
    assert len(deltas(wanted[1].patcher, clip.patcher)) == 2
    assert {key.partition(".")[0] for key in baked if key.startswith("lora_te")} == {f"lora_te_{name}" for name in CLIP_LAYERS}
    with pytest.raises(error, match=r"2 layers for a text encoder .*, and clip is not connected"):
        run_node(host_nodes, "TriLoRABakeAdapter", model=model, stack=stack)
    alone, report = run_node(host_nodes, "TriLoRABakeAdapter", model=model, adapter=load(host_nodes, files[0]), strength_clip=0.0)
    assert len(alone) == 3 and "2 layers for a text encoder left out, since no CLIP is connected" in report


def test_slices_of_fused_weights_beside_the_whole(host_nodes, saved, error):
    """Flux: diffusers' q, k and v, kohya's qkv and the halves that the host exchanges; core adds both, and so the file has both."""
    tiny = tiny_models.flux_model()
    split = [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    whole, norm_out = f"{U}.double_blocks.0.img_attn.qkv", "transformer.norm_out.linear"
    first = {k: t for i, name in enumerate(split) for k, t in low_rank(name, 64, 64, seed=i).items()} | low_rank(norm_out, 128, 64, seed=7)
    entries = [{"lora_name": saved(first), "strength_model": 0.5, "block_weights": "D00=-0.5"}, {"lora_name": saved(low_rank(whole, 192, 64, seed=4)), "strength_model": 0.7},
               {"lora_name": saved(low_rank(split[1], 64, 64, seed=9)), "strength_model": 2.0}, {"lora_name": saved(low_rank(f"{U}.final_layer.adaLN_modulation.1", 128, 64)), "strength_model": 0.2}]  # fmt: skip
    stack = stacked(host_nodes, entries)
    wanted = deltas(run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, stack=stack)[0], tiny.patcher)
    baked, _ = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, stack=stack)
    assert {key.partition(".lora_")[0] for key in baked if not key.endswith(".alpha")} == {*split, whole, norm_out, f"{U}.final_layer.adaLN_modulation.1"}
    assert_same(by_core(host_nodes, tiny.patcher, save(host_nodes, baked)), wanted, 5e-6)
    magnitudes = saved(low_rank(split[0], 64, 64) | {f"{split[0]}.dora_scale": 1 + 0.1 * normal(64, 1).abs()})
    with pytest.raises(error, match="1 layer of kind DoRA beside others for a part of the same weight"):
        run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, stack=stacked(host_nodes, [entries[1], {"lora_name": magnitudes}]))
    beside = stacked(host_nodes, [entries[2], {"lora_name": magnitudes}])
    baked, _ = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, stack=beside)
    wanted = deltas(run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, stack=beside)[0], tiny.patcher)
    found = run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=save(host_nodes, baked))[0]
    assert_same(deltas(found, tiny.patcher), wanted, 5e-6)


@pytest.mark.parametrize(("inputs", "words"), [
    ({"block_weights": TEXT}, "block_weights: only for adapter, which is not connected"), ({"strength_model": 0.5}, "strength_model: only for adapter"),
    ({"strength_clip": 0.0, "block_weights": " "}, "strength_clip: only for adapter"),
])  # fmt: skip
def test_inputs_of_an_adapter_that_is_not_there_are_refused(host_nodes, tiny, files, error, inputs, words):
    """They would have no effect on the stack, whose files have their own."""
    stack = stacked(host_nodes, [{"lora_name": files["LoRA"], "block_weights": "default=0, IN01=1"}])
    with pytest.raises(error, match=f"{words}.*Adapter Stack"):
        run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, stack=stack, **inputs)
    plain_inputs = {"strength_model": 1.0, "strength_clip": 1.0, "block_weights": None}
    assert len(run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, stack=stack, **plain_inputs)[0]) == 6


def test_it_can_be_cancelled_and_shows_how_far_it_is(host_nodes, tiny, files, monkeypatch):
    """The bar ends at the number of layers; the host's interrupt ends the node in the middle."""
    shown, checks = [], []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda self, value, *others, **more: shown.append((value, self.total)))
    (adapter,) = run_node(host_nodes, "TriLoRALoadAdapter", lora_name=files["LoRA"])[:1]
    run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, adapter=adapter)
    assert shown == [(done, len(NAMES)) for done in range(1, len(NAMES) + 1)]

    def interrupt():
        checks.append(None)
        if len(checks) == 3:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, adapter=adapter)
    assert len(shown) == len(NAMES) + 2


def test_an_unlinked_block_weights_is_an_empty_one(host_nodes, tiny, files):
    baked = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, adapter=load(host_nodes, files["LoRA"]), block_weights=None)[0]
    assert len(baked) == 24


def test_metadata_name_the_sources_and_inspect_adapter_tells(host_nodes, tiny, files):
    import hashlib

    stack = stacked(host_nodes, [{"lora_name": files["LoRA"], "strength_model": 0.5, "block_weights": "in01 = .5"}])
    baked, _ = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, stack=stack)
    with safe_open(folder_paths.get_full_path("loras", save(host_nodes, baked)), framework="pt") as file:
        metadata = file.metadata()
    (step,) = json.loads(metadata["trilora.provenance"])
    with open(folder_paths.get_full_path("loras", files["LoRA"]), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    source = {"name": files["LoRA"], "sha256": digest, "strength_model": 0.5, "strength_clip": 1.0, "block_weights": "default=1, IN01=0.5"}
    assert step == {"action": "bake", "block_weights": "default=1, IN01=0.5", "of": [source]}
    assert metadata["modelspec.trigger_phrase"] == "sks" and metadata["ss_base_model_version"] == "sd_v1"
    again, _ = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, adapter=baked, strength_model=2.0)
    _, report = run_node(host_nodes, "TriLoRAInspectAdapter", adapter=again)
    assert "made by" in report and "bake, block_weights default=1, IN01=0.5, of 1 adapters; bake, of 1 adapters" in report


def test_what_cannot_be_baked_says_why_and_changes_nothing(host_nodes, tiny, files, saved, error, base_dir):
    adapter, weights = load(host_nodes, files["LoRA"]), weights_hash(tiny.patcher)
    before = set(base_dir.rglob("*"))
    for inputs, words in (
        ({}, "adapter and stack: nothing is connected"), ({"adapter": adapter, "strength_model": 0.0}, "every layer has ratio 0"),
        ({"adapter": adapter, "block_weights": "IN55=1"}, "block_weights for adapter: .*(?i:IN55)"), ({"adapter": {"lora_unet_nowhere.diff": torch.ones(3)}}, "adapter: none of its 1 layer found a place in this model"),
        ({"adapter": {f"{NAMES[0]}.diff": torch.ones(3, 3)}}, r"adapter: .* its layer for .* is \(3, 3\), expected"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, **inputs)
    assert set(base_dir.rglob("*")) == before and tiny.patcher.patches == {} and weights_hash(tiny.patcher) == weights
    stray = saved(plain(tiny) | low_rank("lora_unet_nowhere", 3, 3))
    _, report = run_node(host_nodes, "TriLoRABakeAdapter", model=tiny.patcher, adapter=load(host_nodes, stray))
    assert re.search(r"adapter: 1 of \d+ layers left out, for which this model \(\w+\) has no place: lora_unet_nowhere$", report)
