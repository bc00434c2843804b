"""One bad file in a stack: an error that names the file, the place, what it is and what was expected, and nothing applied."""

import pytest
import torch
from comfyui_trilora.tests.host import adapter_files
from comfyui_trilora.tests.host.adapter_files import CONV, LINEAR, low_rank, normal
from comfyui_trilora.tests.host.tiny_run import list_saved_adapters, run_node, weights_hash
from safetensors.torch import save_file


@pytest.fixture
def refused(host_nodes, tiny, pack_module):
    """Function: tensors of a file -> the message with which a stack of a good file, this one and a good one is refused."""
    written, error = [], pack_module("trilora_ops.errors").TriLoRAError

    def save(name: str, tensors) -> str:
        written.append(list_saved_adapters() / name)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, written[-1])
        return name

    def refuse(tensors) -> str:
        good, bad, stack = save("good.safetensors", low_rank(LINEAR, 128, 128)), save("bad.safetensors", tensors), None
        for name in (good, bad, good):
            (stack,) = run_node(host_nodes, "TriLoRAAdapterStack", lora_name=name, **({"stack": stack} if stack else {}))
        before = weights_hash(tiny.patcher)
        with pytest.raises(error) as raised:
            run_node(host_nodes, "TriLoRAApplyStack", model=tiny.patcher, stack=stack)
        assert tiny.patcher.patches == {} and weights_hash(tiny.patcher) == before
        assert str(raised.value).startswith("bad.safetensors: ")
        return str(raised.value)

    yield refuse
    for file in set(written):
        file.unlink()


def hada(a1, b1, a2, b2) -> dict[str, torch.Tensor]:
    return {f"{LINEAR}.hada_w1_a": normal(*a1), f"{LINEAR}.hada_w1_b": normal(*b1), f"{LINEAR}.hada_w2_a": normal(*a2), f"{LINEAR}.hada_w2_b": normal(*b2)}


def glora(*shapes) -> dict[str, torch.Tensor]:
    return {f"{LINEAR}.{name}.weight": normal(*shape) for name, shape in zip(("a1", "a2", "b1", "b2"), shapes, strict=True)}


def mid(core, name: str = CONV) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_up.weight": normal(128, 4, 1, 1), f"{name}.lora_mid.weight": normal(*core), f"{name}.lora_down.weight": normal(4, 128, 1, 1)}


