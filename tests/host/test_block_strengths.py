"""Block strengths on files of every kind: W + ratio * (W_1 - W) in every block, W_1 by the host's own loader at strength 1, DoRA's by its formula."""

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import folder_paths
import pytest
import torch
from comfyui_trilora.tests.host import adapter_files, tiny_models
from comfyui_trilora.tests.host.adapter_files import low_rank, normal
from comfyui_trilora.tests.host.block_runs import LOADERS, load
from comfyui_trilora.tests.host.foreign_writers import deltas, dora, weight_of
from comfyui_trilora.tests.host.tiny_run import distance, list_saved_adapters, load_checkpoint, run_node
from safetensors.torch import load_file, save_file

U = "diffusion_model"
TEXT = "IN01=0.5, IN03=-1, MID=0, OUT01=1.7"
RATIOS = {"input_blocks.1": 0.5, "input_blocks.3": -1.0, "middle_block": 0.0, "output_blocks.1": 1.7}
# a linear layer and a convolution in each of these blocks
NAMES = tuple(f"{U}.{name}" for name in (
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q", "input_blocks.1.0.in_layers.2",
    "input_blocks.3.1.transformer_blocks.0.attn2.to_k", "input_blocks.3.0.in_layers.2",
    "middle_block.1.transformer_blocks.0.attn1.to_q", "middle_block.0.in_layers.2",
    "output_blocks.1.1.transformer_blocks.0.ff.net.2", "output_blocks.1.0.in_layers.2",
))  # fmt: skip
# kind -> LyCORIS' own name of it in adapter_files, and further options
LYCORIS = {
    "LoCon": ("locon", {}), "LoCon, Tucker": ("tucker", {}), "DoRA": ("dora", {}), "LoHa": ("loha", {}), "LoHa, Tucker": ("loha-tucker", {}),
    "LoKr": ("lokr", {}), "LoKr, full": ("lokr", {"full_matrix": True}), "LoKr, both halves": ("lokr", {"decompose_both": True}),
    "OFT": ("oft", {}), "BOFT": ("boft", {}), "GLoRA": ("glora", {}), "full": ("full", {}),
}  # fmt: skip
KINDS = ("LoRA", "LoRA without alpha", "LoRA by PEFT's names", "TriLoRA", "TLoRA", "norms, biases and whole weights", *LYCORIS)
BENT = {"OFT", "BOFT", "norms, biases and whole weights"}  # core is no straight line in their strength


@pytest.fixture(scope="module")
def clip(host_nodes, models_dir):
    return load_checkpoint(host_nodes)[1]


def layers(tiny, rank: int = 5, alpha: float = 3.3) -> dict[str, torch.Tensor]:
    """Low-rank layers under kohya's endings."""
    tensors = {}
    for seed, name in enumerate(NAMES):
        out, inp, *kernel = weight_of(tiny.patcher, f"{name}.weight").shape
        tensors |= low_rank(name, out, inp, rank, tuple(kernel), seed) | {f"{name}.alpha": torch.tensor(alpha)}
    return tensors


def norms_and_biases(tiny) -> dict[str, torch.Tensor]:
    """Differences of norms and biases, and weights that are replaced."""
    tensors = {}
    for seed, name in enumerate(NAMES):
        if name.endswith("in_layers.2"):
            tensors[f"{name}.diff_b"] = 0.1 * normal(*weight_of(tiny.patcher, f"{name}.bias").shape, seed=seed)
        else:
            block, _, _ = name.partition(".0.")
            size = weight_of(tiny.patcher, f"{block}.0.norm1.weight").shape
            tensors |= {f"{block}.0.norm1.diff": 0.1 * normal(*size, seed=seed), f"{block}.0.norm2.set_weight": 1 + 0.1 * normal(*size, seed=seed)}
    return tensors


