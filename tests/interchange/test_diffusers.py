"""diffusers, both ways: its files are read with the delta that it fuses, and from our files it fuses the same delta.

Its U-Nets have all layers of SD1.x and SDXL. What counts is always the fused weight of a fresh model that has loaded
the file with diffusers' own loader.
"""

import warnings

import pytest
import torch
from comfyui_trilora.tests.interchange.small_models import (
    added,
    assert_same,
    copies,
    draw,
    file_deltas,
    random_adapter,
    randomise,
)
from comfyui_trilora.tests.interchange.unets import FAMILIES, SD1
from comfyui_trilora.trilora_ops.checkpoint import canonical_state, peft_state, read_adapter, write_adapter
from comfyui_trilora.trilora_ops.naming import peft_name, public_name

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
TOLERANCE = {"fp32": 5e-6, "fp16": 2e-3}
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
    return diffusers


@pytest.fixture(autouse=True)
def no_pattern_left_over():
    """peft warns of patterns that name no module: then diffusers has misread the file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*alpha_pattern keys did not match.*")
        yield


def fused(pipe, path, part: str = "unet") -> dict[str, torch.Tensor]:
    """Layer name -> delta, as diffusers loads the file and fuses it into a fresh model."""
    model = getattr(pipe, part)
    before = copies(model)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    pipe.fuse_lora(components=[part])
    pipe.unload_lora_weights()
    return {f"{part}.{name}": delta for name, delta in added(before, copies(model)).items()}


def trained(unet, modules, **options):
    """A U-Net with a random adapter of peft's on the modules; returns its tensors, named as in the U-Net."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet.add_adapter(LoraConfig(target_modules=list(modules), init_lora_weights=False, **options))
    randomise(p for name, p in unet.named_parameters() if "lora_" in name)
    return get_peft_model_state_dict(unet)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_file_of_diffusers_is_read_as_diffusers_reads_it(diffusers, tmp_path, family, dtype):
    """Every layer, written by save_lora_weights with its configuration, whose alpha is twice the rank."""
    unet = family.unet()
    modules = copies(unet)
    tensors = {key: tensor.to(DTYPES[dtype]) for key, tensor in trained(unet, modules, r=2, lora_alpha=4).items()}
    family.pipe(unet).save_lora_weights(tmp_path, tensors, unet_lora_adapter_metadata=unet.peft_config["default"].to_dict())
    expected = fused(family.pipe(family.unet()), tmp_path / FILE)
    assert set(expected) == {f"unet.{name}" for name in modules}
    state = read_adapter(tmp_path / FILE)
    assert_same(file_deltas(state), expected, 5e-6)
    copy = write_adapter(tmp_path / "copy.safetensors", canonical_state(state), DTYPES[dtype])
    assert_same(file_deltas(read_adapter(copy)), expected, TOLERANCE[dtype])


ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_out.0")


def attention(family) -> list[str]:
    return [name for name in copies(family.unet()) if name.endswith(ATTENTION)]


def test_without_its_configuration_the_scale_is_one(diffusers, tmp_path):
    """diffusers' files of before 0.34 have none, and diffusers too then takes alpha = r."""
    unet = SD1.unet()
    SD1.pipe(unet).save_lora_weights(tmp_path, trained(unet, attention(SD1), r=2, lora_alpha=4))
    assert_same(file_deltas(read_adapter(tmp_path / FILE)), fused(SD1.pipe(SD1.unet()), tmp_path / FILE), 5e-6)


def test_the_older_keys_of_diffusers_scripts(diffusers, tmp_path):
    """`to_q.lora.up.weight`, as the training scripts of diffusers convert peft's tensors before they save."""
    from diffusers.utils import convert_state_dict_to_diffusers

    unet = SD1.unet()
    tensors = convert_state_dict_to_diffusers(trained(unet, attention(SD1), r=2, lora_alpha=2))
    assert any(key.endswith("to_q.lora.up.weight") for key in tensors)
    SD1.pipe(unet).save_lora_weights(tmp_path, tensors)
    assert_same(file_deltas(read_adapter(tmp_path / FILE)), fused(SD1.pipe(SD1.unet()), tmp_path / FILE), 5e-6)


