"""Captions are trained as written: brackets are no emphasis in any text encoder, and no embedding is dropped unsaid."""

import functools
import importlib
import io
import logging
import random
from types import SimpleNamespace

import comfy.sd1_clip
import pytest
import torch
from comfyui_trilora.tests.host.tiny_run import load_checkpoint
from safetensors.torch import save_file

TE = "text_encoders."
TOKENIZERS = {
    "SD1.5": ("sd1_clip", "SD1Tokenizer"),
    "SDXL": ("sdxl_clip", "SDXLTokenizer"),
    "SD2": (TE + "sd2_clip", "SD2Tokenizer"),
    "SD3": (TE + "sd3_clip", "SD3Tokenizer"),
    "Flux": (TE + "flux", "FluxTokenizer"),
    "Flux.2 Klein": (TE + "flux", "KleinTokenizer"),
    "PixArt": (TE + "pixart_t5", "PixArtTokenizer"),
    "AuraFlow": (TE + "aura_t5", "AuraT5Tokenizer"),
    "HunyuanDiT": (TE + "hydit", "HyditTokenizer"),
    "HunyuanVideo": (TE + "hunyuan_video", "HunyuanVideoTokenizer"),
    "HiDream": (TE + "hidream", "HiDreamTokenizer"),
    "Wan": (TE + "wan", "WanT5Tokenizer"),
    "Lumina-Image 2": (TE + "lumina2", "LuminaTokenizer"),
    "Gemma 3": (TE + "lumina2", "NTokenizer"),
    "NewBie": (TE + "newbie", "NewBieTokenizer"),
    "OmniGen2": (TE + "omnigen2", "Omnigen2Tokenizer"),
    "Qwen-Image": (TE + "qwen_image", "QwenImageTokenizer"),
    "LongCat-Image": (TE + "longcat_image", "LongCatImageTokenizer"),
    "Z-Image": (TE + "z_image", "ZImageTokenizer"),
    "Anima": (TE + "anima", "AnimaTokenizer"),
    "PixelDiT": (TE + "pixeldit", "PixelDiTGemma2Tokenizer"),
}
BRACKETS = ["saber (fate), solo", "(masterpiece:1.3), ((a cat))", "a (cat", "a) cat (", "(:1.5)", "()", "no brackets, 1girl"]


@functools.cache
def sentencepiece_model() -> torch.Tensor:
    """A small model of the kind that T5, Gemma and their like find in their files."""
    sentencepiece = pytest.importorskip("sentencepiece")
    stream = io.BytesIO()
    lines = ["saber (fate), solo, masterpiece 1.3", "a cat sitting \\ on a chair", "1girl [x] {y}: embedding; <z>"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=stream, vocab_size=100, hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


def text_encoder(family: str, **options) -> SimpleNamespace:
    """What is asked of a CLIP to get tokens, with the host's own tokenizer of a model family."""
    module, name = TOKENIZERS[family]
    model = sentencepiece_model()
    data = dict.fromkeys(("spiece_model", "mt5xl.spiece_model", "gemma_spiece_model", "jina_spiece_model"), model)
    try:
        kind = getattr(importlib.import_module(f"comfy.{module}"), name)
    except (ModuleNotFoundError, AttributeError):
        pytest.skip(f"this host has no text encoder of {family}")
    try:
        tokenizer = kind(tokenizer_data=data, **options)
    except FileNotFoundError as error:
        pytest.skip(f"this host lies here without {error.filename}")
    return SimpleNamespace(tokenizer=tokenizer, tokenize=tokenizer.tokenize_with_weights)


@pytest.fixture
def prompts(pack_module):
    return pack_module("nodes.prompts")


@pytest.mark.parametrize("family", TOKENIZERS)
def test_brackets_are_letters_in_every_text_encoder(prompts, monkeypatch, family):
    """The tokens are those of a host in which brackets and backslashes have no meaning at all."""
    clip = text_encoder(family)
    found = {text: repr(clip.tokenize(prompts.literal(clip, text))) for text in BRACKETS}
    escaped = repr(clip.tokenize(prompts.literal(clip, r"saber \(fate\), solo")))
    monkeypatch.setattr(comfy.sd1_clip, "token_weights", lambda text, weight: [(text, weight)])
    monkeypatch.setattr(comfy.sd1_clip, "escape_important", lambda text: text)
    monkeypatch.setattr(comfy.sd1_clip, "unescape_important", lambda text: text)
    for text, tokens in found.items():
        assert tokens == repr(clip.tokenize(text)), text
    plain = [repr(clip.tokenize(text)) for text in ("saber (fate), solo", r"saber \(fate\), solo")]
    assert escaped == plain[1 if family == "LongCat-Image" else 0], "a bracket escaped as in prompts is a bracket"


def test_any_text_is_its_letters(prompts, monkeypatch):
    """500 texts of brackets, backslashes, weights and embeddings that lead nowhere, none of which the host may read."""
    clip, draw = text_encoder("SD1.5"), random.Random(0)
    pieces = ["(", ")", "((", "))", "\\", ":1.3", " ", "a cat", "embedding", "<x>", "[y]", "{z|w}", ",", "BREAK"]
    texts = ["".join(draw.choices(pieces, k=draw.randrange(1, 15))) for _ in range(500)]
    found = [repr(clip.tokenize(prompts.literal(clip, text))) for text in texts]
    monkeypatch.setattr(comfy.sd1_clip, "token_weights", lambda text, weight: [(text, weight)])
    for text, tokens in zip(texts, found, strict=True):
        assert tokens == repr(clip.tokenize(text)), text


def test_conditioning_of_brackets(host_nodes, models_dir, prompts):
    """A caption is encoded as the prompt with escaped brackets is, which is another thing than the prompt with emphasis."""
    _, clip, _ = load_checkpoint(host_nodes)
    with torch.inference_mode():
        found = prompts.encode_prompt(clip, "saber (fate), solo")[0][0]
        expected = clip.encode_from_tokens_scheduled(clip.tokenize(r"saber \(fate\), solo"))[0][0]
        emphasis = clip.encode_from_tokens_scheduled(clip.tokenize("saber (fate), solo"))[0][0]
    assert torch.equal(found, expected) and not torch.allclose(found, emphasis, atol=1e-2)


def test_thousands_of_brackets_are_no_matter(prompts):
    clip = text_encoder("SD1.5")
    assert len(clip.tokenize(prompts.literal(clip, "(" * 3000 + ")" * 3000))["l"]) > 1


@pytest.fixture
def embeddings(tmp_path):
    """A folder with embeddings for SD1.5, for SDXL, and for a text encoder of no known size."""
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "small.safetensors")
    save_file({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, tmp_path / "both.safetensors")
    save_file({"emb_params": torch.ones(2, 99)}, tmp_path / "foreign.safetensors")
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "odd(v2).safetensors")
    return str(tmp_path)


