"""A word tokenizer for the world's captions and a one-layer text encoder.

Words the world does not know share a bank of spare rows: each unknown word hashes to
one of them, the same one on every machine.  They play the part of CLIP's rare tokens,
so a trigger word has an embedding of its own without the vocabulary growing.
"""

import hashlib
import re

import torch
from torch import nn

from .scenes import CAPTION_WORDS

CONTEXT_LENGTH = 16
CONTEXT_DIM = 64
SPARE_ROWS = 33

PAD = 0
#: Spellings and near-synonyms read as a word of the world.
ALIASES = {
    "center": "centre",
    "middle": "centre",
    "gray": "grey",
    "upper": "top",
    "lower": "bottom",
    "violet": "purple",
    "stripes": "striped",
    "dots": "dotted",
    "checkered": "checked",
    "chequered": "checked",
}
WORDS = tuple(CAPTION_WORDS)
VOCABULARY_SIZE = 1 + len(WORDS) + SPARE_ROWS
_ROWS = {word: 1 + i for i, word in enumerate(WORDS)}


def word_id(word):
    """Row of a lower-case word: its own if the world knows it, else a spare row by SHA-256."""
    word = ALIASES.get(word, word)
    if word in _ROWS:
        return _ROWS[word]
    digest = hashlib.sha256(word.encode("utf-8")).digest()
    return 1 + len(WORDS) + int.from_bytes(digest[:8], "big") % SPARE_ROWS


def tokenize(prompts):
    """Prompts -> (B, 16) int64 ids; words are letters, digits, ``-`` and ``_``, lower-cased.

    Shorter prompts are filled with PAD = 0, longer ones cut, as CLIP does.  The empty
    prompt (all PAD) is the unconditional one.  Raises TypeError for a bare string,
    which would otherwise be read as a list of letters.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts = {prompts!r}: must be a list of strings; pass [prompt]")
    ids = torch.full((len(prompts), CONTEXT_LENGTH), PAD, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        words = re.findall(r"[\w-]+", prompt.lower())[:CONTEXT_LENGTH]
        row[: len(words)] = torch.tensor([word_id(w) for w in words], dtype=torch.long)
    return ids


class TextEncoder(nn.Module):
    """Token + position embedding and one pre-norm transformer layer.

    PAD is attended to like any token, as in SD's CLIP, so that the empty prompt gives
    an ordinary context.
    """

    def __init__(self, dim=CONTEXT_DIM, length=CONTEXT_LENGTH, heads=4):
        super().__init__()
        self.heads = heads
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, dim)
        self.position_embedding = nn.Embedding(length, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)
        self.final_norm = nn.LayerNorm(dim)

    def forward(self, ids):
        """ids (B, T <= 16) int64 -> context (B, T, dim), each token of about unit variance."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.token_embedding(ids) + self.position_embedding(positions)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        h = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(h.transpose(1, 2).flatten(2))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.final_norm(x)
