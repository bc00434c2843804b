"""Captions through the text encoder as they are written: brackets are emphasis in a prompt and none in a caption."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from ..training.folder import shown
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.message_words import few
from .notices import notice

_BRACKET = re.compile(r"\\?([()])")
_SHORT = 100  # letters; every text encoder reads more
_EMBEDDING = re.compile(r"(\S?)embedding:(\S*)")


def encode_prompt(clip, prompt: str) -> list:
    """The host's CONDITIONING of a text, in which brackets are brackets and every weight is 1."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(literal(clip, prompt)))


def literal(clip, prompt: str) -> str:
    r"""The text for `clip.tokenize` whose tokens are those of `prompt` without emphasis.

    The host's tokenizers take `\(` for a bracket, those that read emphasis and those that do not; the few that are not
    built on them would take the backslash for a letter. A bracket alone is no emphasis anywhere: it tells them apart.
    """
    if "(" not in prompt and ")" not in prompt:
        return prompt
    escapes = repr(clip.tokenize("(")) == repr(clip.tokenize(r"\("))
    return _BRACKET.sub(r"\\\1", prompt) if escapes else prompt


def check_embeddings(clip, prompts: Iterable[tuple[str, str]]) -> None:
    """Raise TriLoRAError for captions with `embedding:name` that the text encoder would drop or read as letters.

    prompts: (name of an image, its text). An embedding that a part of the text encoder cannot use is told as a notice.
    """
    parts: dict[str, tuple[list[str], list[str]]] = {}  # parts of the text encoder that use it, and that do not
    lost, partly = [], set()
    for name, prompt in prompts:
        for before, embedding in _EMBEDDING.findall(prompt):
            if embedding not in parts:
                parts[embedding] = _parts(clip, embedding) if embedding else ([], [])
            used, unused = parts[embedding]
            if before or not used:
                lost.append(f"{name}: {before}embedding:{shown(embedding.rstrip(','))}")
            elif unused:
                partly.add(f"embedding:{shown(embedding.rstrip(','))} (not in {', '.join(unused)})")
    if lost:
        raise TriLoRAError(
            f"captions name {len(lost)} embeddings that cannot be used ({few(lost)}); each needs a space before it and a "
            "file made for this text encoder in ComfyUI/models/embeddings, or write the captions without 'embedding:'"
        )
    if partly:
        notice(f"embeddings in captions act on a part of the text encoder only: {few(sorted(partly))}")


def check_lengths(clip, prompts: Iterable[tuple[str, str]]) -> None:
    """Give a notice of captions whose end a part of the text encoder cuts off: a word more would change none of its tokens.

    prompts: (name of an image, its text).
    """
    cut = []
    for name, prompt in prompts:
        if len(prompt) < _SHORT:
            continue
        tokens, longer = (clip.tokenize(literal(clip, text)) for text in (prompt, f"{prompt} cat"))
        deaf = [part for part in tokens if _is_text(tokens[part]) and repr(tokens[part]) == repr(longer[part])]
        if deaf:
            cut.append(f"{name} ({', '.join(deaf)})")
    if cut:
        notice(f"the text encoder does not read {len(cut)} captions to their end: {few(cut)}")


def _is_text(tokens: Any) -> bool:
    """Whether a part of what a tokenizer gives is tokens, (value, weight) each; some hold settings beside them."""
    return isinstance(tokens, list) and bool(tokens) and isinstance(tokens[0], list) and len(tokens[0]) > 2


def _parts(clip, embedding: str) -> tuple[list[str], list[str]]:
    """(parts of the text encoder that take an embedding, parts that do not: no file, or vectors of another size)."""
    used, unused = [], []
    for part, tokens in clip.tokenize(literal(clip, f"embedding:{embedding}")).items():
        size = _size(clip, part)
        fits = any(size in (None, vector.shape[-1]) for vector in _vectors(tokens))
        (used if fits else unused).append(part)
    return used, unused


def _size(clip, part: str) -> int | None:
    """Length of the vectors that one part of the text encoder takes, where its tokenizer tells."""
    tokenizer = getattr(clip.tokenizer, part, None) or getattr(clip.tokenizer, f"clip_{part}", None)
    return getattr(tokenizer, "embedding_size", None)


def _vectors(tokens: Any) -> Iterator[Tensor]:
    if isinstance(tokens, Tensor):
        yield tokens
    elif isinstance(tokens, (list, tuple)):
        for token in tokens:
            yield from _vectors(token)
