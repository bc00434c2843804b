"""Baking against dense formulas: the change that a layer's tensors mean, written out kind by kind, times the ratio."""

import json
import random

import pytest
import torch
from comfyui_trilora.trilora_ops.adapter import LayerShape
from comfyui_trilora.trilora_ops.bake import Source, bake
from comfyui_trilora.trilora_ops.checkpoint import (
    SVD_MARK,
    AdapterState,
    canonical_state,
    read_adapter,
    split_layers,
    write_adapter,
)
from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.registry import RESIDUALS, TRANSFORMS, Method, collect_tensors, read_adapter_tensors

OUT, IN, NAME = 12, 18, "lora_unet_x"
RATIOS = (0.5, -1.0, 1.7, -0.03)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def tensors_of(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """One layer of a kind by its endings, (12, 18) or a 3x3 convolution, with random values."""

    def n(*shape: int) -> torch.Tensor:
        nonlocal seed
        seed += 100
        return draw(*shape, seed=seed)

    alpha = {".alpha": torch.tensor(1.5)}
    lora = {".lora_up.weight": n(OUT, 3), ".lora_down.weight": n(3, IN)}
    loha = {".hada_w1_a": n(OUT, 2), ".hada_w1_b": n(2, IN), ".hada_w2_a": n(OUT, 2), ".hada_w2_b": n(2, IN)}
    return {
        "lora": lambda: lora | alpha, "lora without alpha": lambda: lora,
        "peft": lambda: {".lora_B.weight": n(OUT, 3), ".lora_A.weight": n(3, IN)},
        "locon": lambda: {".lora_up.weight": n(OUT, 3, 1, 1), ".lora_down.weight": n(3, IN, 3, 3)} | alpha,
        "tucker": lambda: {".lora_up.weight": n(OUT, 3, 1, 1), ".lora_down.weight": n(4, IN, 1, 1), ".lora_mid.weight": n(3, 4, 3, 3)} | alpha,
        "loha": lambda: loha | alpha, "loha without alpha": lambda: loha,
        "loha tucker": lambda: {".hada_t1": n(2, 2, 3, 3), ".hada_w1_a": n(2, OUT), ".hada_w1_b": n(2, IN),
                                ".hada_t2": n(2, 2, 3, 3), ".hada_w2_a": n(2, OUT), ".hada_w2_b": n(2, IN)} | alpha,
        "lokr": lambda: {".lokr_w1": n(3, 2), ".lokr_w2": n(4, 9)} | alpha,
        "lokr second decomposed": lambda: {".lokr_w1": n(3, 2), ".lokr_w2_a": n(4, 2), ".lokr_w2_b": n(2, 9)} | alpha,
        "lokr both decomposed": lambda: {".lokr_w1_a": n(3, 2), ".lokr_w1_b": n(2, 2), ".lokr_w2_a": n(4, 2), ".lokr_w2_b": n(2, 9)} | alpha,
        "lokr first decomposed": lambda: {".lokr_w1_a": n(3, 2), ".lokr_w1_b": n(2, 2), ".lokr_w2": n(4, 9)} | alpha,
        "lokr without alpha": lambda: {".lokr_w1_a": n(3, 2), ".lokr_w1_b": n(2, 2), ".lokr_w2": n(4, 9)},
        "glora": lambda: {".a1.weight": n(IN, 2), ".a2.weight": n(2, IN), ".b1.weight": n(OUT, 2), ".b2.weight": n(2, IN)} | alpha,
        "glora without alpha": lambda: {".a1.weight": n(IN, 2), ".a2.weight": n(2, IN), ".b1.weight": n(OUT, 2), ".b2.weight": n(2, IN)},
        "full": lambda: {".diff": n(OUT, IN)}, "norm": lambda: {".w_norm": n(OUT), ".b_norm": n(OUT)},
        "dora": lambda: lora | alpha | {".dora_scale": n(OUT, 1)}, "peft dora": lambda: lora | {".lora_magnitude_vector": n(OUT)},
        "oft": lambda: {".oft_blocks": n(3, 4, 4)}, "boft": lambda: {".oft_blocks": n(1, 3, 4, 4)}, "set": lambda: {".set_weight": n(OUT, IN)},
        "wide": lambda: {".lora_B.weight": n(OUT, 3), ".lora_A.weight": n(3, IN), ".reshape_weight": torch.tensor([OUT, IN])},
    }[kind]()  # fmt: skip


def change(tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """W' - W of a layer, in fp64, from the formula of its kind."""
    t = {ending: tensor.double() for ending, tensor in tensors.items()}

    def scale(rank: int) -> torch.Tensor:
        return t.get(".alpha", torch.tensor(float(rank))) / rank

    def core(name: str, a: str, b: str) -> torch.Tensor:
        return torch.einsum("ijkl,ip,jr->prkl", t[name], t[a], t[b])

    up, down = t.get(".lora_up.weight", t.get(".lora_B.weight")), t.get(".lora_down.weight", t.get(".lora_A.weight"))
    if ".lora_mid.weight" in t:
        return scale(len(down)) * torch.einsum("or,rskl,si->oikl", up.flatten(1), t[".lora_mid.weight"], down.flatten(1))
    if up is not None:
        return scale(len(down)) * (up.flatten(1) @ down.flatten(1)).reshape(OUT, IN, *down.shape[2:])
    if ".hada_t1" in t:
        return scale(2) * core(".hada_t1", ".hada_w1_a", ".hada_w1_b") * core(".hada_t2", ".hada_w2_a", ".hada_w2_b")
    if ".hada_w1_a" in t:
        return scale(2) * (t[".hada_w1_a"] @ t[".hada_w1_b"]) * (t[".hada_w2_a"] @ t[".hada_w2_b"])
    if any("lokr" in ending for ending in t):
        halves = [t.get(f".lokr_w{i}", t[f".lokr_w{i}_a"] @ t[f".lokr_w{i}_b"] if f".lokr_w{i}_a" in t else None) for i in (1, 2)]
        return (1 if {".lokr_w1", ".lokr_w2"} <= t.keys() else scale(2)) * torch.kron(*halves)
    if ".a1.weight" in t:
        return scale(2) * (weight.double() @ t[".a1.weight"] @ t[".a2.weight"] + t[".b1.weight"] @ t[".b2.weight"])
    return t[".diff"] if ".diff" in t else t[".w_norm"]


def state_of(*kinds: str, seed: int = 0, metadata=None) -> AdapterState:
    """One layer for each kind, called x0, x1 ..."""
    return AdapterState({f"{NAME}{i}{ending}": t for i, kind in enumerate(kinds) for ending, t in tensors_of(kind, seed).items()}, metadata)


def bake_one(kind: str, ratio: float, **options) -> dict[str, torch.Tensor]:
    """The tensors of one layer after baking, by their endings."""
    baked, _ = bake([Source(state_of(kind), {f"{NAME}0": ratio}, **options)], {f"{NAME}0": "key"})
    return {key.removeprefix(f"{NAME}0"): tensor for key, tensor in baked.items()}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


LINEAR = ("lora", "lora without alpha", "peft", "locon", "tucker", "loha", "loha without alpha", "loha tucker", "lokr", "lokr second decomposed",
          "lokr both decomposed", "lokr first decomposed", "lokr without alpha", "glora", "glora without alpha", "full", "norm", "wide")  # fmt: skip
FIXED = {"dora": "DoRA", "peft dora": "DoRA", "oft": "OFT", "boft": "BOFT", "set": "replaced weight"}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", LINEAR)
def test_the_change_is_the_ratio_times_what_it_was(kind, ratio):
    """0.5 is 0.5, with alpha and without, and a negative ratio turns the sign: what is saved acts once, in one factor."""
    weight, found = draw(OUT, IN, seed=9), bake_one(kind, ratio)
    assert distance(change(found, weight), ratio * change(tensors_of(kind), weight)) <= 5e-7


@pytest.mark.parametrize("kind", LINEAR)
def test_one_factor_is_scaled_and_alpha_stays_positive(kind):
    """Of all tensors at most one factor a path and the alpha change, and a positive ratio touches no factor where there is an alpha."""
    before = tensors_of(kind)
    for ratio in RATIOS:
        found = bake_one(kind, ratio)
        assert float(found.get(".alpha", torch.tensor(1.0))) > 0
        if kind == "peft":  # is written with an alpha, under kohya's endings
            before = {".lora_up.weight": before[".lora_B.weight"], ".lora_down.weight": before[".lora_A.weight"]} if ".lora_B.weight" in before else before
        changed = [ending for ending in before.keys() - {".alpha"} if not torch.equal(found[ending], before[ending])]
        assert len(changed) <= (2 if kind.startswith(("glora", "norm")) else 1)
        if ratio > 0 and ".alpha" in found and kind != "lokr":
            assert changed == []


@pytest.mark.parametrize(("kind", "word"), FIXED.items())
def test_kinds_that_no_factor_scales_are_kept_left_out_or_refused(kind, word):
    kept, before = bake_one(kind, 1.0), tensors_of(kind)
    assert all(torch.equal(tensor, before.get(ending, tensor)) for ending, tensor in kept.items()) and len(kept) == len(before)
    for ratio in (0.5, -1.0):
        with pytest.raises(TriLoRAError, match=rf"1 layer of kind {word} with ratio {ratio:g} \(for example {NAME}0\): .* Extract Adapter"):
            bake_one(kind, ratio)
    baked, report = bake([Source(state_of(kind, "lora"), {f"{NAME}0": 0.0, f"{NAME}1": 1.0})], {f"{NAME}0": "a", f"{NAME}1": "b"})
    assert not any(key.startswith(f"{NAME}0") for key in baked) and report.left_out == 1


@pytest.mark.parametrize("residual", ["none", "lora", "trilora", "tensor_ring"])
@pytest.mark.parametrize(("transform", "options"), [("diagonal", {}), *(("tensor_ring", {"ring_rank": R}) for R in (1, 2, 3)),
                                                    ("tensor_ring", {"ring_rank": 2, "factors": (IN,)})], ids=str)  # fmt: skip
@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=str)
def test_a_share_of_a_ring_or_a_diagonal_is_one(kernel, transform, options, residual):
    """W0 ((1 - s) I + s T) + s R for every s, read back by the registry; a ring grows by one rank."""
    shape, weight = LayerShape(OUT, IN, kernel), draw(OUT, IN, *kernel, seed=3)
    config = RESIDUALS[residual](rank=2) if residual != "none" else RESIDUALS["none"]()
    module = torch.nn.Conv2d(IN, OUT, 3) if kernel else torch.nn.Linear(IN, OUT)
    adapter = Method(config, TRANSFORMS[transform](**options)).build(module, weight, torch.Generator().manual_seed(1))
    for parameter in adapter.parameters():
        parameter.data += 0.1 * draw(*parameter.shape)
    file = {f"{NAME}.{part}.{key}": t.detach() for part in ("transform", "residual") for key, t in getattr(adapter, part).tensors().items()}
    wanted = adapter.delta(weight).detach()
    for s in (0.5, -0.7, 1.6):
        baked, _ = bake([Source(AdapterState(file), {NAME: s})], {NAME: "key"})
        found = read_adapter_tensors(shape, *collect_tensors(baked, NAME)).delta(weight).detach()
        assert distance(found, s * wanted) <= 3e-6
    if transform == "tensor_ring":
        assert baked[f"{NAME}.transform.core0"].shape[2:] == (options["ring_rank"] + 1,) * 2


def test_a_share_of_an_orthogonal_transform_is_refused():
    adapter = Method(RESIDUALS["lora"](rank=2), TRANSFORMS["block_orthogonal"](3)).build(torch.nn.Linear(IN, OUT), draw(OUT, IN), torch.Generator())
    file = AdapterState({f"{NAME}.{part}.{key}": t.detach() for part in ("transform", "residual") for key, t in getattr(adapter, part).tensors().items()})
    with pytest.raises(TriLoRAError, match=r"1 layer of kind transform with ratio 0.5 .*: a share of what an orthogonal"):
        bake([Source(file, {NAME: 0.5})], {NAME: "key"})
    assert bake([Source(file, {NAME: 1.0})], {NAME: "key"})[0].keys() == file.keys()


def test_several_low_rank_adapters_become_one_in_any_order():
    """Concatenated factors, whatever their ranks and endings, 1x1 kernels beside none; equal directions are stored once."""
    sources = [Source(AdapterState({f"{NAME}0{e}": t for e, t in tensors_of(kind, seed).items()}), {f"{NAME}0": ratio})
               for kind, seed, ratio in (("lora", 1, 0.5), ("peft", 2, -1.2), ("lora without alpha", 3, 0.3), ("lora", 1, 0.25))]  # fmt: skip
    sources.append(Source(AdapterState({f"{NAME}0.lora_up.weight": draw(OUT, 2, 1, 1), f"{NAME}0.lora_down.weight": draw(2, IN, 1, 1)}), {f"{NAME}0": 0.8}))
    wanted = sum(s.ratios[f"{NAME}0"] * change({k.removeprefix(f"{NAME}0"): t.flatten(1) if t.ndim > 1 else t for k, t in s.state.items()}, None) for s in sources)
    shuffle = random.Random(3)
    for _ in range(6):
        shuffle.shuffle(sources)
        baked, report = bake(sources, {f"{NAME}0": "key"})
        found = {key.removeprefix(f"{NAME}0"): tensor for key, tensor in baked.items()}
        assert found[".lora_down.weight"].shape == (11, IN, 1, 1) and report.summed == 1  # 3 + 3 + 3 + 2: the file that is there twice adds none
        assert distance(change(found, None)[..., 0, 0], wanted) <= 5e-7


def test_full_differences_and_biases_are_added():
    first = AdapterState({"a.w_norm": draw(OUT, seed=1), "a.b_norm": draw(OUT, seed=2), "b.diff": draw(OUT, IN), "b.diff_b": draw(OUT).half()})
    second = AdapterState({"a.diff": draw(OUT, seed=3), "b.diff": draw(OUT, IN, seed=4), "b.diff_b": draw(OUT, seed=5), "c.diff_b": draw(IN)})
    names = {name: name for name in "abc"}
    baked, _ = bake([Source(first, {"a": 0.5, "b": 2.0}), Source(second, {"a": -1.0, "b": 0.25, "c": 3.0})], names)
    assert baked.keys() == {"a.diff", "a.diff_b", "b.diff", "b.diff_b", "c.diff_b"}
    torch.testing.assert_close(baked["a.diff"], 0.5 * draw(OUT, seed=1) - draw(OUT, seed=3))
    torch.testing.assert_close(baked["b.diff"], 2 * draw(OUT, IN) + 0.25 * draw(OUT, IN, seed=4))
    torch.testing.assert_close(baked["b.diff_b"], 2 * draw(OUT).half().float() + 0.25 * draw(OUT, seed=5))
    torch.testing.assert_close(baked["c.diff_b"], 3 * draw(IN))
    torch.testing.assert_close(baked["a.diff_b"], 0.5 * draw(OUT, seed=2))  # .b_norm is read beside .w_norm only
    alone, report = bake([Source(first, {"a": 0.5, "b": 0.0}), Source(AdapterState({"d.b_norm": draw(3)}), {"d": 1.0})], names | {"d": "d"})
    assert alone.keys() == {"a.w_norm", "a.b_norm"} and report.unread == ("d.b_norm",)


@pytest.mark.parametrize(("first", "second", "words"), [
    ("loha", "lora", "1 layer of several kinds in the adapters, LoHa and low rank"), ("loha", "loha", "1 layer of kind LoHa in several of the adapters"),
    ("glora", "glora", "GLoRA in several"), ("full", "lora", "of several kinds"), ("dora", "lora", "of several kinds"), ("tucker", "tucker", "Tucker LoCon in several"),
])  # fmt: skip
def test_kinds_that_cannot_be_one_layer_are_refused_unless_one_is_left_out(first, second, words):
    sources = [state_of(first), state_of(second, seed=5)]
    with pytest.raises(TriLoRAError, match=words):
        bake([Source(state, {f"{NAME}0": 1.0}) for state in sources], {f"{NAME}0": "key"})
    baked, _ = bake([Source(state, {f"{NAME}0": ratio}) for state, ratio in zip(sources, (0.0, 1.0), strict=True)], {f"{NAME}0": "key"})
    assert len(baked) >= 1


def test_all_problems_are_told_at_once_with_their_numbers():
    state = state_of("dora", "dora", "oft", "lora")
    ratios = {f"{NAME}{i}": ratio for i, ratio in enumerate((0.5, 0.5, 0.25, 0.5))}
    with pytest.raises(TriLoRAError) as raised:
        bake([Source(state, ratios)], {name: name for name in ratios})
    text = str(raised.value)
    assert "2 layers of kind DoRA with ratio 0.5" in text and "1 layer of kind OFT with ratio 0.25" in text and "low rank" not in text


def test_what_depends_on_the_weight_stands_alone_on_it():
    """A DoRA on q beside a LoRA on k is two layers of one weight; beside one on the whole of it, they would act on one another."""
    q, k, whole = ("qkv", (0, 0, 4)), ("qkv", (0, 4, 4)), "qkv"
    state, ratios = state_of("dora", "lora"), {f"{NAME}0": 1.0, f"{NAME}1": 0.5}
    assert len(bake([Source(state, ratios)], {f"{NAME}0": q, f"{NAME}1": k})[0]) == 7
    for places in ({f"{NAME}0": q, f"{NAME}1": whole}, {f"{NAME}0": whole, f"{NAME}1": k}, {f"{NAME}0": q, f"{NAME}1": ("qkv", (0, 3, 4))}):
        with pytest.raises(TriLoRAError, match="1 layer of kind DoRA beside others for a part of the same weight"):
            bake([Source(state, ratios)], places)
    plain = bake([Source(state_of("lora", "peft"), ratios)], {f"{NAME}0": q, f"{NAME}1": whole})[0]
    assert len(plain) == 6


def test_keep_rank_is_the_best_approximation_times_the_ratio():
    for kind in ("lora", "locon"):
        found, before = bake_one(kind, -0.5, keep=2), change(tensors_of(kind), None)
        U, sigma, Vt = torch.linalg.svd(before.flatten(1), full_matrices=False)
        assert found[".lora_down.weight"].shape[0] == 2
        assert distance(change(found, None).flatten(1), -0.5 * (U[:, :2] * sigma[:2]) @ Vt[:2]) <= 1e-6


@pytest.mark.parametrize("ratio", [1e-3, -0.5, 20.0])
def test_half_precision_keeps_weak_directions(tmp_path, ratio):
    """An fp16 file, baked, saved as fp16 and read again: every direction down to 1/1000 of the strongest, to fp16's rounding."""
    left, right = torch.linalg.qr(draw(40, 4))[0], torch.linalg.qr(draw(30, 4))[0]
    sigma = torch.tensor([3.0, 1.0, 0.05, 0.003])
    pairs = {f"{NAME}{i}.lora_up.weight": left * sigma * size for i, size in enumerate((1.0, 0.2))}
    state = AdapterState(pairs | {f"{NAME}{i}.lora_down.weight": right.t().contiguous() for i in (0, 1)})
    half = read_adapter(write_adapter(tmp_path / "a.safetensors", canonical_state(state), torch.float16))
    baked, _ = bake([Source(half, {f"{NAME}0": ratio, f"{NAME}1": ratio / 2})], {f"{NAME}{i}": str(i) for i in (0, 1)})
    again = read_adapter(write_adapter(tmp_path / "b.safetensors", canonical_state(baked), torch.float16))
    for name, share in ((f"{NAME}0", 1.0), (f"{NAME}1", 0.5)):
        before, after = (split_layers(s)[0][name].pair for s in (half, again))
        assert before.rank == after.rank == 4
        for i in range(4):
            assert distance(after.up[:, i].double() * after.scale, ratio * share * before.scale * before.up[:, i].double()) <= 1e-3
            assert distance(after.down[i], before.down[i]) <= 1e-3


def test_metadata_tell_what_was_baked_from_what(tmp_path):
    ours = canonical_state(state_of("lora", metadata={"trilora.trigger": "cat", "ss_base_model_version": "sd_v1"}))
    other = AdapterState(state_of("lora", "lora", seed=4), {"modelspec.trigger_phrase": "oil paint", "ss_base_model_version": "sd_v1"})
    names = {f"{NAME}{i}": f"key{i}" for i in (0, 1)}
    about = {"name": "a", "sha256": "12", "strength_model": 0.5, "block_weights": "default=1, IN04=0.5"}
    baked, _ = bake([Source(ours, {f"{NAME}0": 0.5}, about=about), Source(other, {f"{NAME}0": 1.0, f"{NAME}1": 0.0}, about={"name": "b"})], names)
    metadata = baked.metadata
    assert metadata["trilora.trigger"] == metadata["modelspec.trigger_phrase"] == "cat, oil paint" and metadata["ss_base_model_version"] == "sd_v1"
    assert json.loads(metadata["trilora.provenance"]) == [{"action": "bake", "block_weights": "default=1, IN04=0.5", "of": [about, {"name": "b"}]}]
    assert json.loads(metadata["trilora.plan"]) == {f"{NAME}0": 6} and "trilora.format" not in metadata and not any(key.startswith(f"{NAME}1") for key in baked)
    single, _ = bake([Source(ours, {f"{NAME}0": -0.3})], names)
    assert single.canonical and SVD_MARK.items() <= single.metadata.items()
    assert read_adapter(write_adapter(tmp_path / "x.safetensors", canonical_state(single), torch.float32)).canonical  # strictly read


def test_the_sources_are_left_as_they_were():
    state = state_of(*LINEAR)
    names = {f"{NAME}{i}": str(i) for i in range(len(LINEAR))}
    before = {key: tensor.clone() for key, tensor in state.items()}
    bake([Source(state, dict.fromkeys(names, -0.5))], names)
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before) and state.metadata == {}


