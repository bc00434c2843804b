"""Random patterns of the subset, and how long they take on the names of whole models.

    python -m tests.fuzz.patterns [how many]
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Iterator

from comfyui_trilora.trilora_ops.errors import TriLoRAError
from comfyui_trilora.trilora_ops.patterns import Pattern

from .model_names import flux, sdxl

SIGNS = ["a", "b", "c", ".", "_", r"\.", "1", "-", r"\d", r"\w", r"\s", r"\W", r"\D", "[ab]", "[^a]", "[a-c1]", "[]a]", r"[^\d_]", r"[\w.]"]
MARKS = ["^", "$", r"\b", r"\A", r"\Z", "\n", "{", "}", "{,"]
REPEATS = ["*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}", "{0}", "*?", "+?", "??", "{1,3}?", "{,}"]
# each needs more than a second of `re` on a name of a hundred letters
CATASTROPHIC = [r"(\w+\.?)+!", r".*a.*a.*a.*a.*b!", "(a+)+!", "(.*)*!", r"(\w|\w\w|[a-z_.0-9])+!", r"([\w.]+[\w.]+)+!", r"(.*\.){8}(.*_){8}!", "(?:.*[aeiou].*){20}!",
                r"(?:\b.?){99}!", ".*e.{0,400}!", "(?:.?.){99}!", "(?:(?:(?:a{0,5}.?){0,5}){0,5}_)*!", r"(?:[a-z]+_?)*(?:[a-z]+\.?)*!", "(?:a?){99}a{99}!"]


def generated(chance: random.Random, depth: int = 0) -> str:
    """A pattern by the grammar of `re`, nearly always of the subset."""
    kind = chance.random()
    if depth > 3 or kind < 0.4:
        return chance.choice(SIGNS * 2 + MARKS)
    if kind < 0.6:
        return generated(chance, depth + 1) + generated(chance, depth + 1)
    if kind < 0.75:
        return f"{chance.choice(['(', '(?:'])}{generated(chance, depth + 1)})"
    if kind < 0.85:
        return f"{generated(chance, depth + 1)}|{chance.choice(['', generated(chance, depth + 1)])}"
    return generated(chance, depth + 1) + chance.choice(REPEATS)


def hostile(chance: random.Random) -> str:
    """A pattern that matches nearly nowhere, with repetitions within repetitions."""
    inside = chance.choice([generated(chance, 1), *CATASTROPHIC])
    for _ in range(chance.randint(0, 3)):
        inside = chance.choice(["({})+", "(?:{})*", "(?:{}){{0,9}}", "({}|.*)", ".*{}.*", "{}{}", r"(?:{}\w*)+", "({}){{20}}", "{}.{{0,200}}"]).replace("{}", inside)
        inside = inside.replace("{{", "{").replace("}}", "}")
    return inside + chance.choice(["", "!", "b!", "$"])


def work(patterns: Iterator[str]) -> Iterator[tuple[str, str, int, float]]:
    """(pattern, model, steps, seconds) of reading each pattern and searching it in every name of a model."""
    models = {"SDXL": sdxl(), "Flux.1": flux()}
    for text in patterns:
        for model, names in models.items():
            begin = time.process_time()
            try:
                pattern = Pattern(text)
            except TriLoRAError:
                yield text, model, 0, time.process_time() - begin
                continue
            for name in names:
                pattern.search(name)
            yield text, model, pattern.steps, time.process_time() - begin


def main(count: int) -> None:
    gc.freeze()  # of what was imported; looking through it takes longer than any pattern
    chance = random.Random(count)
    patterns = (CATASTROPHIC[n] if n < len(CATASTROPHIC) else hostile(chance) for n in range(count))
    slowest: list[tuple[float, int, str, str]] = []
    refused = done = 0
    for text, model, steps, seconds in work(patterns):
        done, refused = done + 1, refused + (not steps)
        slowest = sorted([*slowest, (seconds, steps, model, text)], reverse=True)[:5]
    lines = [f"  {seconds * 1000:6.1f} ms, {steps} steps on {model}: {text!r:.120}" for seconds, steps, model, text in slowest]
    sys.stdout.write("\n".join([f"{done} searches of {count} patterns, {refused} refused; the slowest:", *lines, ""]))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