@pytest.fixture(scope="module")
def files(tiny, saved, pack_module):
    """Kind -> file name."""
    pytest.importorskip("lycoris")
    checkpoint, registry = pack_module("trilora_ops.checkpoint"), pack_module("trilora_ops.registry")
    plain = layers(tiny)
    trilora = checkpoint.canonical_state(checkpoint.AdapterState(plain))
    found = {
        "LoRA": (plain, None),
        "LoRA without alpha": ({key: tensor for key, tensor in plain.items() if not key.endswith(".alpha")}, None),
        "LoRA by PEFT's names": ({key.replace("lora_up", "lora_B").replace("lora_down", "lora_A"): tensor for key, tensor in plain.items() if not key.endswith(".alpha")}, None),
        "TriLoRA": (dict(trilora), trilora.metadata),
        "TLoRA": (adapter_files.transform(tiny.patcher, registry, names=NAMES), None),
        "norms, biases and whole weights": (norms_and_biases(tiny), None),
    }  # fmt: skip
    found |= {kind: (adapter_files.lycoris(tiny.patcher, name, seed, NAMES, **options), None) for seed, (kind, (name, options)) in enumerate(LYCORIS.items())}
    assert found.keys() == set(KINDS)
    return {kind: saved(*file) for kind, file in found.items()}


@pytest.fixture(scope="module")
def alone(host_nodes, tiny, files):
    """Kind -> {weight key: W_1 - W}, by the host's own loader at strength 1, DoRA's by its formula, which core's is not."""
    found = {kind: deltas(run_node(host_nodes, "LoraLoaderModelOnly", model=tiny.patcher, lora_name=name, strength_model=1.0)[0], tiny.patcher)
             for kind, name in files.items()}  # fmt: skip
    return found | {"DoRA": dora(tiny.patcher, load_file(folder_paths.get_full_path("loras", files["DoRA"])))}


by_each_loader = pytest.mark.parametrize("loader", LOADERS)


def ratio_of(key: str) -> float:
    """The strength that TEXT gives a weight."""
    return next(ratio for block, ratio in RATIOS.items() if key.startswith(f"{U}.{block}."))


@by_each_loader
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_of_every_kind_gets_its_strength(host_nodes, tiny, files, alone, kind, loader):
    """W + ratio * (W_1 - W), and no patch where the ratio is 0; times the node's own strength, whatever core does with that."""
    assert {ratio_of(key) for key in alone[kind]} == set(RATIOS.values())
    for strength in (1.0, -0.7):
        model, _ = load(host_nodes, loader, tiny.patcher, files[kind], strength=strength, block_weights=TEXT)
        found, wanted = deltas(model, tiny.patcher), {key: strength * ratio_of(key) * delta for key, delta in alone[kind].items() if ratio_of(key)}
        assert found.keys() == wanted.keys()
        assert {key: distance(found[key], wanted[key]) <= 1e-5 for key in wanted} == dict.fromkeys(wanted, True)


@pytest.mark.parametrize("kind", sorted(BENT))
def test_core_is_another_curve_there(host_nodes, tiny, files, alone, kind):
    """Its loader at 0.5 is not half of its loader at 1: without our own patch for these kinds the test above would fail."""
    half = deltas(run_node(host_nodes, "LoraLoaderModelOnly", model=tiny.patcher, lora_name=files[kind], strength_model=0.5)[0], tiny.patcher)
    assert any(distance(half[key], 0.5 * delta) > 0.05 for key, delta in alone[kind].items())


@by_each_loader
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "DoRA"])
@pytest.mark.parametrize("text", ["", "default=1", "default=0, IN=1, MID=1, OUT=1"])
def test_all_ones_is_cores_loader(host_nodes, tiny, files, kind, loader, text):
    """To four steps of fp32 at the weights' size: the sums are the same, their order is not; what is only added, to the bit."""
    model, _ = load(host_nodes, loader, tiny.patcher, files[kind], block_weights=text)
    (core,) = run_node(host_nodes, "LoraLoaderModelOnly", model=tiny.patcher, lora_name=files[kind], strength_model=1.0)
    assert model.patches.keys() == core.patches.keys() and len(core.patches) >= 8
    for key in core.patches:
        found, wanted = weight_of(model, key), weight_of(core, key)
        steps = float((found - wanted).abs().max() / (torch.finfo(torch.float32).eps * wanted.abs().max()))
        assert steps <= (0 if kind.startswith(("norms", "TLoRA")) else 4), key