def test_progress_is_told_after_every_layer_and_may_stop_it():
    state, ticks = state_of("lora", "lora", "full"), []
    sources = [Source(state, {f"{NAME}{i}": 0.5 for i in range(3)})]
    bake(sources, {f"{NAME}{i}": str(i) for i in range(3)}, lambda done, count: ticks.append((done, count)))
    assert ticks == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(KeyboardInterrupt):
        bake(sources, {f"{NAME}{i}": str(i) for i in range(3)}, lambda done, count: (_ for _ in ()).throw(KeyboardInterrupt))


def test_what_cannot_be_baked():
    names = {f"{NAME}0": "key"}
    with pytest.raises(TriLoRAError, match="every layer has ratio 0"):
        bake([Source(state_of("lora"), {f"{NAME}0": 0.0})], names)
    with pytest.raises(TriLoRAError, match="ratio=nan: a finite number"):
        bake([Source(state_of("lora"), {f"{NAME}0": float("nan")})], names)
    with pytest.raises(TriLoRAError, match="belongs to no layer that has a ratio"):
        bake([Source(AdapterState({"other.diff": draw(3)}), {f"{NAME}0": 1.0})], names)
    with pytest.raises(TriLoRAError, match="holds NaN"):
        bake([Source(AdapterState({f"{NAME}0.diff": torch.full((3,), torch.nan)}), {f"{NAME}0": 1.0})], names)
    broken = {e: t for e, t in tensors_of("loha without alpha").items() if e != ".hada_w1_a"} | {".dora_scale": draw(OUT, 1)}
    with pytest.raises(TriLoRAError, match="hada_w1_a is missing, the other half"):
        bake([Source(AdapterState({f"{NAME}0{e}": t for e, t in broken.items()}), {f"{NAME}0": 1.0})], names)
    stray = AdapterState(state_of("lora") | {f"{NAME}0.scalar": torch.ones(())})
    assert bake([Source(stray, {f"{NAME}0": 2.0})], names)[1].unread == (f"{NAME}0.scalar",)