@pytest.mark.parametrize(
    "caption",
    ["embedding:small", "a cat, embedding:small, on grass", "a (red) cat embedding:small.safetensors", "embedding:odd(v2) cat", "no such word", "embeddings: two"],
)
def test_an_embedding_that_is_there_is_used(prompts, embeddings, caplog, caption):
    clip = text_encoder("SD1.5", embedding_directory=[embeddings])
    with caplog.at_level(logging.WARNING):
        prompts.check_embeddings(clip, [("01.png", caption)])
    vectors = [token for batch in clip.tokenize(prompts.literal(clip, caption))["l"] for token, _ in batch if torch.is_tensor(token)]
    assert len(vectors) == (2 if "embedding:" in caption else 0) and not caplog.records


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("embedding:missing girl", "01.png: embedding:missing)"),
        ("a cat, embedding:foreign", "01.png: embedding:foreign)"),
        ("a cat (embedding:small:1.2)", "01.png: (embedding:small:1.2))"),
        ("a cat,embedding:small", "01.png: ,embedding:small)"),
        ("on word embedding: a diagram", "01.png: embedding:)"),
        ("a diagram of an embedding:", "01.png: embedding:)"),
        ("embedding:../../secret", "01.png: embedding:../../secret)"),
    ],
)
def test_an_embedding_that_would_be_dropped_is_refused_by_name(prompts, embeddings, error, caption, words):
    clip = text_encoder("SD1.5", embedding_directory=[embeddings])
    with pytest.raises(error) as refused:
        prompts.check_embeddings(clip, [("00.png", "a dog, embedding:small"), ("01.png", caption)])
    assert "captions name 1 embeddings that cannot be used" in str(refused.value) and words in str(refused.value)


def test_every_caption_with_a_missing_embedding_is_counted(prompts, embeddings, error):
    clip = text_encoder("SD1.5", embedding_directory=[embeddings])
    with pytest.raises(error, match=r"^captions name 7 embeddings that cannot be used \(0.png: embedding:x+\.\.\.x+, .* and 2 more\)") as refused:
        prompts.check_embeddings(clip, [(f"{i}.png", f"a cat embedding:{'x' * 2000}") for i in range(7)])
    assert len(str(refused.value)) < 900


@pytest.mark.parametrize(("name", "said"), [("both", ""), ("small", "embedding:small (not in g)")])
def test_an_embedding_for_a_part_of_the_text_encoder_is_said(prompts, embeddings, caplog, name, said):
    clip = text_encoder("SDXL", embedding_directory=[embeddings])
    with caplog.at_level(logging.WARNING, "trilora"):
        prompts.check_embeddings(clip, [("01.png", f"a cat, embedding:{name}")])
    texts = [record.message for record in caplog.records if record.name == "trilora"]
    assert len(texts) == bool(said) and all(said in text for text in texts)


@pytest.mark.parametrize(("family", "cut"), [("SD1.5", ""), ("Flux", ""), ("HiDream", "t5xxl"), ("LongCat-Image", "qwen25_7b"), ("PixelDiT", "gemma2_2b")])
def test_a_caption_that_a_text_encoder_cuts_off_is_said(prompts, caplog, family, cut):
    clip = text_encoder(family)
    with caplog.at_level(logging.WARNING, "trilora"):
        prompts.check_lengths(clip, [("01.png", "a cat, " * 20), ("02.png", "a red cat sits on a mat, " * 200), ("03.png", "a cat")])
    texts = [record.message for record in caplog.records if record.name == "trilora"]
    assert bool(texts) == bool(cut)  # HiDream's llama may lack its vocabulary here, and then reads nothing
    assert all(text.startswith("the text encoder does not read") and f"02.png ({cut}" in text for text in texts)
