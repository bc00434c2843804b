"""What the TriLoRA Loader makes of a file that another library wrote: exact, refused with a sentence, or wrong.

The measure is the writer's own merge: the change of every weight and bias, relative to its size. Import it only where
the host is already imported.
"""

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.utils
import torch
from comfyui_trilora.tests.host.tiny_run import distance, list_saved_adapters, run_node
from torch import Tensor

EXACT, PARTLY, REFUSED, WRONG, UNWRITTEN = "exact", "exact, rest named", "refused", "WRONG", "not written"
TOLERANCE = 1e-5
LOADERS = ("TriLoRALoader", "TriLoRAApplyStack", SAVED_AGAIN := "saved again")
# a refusal that tells a person nothing about the file
_WRONG_REASON = "another model family"


class NotWritten(Exception):
    """The library itself does not make such a file, or does not merge it into weights; the text says why."""


@dataclass(frozen=True)
class Row:
    """One kind of file.

    writer: library; kind, options: what it calls them; write: a folder -> (the file, the model or the model and the CLIP it
    is for, host's key of a weight or bias -> what the library merges into it), or raises NotWritten.
    """

    writer: str
    kind: str
    options: str
    write: Callable[[Path], tuple]

    @property
    def name(self) -> str:
        """All of it in one line."""
        return f"{self.writer}: {self.kind}" + (f", {self.options}" if self.options else "")


@dataclass(frozen=True)
class Outcome:
    """verdict: EXACT, PARTLY (what was left out is named on the node), REFUSED, WRONG or UNWRITTEN.

    text: the sentence or what is wrong; error: the largest of the weights compared; notices: what the node says.
    """

    verdict: str
    text: str = ""
    error: float = 0.0
    notices: tuple[str, ...] = ()


def outcome(nodes, pack_module, row: Row, loader: str = "TriLoRALoader") -> Outcome:
    """Write a row's file into one of the host's LoRA folders, load it, compare, and remove it again.

    loader: one of LOADERS; SAVED_AGAIN is our loader with the file that our Save Adapter makes of it.
    """
    folder = list_saved_adapters() / "compatibility"
    folder.mkdir(exist_ok=True)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with torch.inference_mode(False):
                path, models, expected = row.write(folder)
        model, clip = models if isinstance(models, tuple) else (models, None)
        return _loaded(nodes, pack_module, path, model, clip, expected, loader)
    except NotWritten as why:
        return Outcome(UNWRITTEN, str(why))
    finally:
        shutil.rmtree(folder)


def _loaded(nodes, pack_module, path: Path, model, clip, expected: dict[str, Tensor], loader: str) -> Outcome:
    error = pack_module("trilora_ops.errors").TriLoRAError
    name = str(path.relative_to(list_saved_adapters()))
    with _warnings() as said:
        try:
            patched, patched_clip = _apply(nodes, model, clip, name, loader)
        except error as sentence:
            return Outcome(WRONG if _WRONG_REASON in str(sentence) else REFUSED, str(sentence))
    try:
        found = _deltas(patched) | (_deltas(patched_clip.patcher) if clip is not None else {})
    except Exception as problem:  # a layer that was accepted and cannot be computed is an outcome too
        return Outcome(WRONG, f"{type(problem).__name__}: {problem}", notices=tuple(said))
    return compared(found, expected, tuple(said))


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the pack logs as warnings inside the block, which its nodes show too."""
    said: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, handler = logging.getLogger("trilora"), Collect(logging.WARNING)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _apply(nodes, model, clip, name: str, loader: str):
    given = {"model": model} | ({} if clip is None else {"clip": clip})
    if loader == SAVED_AGAIN:
        adapter = run_node(nodes, "TriLoRALoadAdapter", lora_name=name)[0]
        again = run_node(nodes, "TriLoRASaveAdapter", adapter=adapter, name="compatibility/again", dtype="fp32", **given)[0]
        return run_node(nodes, "TriLoRALoader", lora_name=again, strength_model=1.0, **given)
    if loader == "TriLoRAApplyStack":
        (stack,) = run_node(nodes, "TriLoRAAdapterStack", lora_name=name)
        return run_node(nodes, loader, stack=stack, **given)
    return run_node(nodes, loader, lora_name=name, strength_model=1.0, **given)


@torch.inference_mode()
def _deltas(patcher) -> dict[str, Tensor]:
    """The host's key -> what the patches add to the weight, in fp32; a weight on `meta` counts as zeros."""
    found = {}
    for key, patches in patcher.patches.items():
        weight = comfy.utils.get_attr(patcher.model, key).detach()
        weight = torch.zeros(weight.shape) if weight.is_meta else weight.float()
        found[key] = comfy.lora.calculate_weight(patches, weight.clone(), key) - weight
    return found


def compared(found: dict[str, Tensor], expected: dict[str, Tensor], notices: tuple[str, ...] = ()) -> Outcome:
    """The verdict on changes of weights and biases, both by the host's key."""
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    named = any("left out" in notice for notice in notices)
    if surplus or not found or (missing and not named):
        return Outcome(WRONG, f"missing {missing[:3]}, too much {surplus[:3]}", 1.0, notices)
    errors = {key: distance(found[key], expected[key]) for key in found}
    worst = max(errors, key=lambda key: (math.isnan(errors[key]), errors[key]))
    if not errors[worst] <= TOLERANCE:
        return Outcome(WRONG, f"{errors[worst]:.3g} of the change of {worst}", errors[worst], notices)
    return Outcome(PARTLY if missing else EXACT, "", errors[worst], notices)