# what is wrong -> (tensors, what the message says)
SIZES = {
    "lora": (low_rank(LINEAR, 320, 320), "is (320, 320), expected (128, 128)"),
    "locon": (low_rank(CONV, 128, 128, kernel=(1, 1)), "is (128, 128), expected (128, 1152)"),
    "tucker": (mid((4, 4, 1, 1)), "is (128, 128), expected (128, 1152)"),
    "loha": (hada((128, 2), (2, 64), (128, 2), (2, 64)), "is (128, 64), expected (128, 128)"),
    "lokr": ({f"{LINEAR}.lokr_w1": normal(8, 8), f"{LINEAR}.lokr_w2": normal(16, 10)}, "is (128, 80), expected (128, 128)"),
    "lokr of factors": ({f"{LINEAR}.lokr_w1_a": normal(4, 2), f"{LINEAR}.lokr_w1_b": normal(2, 4), f"{LINEAR}.lokr_w2": normal(16, 16)}, "is (64, 64), expected (128, 128)"),
    "glora": (glora((128, 2), (2, 128), (96, 2), (2, 128)), "is (96, 128), expected (128, 128)"),
    "old glora": (glora((2, 128), (128, 2), (2, 96), (128, 2)), "is (128, 96), expected (128, 128)"),
    "oft": ({f"{LINEAR}.oft_blocks": normal(10, 4, 4)}, "is (40,), expected (128,)"),
    "boft": ({f"{LINEAR}.oft_blocks": normal(3, 16, 4, 4), f"{LINEAR}.alpha": torch.tensor(0.0)}, "is (64,), expected (128,)"),
    "diff": ({f"{LINEAR}.diff": normal(128, 64)}, "is (128, 64), expected (128, 128)"),
    "bias": ({f"{CONV}.diff_b": normal(64)}, "is (64,), expected (128,)"),
    "set": ({f"{LINEAR}.set_weight": normal(1, 128)}, "is (1, 128), expected (128, 128)"),
    "dora": ({**low_rank(LINEAR, 128, 128), f"{LINEAR}.dora_scale": normal(64, 1)}, "has a dora_scale of (64, 1), expected (128, 1) or (1, 128)"),
}  # fmt: skip
BROKEN = {
    "ranks of a lora": ({f"{LINEAR}.lora_up.weight": normal(128, 3), f"{LINEAR}.lora_down.weight": normal(4, 128)}, "lora_up.weight is (128, 3) and LAYER.lora_down.weight is (4, 128): expected (out, r) and (r, in)"),
    "ranks of a loha": (hada((128, 2), (3, 128), (128, 2), (2, 128)), "hada_w1_a is (128, 2) and LAYER.hada_w1_b is (3, 128), which cannot"),
    "halves of a loha": (hada((128, 2), (2, 128), (64, 2), (2, 128)), "its halves are (128, 128) and (64, 128), which must"),
    "core": (mid((3, 4, 3, 3)), "lora_mid.weight is (3, 4, 3, 3) between factors of (128, 4, 1, 1) and (4, 128, 1, 1)"),
    "half a lokr": ({f"{LINEAR}.lokr_w1": normal(8, 8)}, "lokr_w2 is missing, a factor of its Kronecker product"),
    "inputs of a glora": (glora((96, 2), (2, 96), (128, 2), (2, 128)), "has a first pair of (96, 96) that mixes 128 inputs, expected (128, 128)"),
    "inputs of an old glora": (glora((2, 96), (128, 2), (2, 128), (128, 2)), "its first pair is (128, 2) x (2, 96), which is not square"),
    "more inputs than a glora has": (glora((192, 2), (2, 192), (128, 2), (2, 128)), "has a first pair of (192, 192) that mixes 128 inputs"),
    "ranks of a glora's inputs": (glora((128, 3), (2, 128), (128, 2), (2, 128)), "its first pair is (2, 128) x (128, 3), which is not square"),
    "vectors": ({f"{LINEAR}.lora_up.weight": normal(128), f"{LINEAR}.lora_down.weight": normal(128)}, "lora_up.weight is (128,) and LAYER.lora_down.weight is (128,): expected (out, r) and (r, in)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SIZES)
def test_a_layer_of_another_size(refused, kind):
    tensors, text = SIZES[kind]
    message, place = refused(tensors), CONV if any(CONV in key for key in tensors) else LINEAR
    assert message.startswith("bad.safetensors: ") and f"its layer for {place}.{'bias' if kind == 'bias' else 'weight'} {text}" in message
    assert message.endswith("nothing was applied")


@pytest.mark.parametrize("kind", BROKEN)
def test_factors_that_do_not_go_together(refused, kind):
    tensors, text = BROKEN[kind]
    message = refused(tensors)
    assert message.startswith(("bad.safetensors: its layer for diffusion_model.", f"bad.safetensors: {LINEAR}", f"bad.safetensors: {CONV}"))
    assert text.replace("LAYER", LINEAR) in message
    assert message.endswith("nothing was applied") and ("the file is broken" in message or "the file is incomplete" in message)


@pytest.mark.parametrize("missing", ["lora_down.weight", "hada_w2_b", "b2.weight"])
def test_half_a_layer(refused, missing):
    whole = low_rank(LINEAR, 128, 128) if missing.startswith("lora") else hada(*[(128, 2), (2, 128)] * 2) if missing.startswith("hada") else glora(*[(128, 2), (2, 128)] * 2)
    message = refused({key: tensor for key, tensor in whole.items() if not key.endswith(missing)})
    assert f"{LINEAR}.{missing} is missing" in message and message.endswith("nothing was applied")


def test_a_transform_of_another_size(refused, tiny, pack_module):
    tensors = adapter_files.transform(tiny.patcher, pack_module("trilora_ops.registry"))
    cores = [key for key in tensors if key.startswith(f"{LINEAR}.transform.")]
    tensors[cores[0]] = tensors[cores[0]][:1, :1]
    message = refused(tensors)
    assert f"its layer for {LINEAR}.weight cannot be read: " in message and message.endswith("nothing was applied")


def test_a_value_that_is_no_number(refused):
    tensors = low_rank(LINEAR, 128, 128)
    tensors[f"{LINEAR}.lora_up.weight"][3, 1] = float("nan")
    assert f"{LINEAR}.lora_up.weight: holds NaN" in refused(tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("node", "field"), [(n, f) for n in ("TriLoRALoader", "TriLoRAAdapterStack", "TriLoRABakeAdapter") for f in ("strength_model", "strength_clip")])
def test_a_strength_that_is_no_number(host_nodes, tiny, pack_module, node, field, value):
    """The host lets NaN through: it is neither below the least nor above the largest value."""
    file = list_saved_adapters() / "strength.safetensors"
    save_file(low_rank(LINEAR, 128, 128), file)
    given = {"lora_name": file.name} | ({"model": tiny.patcher} if node == "TriLoRALoader" else {})
    if node == "TriLoRABakeAdapter":
        given = {"model": tiny.patcher, "adapter": run_node(host_nodes, "TriLoRALoadAdapter", lora_name=file.name)[0]}
    with pytest.raises(pack_module("trilora_ops.errors").TriLoRAError, match=f"{field}={value} for .*: a finite number"):
        run_node(host_nodes, node, **given, **{field: value})
    assert tiny.patcher.patches == {}
    file.unlink()


def test_a_file_of_another_model_family(refused):
    message = refused(low_rank("diffusion_model.double_blocks.0.img_attn.qkv", 192, 64))
    assert "none of its 1 layer found a place in this model" in message


def test_every_kind_as_its_own_trainer_writes_it_is_let_through(tiny, pack_module):
    """The checks know all of LyCORIS' kinds: none of them is refused on the model it was made for."""
    pytest.importorskip("lycoris")
    checkpoint, patches = pack_module("trilora_ops.checkpoint"), pack_module("nodes.comfy_patches")
    kinds = adapter_files.every_kind(tiny.patcher, pack_module("trilora_ops.registry"), checkpoint)
    for kind, file in kinds.items():
        assert len(patches.patches_from_state(checkpoint.AdapterState(*file), tiny.patcher, None, kind)) >= 2
