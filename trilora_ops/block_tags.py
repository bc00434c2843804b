"""Block weights as they stand in a prompt: webui's `<lora:NAME:1:lbw=MIDD:x=0.5>`, and Inspire's `<lora:NAME:1:1:LBW=A,B,...;A=0.5;B=0.2;>`.

Of a whole tag only the block weights are read; its file and its strengths belong to the node that loads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .block_selectors import quoted
from .block_syntax import BlockWeights, number
from .block_vectors import Tokens, parts_of
from .blocks import Blocks
from .errors import TriLoRAError

_TIMES = ("start", "stop", "step")


def inner(text: str) -> str:
    """What a whole tag of a prompt says about blocks, or the text as it is."""
    if not text.startswith("<lora:") or not text.endswith(">") or re.search("[<>]", text[1:-1]):
        return text
    tag = re.search(":(?=(?:LBW|lbw|w)=)", text[len("<lora:"):-1])
    return re.sub("^w=", "lbw=", text[len("<lora:") + tag.end() : -1]) if tag else text


def is_tag(text: str) -> bool:
    return text.startswith(("LBW=", "lbw=", "<"))


def webui(text: str, blocks: Blocks, tokens: Tokens) -> BlockWeights | None:
    """`lbw=list or preset`, and after colons x=, which X stands for."""
    text = inner(text)
    if not text.startswith("lbw="):
        return None
    weights, *options = re.split(r":\s*(?=[A-Za-z]+\s*=)", text[4:])
    given = _options(options, ("x",), text, "write lbw= and x=, each once, with ':' between them", blocks)
    return _read(weights, blocks, "webui", Tokens(given.get("x", tokens.a), tokens.b, tokens.seed, tokens.presets))


def inspire(text: str, blocks: Blocks, tokens: Tokens) -> BlockWeights | None:
    """`LBW=list or preset;A=0.5;B=0.2;`, for Impact-Pack's wildcards too."""
    text = inner(text)
    if not text.startswith("LBW="):
        return None
    weights, *options = text[4:].split(";")
    given = _options(options, ("a", "b"), text, "write LBW=, A= and B=, each once, with ';' between them", blocks)
    return _read(weights, blocks, "inspire", Tokens(given.get("a", tokens.a), given.get("b", tokens.b), tokens.seed, tokens.presets))


def is_elemental(text: str) -> bool:
    """Whether a text is one of webui's elemental presets, `blocks:words of keys:number`, several with commas between, with or without a name."""
    return all(re.fullmatch(r"(?:[^:=<]*:)?[^:=<]*:[^:=<]*:[^:=<]*", rule) for rule in text.split(","))


def elemental_rule(blocks: Blocks | None = None) -> str:
    """Why they are not read, and what to write for a model, None = SD1.x."""
    example = "IN05-OUT05.attn=1" if blocks is None else parts_of(next(iter(blocks.groups)), blocks)
    return (f"one of webui's elemental presets (blocks:words of keys:number), which are not read: words of a file's keys are no layers of a model; write it with "
            f"the words of Block Weights, such as {example}")


def _options(parts: list[str], known: tuple[str, ...], text: str, rule: str, blocks: Blocks) -> Mapping[str, float]:
    given: dict[str, float] = {}
    for part in filter(None, map(str.strip, parts)):
        name, _, value = (word.strip() for word in part.partition("="))
        if name.lower() in _TIMES:
            raise TriLoRAError(f"block weights: {quoted(part)} in {quoted(text)} changes strengths during sampling, which block weights do not; the node "
                               "Adapter Hook does, with a schedule such as start=0.2 stop=0.6")
        if name.lower() == "lbwe":
            raise TriLoRAError(f"block weights: {quoted(part)} in {quoted(text)} is {elemental_rule(blocks)}")
        if name.lower() not in known or name.lower() in given:
            raise TriLoRAError(f"block weights: {quoted(part)} in {quoted(text)}: {rule}")
        given[name.lower()] = number(value, part)
    return given


def _read(text: str, blocks: Blocks, dialect: str, tokens: Tokens) -> BlockWeights:
    from .block_dialects import read  # whose readers these are

    if not text.strip():
        raise TriLoRAError("block weights: a list or the name of a preset must follow LBW=")
    if is_tag(text):
        raise TriLoRAError(f"block weights: {quoted(text)} stands in another tag; write one of them")
    return read(text, blocks, dialect, a=tokens.a, b=tokens.b, seed=tokens.seed, presets=tokens.presets)