@by_each_loader
@pytest.mark.parametrize("kind", KINDS)
def test_all_zeros_is_no_adapter(host_nodes, tiny, files, kind, loader):
    model, _ = load(host_nodes, loader, tiny.patcher, files[kind], block_weights="default=0")
    assert model.patches == {} and model is not tiny.patcher


@by_each_loader
def test_an_unlinked_text_is_an_empty_one(host_nodes, tiny, files, loader):
    model, _ = load(host_nodes, loader, tiny.patcher, files["LoRA"], block_weights=None)
    whole, _ = load(host_nodes, loader, tiny.patcher, files["LoRA"])
    assert all(torch.equal(weight_of(model, key), weight_of(whole, key)) for key in whole.patches) and len(model.patches) == 8


@by_each_loader
def test_blocks_that_the_file_has_not_change_nothing(host_nodes, tiny, files, loader):
    model, _ = load(host_nodes, loader, tiny.patcher, files["LoRA"], block_weights="IN00=0, IN02=0.3, EMB=-1, OUT02=7")
    whole, _ = load(host_nodes, loader, tiny.patcher, files["LoRA"])
    assert model.patches.keys() == whole.patches.keys()
    assert all(torch.equal(weight_of(model, key), weight_of(whole, key)) for key in whole.patches)


@by_each_loader
def test_kinds_of_layers_and_patterns(host_nodes, tiny, files, alone, loader):
    """The second axis and /patterns/ of names, on linear layers, convolutions and biases; the last rule wins."""
    text = r"default=0.25, .conv=0.5, IN03.cross=-1, MID.conv=0, /ff\.net\.2$/=1.7"
    model, _ = load(host_nodes, loader, tiny.patcher, files["full"], block_weights=text)
    found = deltas(model, tiny.patcher)
    for key, delta in alone["full"].items():
        ratio = 1.7 if ".ff.net.2." in key else 0.25 if ".attn1." in key else -1 if ".attn2." in key else 0 if "middle" in key else 0.5
        assert (key in found) == bool(ratio)
        assert not ratio or distance(found[key], ratio * delta) <= 1e-5, key


@by_each_loader
def test_text_encoder_blocks_reach_the_clip(host_nodes, tiny, clip, saved, loader):
    """By whose key it is: TE1.03 is the text encoder's, IN01 the model's; each with its own strength."""
    te = {n: f"lora_te_text_model_encoder_layers_{n}_mlp_fc1" for n in (0, 3, 7)}
    query = f"{NAMES[0]}.weight"
    name = saved({k: v for n in te for k, v in low_rank(te[n], 3072, 768, seed=n).items()} | low_rank(NAMES[0], 64, 64))
    core = run_node(host_nodes, "LoraLoader", model=tiny.patcher, clip=clip, lora_name=name, strength_model=1.0, strength_clip=1.0)
    text = "default=0.4, TE1.03=-1, TE1.07=0, IN01=0.5"
    model, encoder = load(host_nodes, loader, tiny.patcher, name, clip, 0.8, 0.6, block_weights=text)
    found, wanted = deltas(encoder.patcher, clip.patcher), deltas(core[1].patcher, clip.patcher)
    ratios = {next(key for key in wanted if f".layers.{n}." in key): ratio for n, ratio in ((0, 0.4), (3, -1.0))}
    assert found.keys() == ratios.keys() and len(wanted) == 3 and list(model.patches) == [query]
    assert all(distance(found[key], 0.6 * ratio * wanted[key]) <= 1e-5 for key, ratio in ratios.items())
    assert distance(deltas(model, tiny.patcher)[query], 0.8 * 0.5 * deltas(core[0], tiny.patcher)[query]) <= 1e-5

    # the same text without a CLIP; and either half alone
    alone, none = load(host_nodes, loader, tiny.patcher, name, strength=0.8, block_weights=text)
    assert none is None and torch.equal(weight_of(alone, query), weight_of(model, query))
    model, encoder = load(host_nodes, loader, tiny.patcher, name, clip, block_weights="TE=0")
    assert list(model.patches) == [query] and encoder.patcher.patches == {}
    model, encoder = load(host_nodes, loader, tiny.patcher, name, clip, block_weights="default=0, TE=1")
    assert model.patches == {} and encoder.patcher.patches.keys() == wanted.keys()
    assert clip.patcher.patches == {} and tiny.patcher.patches == {}


