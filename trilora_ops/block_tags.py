"""Block weights as they stand in a prompt: webui's `<lora:NAME:1:lbw=MIDD:x=0.5>`, and Inspire's `<lora:NAME:1:1:LBW=A,B,...;A=0.5;B=0.2;>`.

Of a whole tag only the block weights are read; its file and its strengths belong to the node that loads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .block_selectors import quoted
from .block_syntax import BlockWeights, number
from .block_vectors import Tokens
from .blocks import Blocks
from .errors import TriLoRAError

_TAG = re.compile(r"<lora:[^:<>]*(?::[^:<>]*)*?:((?:LBW|lbw|w)=[^<>]*)>")
_TIMES = ("start", "stop", "step")


def inner(text: str) -> str:
    """What a whole tag of a prompt says about blocks, or the text as it is."""
    tag = _TAG.fullmatch(text)
    return re.sub("^w=", "lbw=", tag[1]) if tag else text


def is_tag(text: str) -> bool:
    return text.startswith(("LBW=", "lbw=", "<"))


def webui(text: str, blocks: Blocks, tokens: Tokens) -> BlockWeights | None:
    """`lbw=list or preset`, and after colons x=, which X stands for."""
    text = inner(text)
    if not text.startswith("lbw="):
        return None
    weights, *options = re.split(r":\s*(?=[A-Za-z]+\s*=)", text[4:])
    given = _options(options, ("x",), text, "write lbw= and x=, each once, with ':' between them")
    return _read(weights, blocks, "webui", Tokens(given.get("x", tokens.a), tokens.b, tokens.seed, tokens.presets))


def inspire(text: str, blocks: Blocks, tokens: Tokens) -> BlockWeights | None:
    """`LBW=list or preset;A=0.5;B=0.2;`, for Impact-Pack's wildcards too."""
    text = inner(text)
    if not text.startswith("LBW="):
        return None
    weights, *options = text[4:].split(";")
    given = _options(options, ("a", "b"), text, "write LBW=, A= and B=, each once, with ';' between them")
    return _read(weights, blocks, "inspire", Tokens(given.get("a", tokens.a), given.get("b", tokens.b), tokens.seed, tokens.presets))


def _options(parts: list[str], known: tuple[str, ...], text: str, rule: str) -> Mapping[str, float]:
    given: dict[str, float] = {}
    for part in filter(None, map(str.strip, parts)):
        name, _, value = (word.strip() for word in part.partition("="))
        if name.lower() in _TIMES:
            raise TriLoRAError(f"block weights: {quoted(part)} in {quoted(text)} changes strengths during sampling, which block weights do not; the node "
                               "Adapter Hook does, with a schedule such as start=0.2 stop=0.6")
        if name.lower() not in known or name.lower() in given:
            raise TriLoRAError(f"block weights: {quoted(part)} in {quoted(text)}: {rule}")
        given[name.lower()] = number(value, part)
    return given


def _read(text: str, blocks: Blocks, dialect: str, tokens: Tokens) -> BlockWeights:
    from .block_dialects import read  # whose readers these are

    if not text.strip():
        raise TriLoRAError("block weights: a list or the name of a preset must follow LBW=")
    return read(text, blocks, dialect, a=tokens.a, b=tokens.b, seed=tokens.seed, presets=tokens.presets)