def test_an_adapter_saved_by_the_unet_alone(diffusers, tmp_path):
    """`save_lora_adapter` puts no `unet.` before the names, neither of the layers nor of the configuration's fields."""
    unet = SD1.unet()
    trained(unet, attention(SD1), r=3, lora_alpha=5, rank_pattern={"attn1.to_k": 2}, alpha_pattern={"attn1.to_k": 1})
    unet.save_lora_adapter(tmp_path)
    fresh = SD1.unet()
    before = copies(fresh)
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name=FILE)
    fresh.fuse_lora()
    fresh.unload_lora()
    expected = added(before, copies(fresh))
    assert len(expected) == len(attention(SD1))
    assert_same(file_deltas(read_adapter(tmp_path / FILE)), expected, 5e-6)


def adapter(family, name_of, rank=3):
    """A random adapter for every layer of a U-Net, with the names that `name_of` gives them in a file."""
    layout, weights = family.layout(), copies(family.unet())
    shapes, modules = {}, {}
    for key in family.keys():
        module, name = peft_name(key, family.name, layout), name_of(key, family.name, layout)
        shapes[name], modules[name] = tuple(weights[module.removeprefix("unet.")].shape), module
    return random_adapter(shapes, rank), modules


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", ["kohya", "peft"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_diffusers_reads_our_file(diffusers, tmp_path, family, keys, dtype):
    """Layers that differ a thousandfold in size and not all have the same rank, on every layer of the U-Net."""
    foreign, modules = adapter(family, public_name if keys == "kohya" else peft_name, rank=6)
    state = canonical_state(foreign) if keys == "kohya" else peft_state(foreign)
    path = write_adapter(tmp_path / "ours.safetensors", state, DTYPES[dtype])
    expected = {modules[name]: delta for name, delta in file_deltas(foreign).items()}
    assert_same(fused(family.pipe(family.unet()), path), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("keys", ["kohya", "peft"])
def test_a_file_of_diffusers_saved_by_us_is_its_again(diffusers, tmp_path, keys):
    """Its configuration does not stay beside tensors that it no longer describes."""
    unet = SD1.unet()
    tensors = trained(unet, attention(SD1), r=4, lora_alpha=2)
    SD1.pipe(unet).save_lora_weights(tmp_path, tensors, unet_lora_adapter_metadata=unet.peft_config["default"].to_dict())
    state = read_adapter(tmp_path / FILE)
    expected = fused(SD1.pipe(SD1.unet()), tmp_path / FILE)
    if keys == "kohya":  # `unet.a.b` is diffusers' name for the layer that kohya calls `lora_unet_a_b`
        state = type(state)({_kohya(key): tensor for key, tensor in state.items()}, state.metadata)
    path = write_adapter(tmp_path / "ours" / FILE, canonical_state(state) if keys == "kohya" else peft_state(state), torch.float32)
    assert_same(fused(SD1.pipe(SD1.unet()), path), expected, 5e-6)


def _kohya(key: str) -> str:
    name, ending = next((key.removesuffix(end), end) for end in (".lora_A.weight", ".lora_B.weight", ".alpha") if key.endswith(end))
    return "lora_unet_" + name.removeprefix("unet.").replace(".", "_") + ending


TEXT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(4)
    return CLIPTextModel(CLIPTextConfig(vocab_size=20, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_diffusers_reads_our_text_encoder_layers(diffusers, tmp_path, dtype):
    """In kohya's keys, beside layers of the U-Net."""
    encoder = text_encoder()
    shapes = {name: tuple(weight.shape) for name, weight in copies(encoder).items() if name.endswith(TEXT)}
    assert len(shapes) == 2 * len(TEXT)
    names = {"lora_te_text_model_" + name.removeprefix("text_model.").replace(".", "_"): name for name in shapes}
    foreign = random_adapter({kohya: shapes[name] for kohya, name in names.items()}, rank=4)
    expected = {f"text_encoder.{names[kohya]}": delta for kohya, delta in file_deltas(foreign).items()}
    foreign["lora_unet_conv_in.lora_up.weight"], foreign["lora_unet_conv_in.lora_down.weight"] = draw(8, 2, 1, 1), draw(2, 4, 3, 3)
    path = write_adapter(tmp_path / "ours.safetensors", canonical_state(foreign), DTYPES[dtype])
    assert_same(fused(SD1.pipe(SD1.unet(), encoder), path, "text_encoder"), expected, TOLERANCE[dtype])
