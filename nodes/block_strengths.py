"""Strengths by blocks: the text of a `block_weights` input against a model's blocks, and a file's patches by it.

A patch is applied with strength * ratio, ratio being what the text gives its place: 0.5 is half of the change that the file
makes there, whatever its kind, and -1 its opposite, since every patch of `Places.patches` is linear in its strength.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.message_words import some
from .comfy_stack import stack_patches
from .notices import notice
from .seen import Seen


def weigh(text: str, patches: Mapping, places, name: str) -> Mapping:
    """A file's patches with the strengths of their blocks in them, one for each weight; an empty text leaves them as they are.

    text: any dialect that `block_syntax.parse` reads; places: the `Places` that made the patches; name: the file's, for
    messages. Raises TriLoRAError where the text cannot be read for this model.
    """
    if not (text or "").strip():
        return patches
    # not one add_patches for each ratio: the host lists all weights of the model at each call
    weights = block_strengths(text, places.blocks, name)
    where = {target: places.blocks.place(target) for target in patches}
    _warn_of_what_is_not_there(name, weights, where.values(), places.blocks.kinds)
    return stack_patches((group, ratio) for ratio, group in by_strength(patches, weights, where))


def _warn_of_what_is_not_there(name: str, weights, places, kinds) -> None:
    """Kinds and patterns that no layer of the file has where the text speaks of them: its blocks are there, so it looks as if it worked."""
    missed = [selector.text for selector, _ in weights.rules
              if not selector.is_whole and any(map(selector.covers, places)) and not any(map(selector.matches, places))]
    if missed:
        fused = "; a layer that is several kinds at once is only of the kind fused" if "fused" in kinds else ""
        notice(f"block_weights for {name}: it has no layers of these kinds or patterns: {some(missed)}{fused}")


def block_strengths(text: str, blocks, name: str = ""):
    """The `BlockWeights` that a text means on these `Blocks`, with the user's presets.

    text: None is an input that is not linked, and empty; name: the file's that they are for, if there is one yet. Raises TriLoRAError that names the input.
    """
    # not at the pack's import: only a graph that has such a text needs them
    from ..trilora_ops.block_syntax import parse
    from .block_presets import user_presets

    read_presets_of(text)
    try:
        with user_presets() as presets:
            return parse(text or "", blocks, presets=presets)
    except TriLoRAError as error:
        problem = str(error).removeprefix("block weights: ").rstrip(".")
        raise TriLoRAError(f"block_weights{name and ' for '}{name}: {problem}; nothing was applied") from None


def by_strength(patches: Mapping, weights, places: Mapping) -> list[tuple[float, dict]]:
    """(ratio, the patches with it), by ratio; those with ratio 0 are left out.

    patches: by the host's target, a key or a tuple of key, slice and function, each weighed by its own place; weights:
    BlockWeights; places: the `Place` of every target.
    """
    groups: dict[float, dict] = {}
    for target, patch in patches.items():
        if ratio := weights.at(places[target]):
            groups.setdefault(ratio, {})[target] = patch
    return sorted(groups.items(), key=lambda group: group[0])


def presets_in(text: str | None) -> tuple[tuple[str, str], ...]:
    """(name, content) of the user's presets whose name stands in a text: a node runs again when one of them has changed."""
    if not (text or "").strip():
        return ()
    from .block_presets import user_presets

    with user_presets() as presets:
        lower = text.lower()
        return tuple(sorted((name, content) for name, content in presets.items() if name.lower() in lower))


_seen = Seen(presets_in)


def read_presets_of(text: str | None) -> None:
    """To be called before the presets of a text are looked up, for `preset_stamp`."""
    if presets_in(text):
        _seen.reads(text)


def preset_stamp(text: str | None):
    """Another value when a preset has changed that the text names, or, for None, which is a text over a link, any that was read."""
    return _seen.changes() if text is None else presets_in(text)