def test_a_stack_weighs_each_file_by_its_own_text(host_nodes, tiny, files, alone):
    """Three kinds on the same weights, one of them without block weights, beside another extension's stack, which has none."""
    entries = [("OFT", 0.5, TEXT), ("LoHa", -0.7, ""), ("LoRA", 1.3, "default=0, IN=0.5")]
    stack = None
    for kind, strength, text in entries:
        more = {"stack": stack} if stack else {}
        (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", lora_name=files[kind], strength_model=strength, block_weights=text, **more)
    model = run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, stack=stack, lora_stack=[(files["DoRA"], 0.2, 1.0)])[0]
    found = deltas(model, tiny.patcher)
    assert found.keys() == alone["OFT"].keys()
    for key, delta in found.items():
        wanted = 0.5 * ratio_of(key) * alone["OFT"][key] - 0.7 * alone["LoHa"][key] + 0.2 * alone["DoRA"][key]
        if ".input_blocks." in key:
            wanted = wanted + 1.3 * 0.5 * alone["LoRA"][key]
        assert distance(delta, wanted) <= 1e-5 and len(model.patches[key]) == 1


def test_the_loader_adds_patches_once(host_nodes, tiny, files, monkeypatch):
    """However many strengths there are: the host lists all weights of the model at each call, which takes its time."""
    given = []
    original = comfy.model_patcher.ModelPatcher.add_patches

    def counted(self, patches, strength_patch=1.0, strength_model=1.0):
        given.append((strength_patch, len(patches)))
        return original(self, patches, strength_patch, strength_model)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "add_patches", counted)
    for text, count in ((TEXT, 6), ("default=0", None)):
        given.clear()
        run_node(host_nodes, "TriLoRALoader", model=tiny.patcher, lora_name=files["LoRA"], strength_model=2.0, block_weights=text)
        assert given == ([(2.0, count)] if count else [])


@by_each_loader
def test_a_changed_strength_repatches_no_more_than_a_fresh_load(host_nodes, tiny, files, loader, monkeypatch):
    """Weights that the host computes when one block's strength has changed: those of a first load, those with a patch."""
    computed = []
    original = comfy.lora.calculate_weight

    def counted(patches, weight, key, *args, **options):
        computed.append(key)
        return original(patches, weight, key, *args, **options)

    def sampled(text: str) -> tuple[list[str], torch.Tensor]:
        model, _ = load(host_nodes, loader, tiny.patcher, files["LoRA"], block_weights=text)
        computed.clear()
        with torch.inference_mode():
            output = tiny_models.predict(tiny._replace(patcher=model), normal(*tiny.latent_shape, seed=8), 0.9)
        return sorted(computed), output

    monkeypatch.setattr(comfy.lora, "calculate_weight", counted)
    first, before = sampled(TEXT)
    again, after = sampled(TEXT.replace("IN01=0.5", "IN01=0.6"))
    assert first == again == sorted(f"{name}.weight" for name in NAMES if "middle_block" not in name)
    assert distance(after, before) > 1e-5
    comfy.model_management.unload_all_models()
    fresh, output = sampled(TEXT.replace("IN01=0.5", "IN01=0.6"))
    assert fresh == again and torch.equal(output, after)


@by_each_loader
def test_the_log_names_kinds_and_patterns_that_the_file_has_not(host_nodes, tiny, saved, loader, caplog):
    """A few of them and how many more; of fused layers it speaks where the model has some."""
    name = saved({key: tensor for key, tensor in layers(tiny).items() if key.startswith(NAMES[0])})
    missed = [f"IN01.{kind}" for kind in ("cross", "mlp", "conv", "norm")] + ["/attn2/", "/skip/", "/proj_in/"]
    load(host_nodes, loader, tiny.patcher, name, block_weights=", ".join(f"{selector}=0.5" for selector in missed))
    (line,) = [record.getMessage() for record in caplog.records if "block_weights" in record.getMessage()]
    assert "kinds or patterns: IN01.cross, IN01.mlp, IN01.conv, IN01.norm, /attn2/ and 2 more" in line and "fused" not in line


def test_a_layers_place_is_looked_up_once(host_nodes, tiny, files, pack_module, monkeypatch):
    blocks, asked = pack_module("trilora_ops.blocks").Blocks, []
    original = blocks.place
    monkeypatch.setattr(blocks, "place", lambda self, target: asked.append(target) or original(self, target))
    patches = pack_module("nodes.comfy_patches")
    places = patches.Places.of(tiny.patcher, None)
    found = places.patches(pack_module("nodes.files").read_file(files["LoRA"]), "file")
    places.blocks, asked.clear()
    pack_module("nodes.block_strengths").weigh(TEXT, found, places, "file")
    assert sorted(asked) == sorted(found)


@by_each_loader
@pytest.mark.parametrize(
    ("text", "message"),
    [("IN01", "'IN01' is no preset"), ("IN99=0.5", "IN99"), ("default=x", "'x'"), ("IN01=nan", "nan"), ("D07=1", "D07")],
)  # fmt: skip
def test_a_text_that_cannot_be_read_names_the_input_and_the_file(host_nodes, tiny, clip, files, pack_module, loader, text, message):
    with pytest.raises(pack_module("trilora_ops.errors").TriLoRAError) as error:
        load(host_nodes, loader, tiny.patcher, files["LoRA"], clip, block_weights=text)
    assert str(error.value).startswith(f"block_weights for {files['LoRA']}: ") and message in str(error.value)
    assert tiny.patcher.patches == {} and clip.patcher.patches == {}


@pytest.mark.parametrize("node", ["load.TriLoRALoader", "stack.AdapterStack"])
def test_a_changed_preset_runs_the_node_again(pack_module, saved, base_dir, node):
    """Of those that the text names only; a changed file too; of a text over a link those that were read."""
    module, _, name = node.partition(".")
    fingerprint = getattr(pack_module(f"nodes.{module}"), name).fingerprint_inputs
    presets = base_dir / "user" / "default" / "trilora" / "presets" / "mine.txt"
    presets.parent.mkdir(parents=True, exist_ok=True)
    file = saved(low_rank(NAMES[0], 64, 64))
    try:
        prints = []
        for text in ("MyHands:IN01=0.5\nOther:IN01=1\n", "MyHands:IN01=0.5\nOther:IN01=0\n", "MyHands:IN01=0.7\nOther:IN01=0\n"):
            presets.write_text(text, encoding="utf-8")
            prints.append(fingerprint(lora_name=file, block_weights="myhands"))
            assert fingerprint(lora_name=file) == fingerprint(lora_name=file, block_weights="IN01=0.5")
            assert fingerprint(lora_name=file, block_weights=None) == fingerprint(lora_name=file, block_weights=None)
        assert prints[0] == prints[1] != prints[2]
        save_file(low_rank(NAMES[0], 64, 64, rank=4), list_saved_adapters() / file)
        assert fingerprint(lora_name=file, block_weights="myhands") != prints[2]
    finally:
        presets.unlink()
