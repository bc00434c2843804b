"""An adapter as the host's hooks: on some conditionings only, and every block over its own course of sampling.

The host asks a weight hook three things: for its patches, when sampling (or Set CLIP Hooks) begins and the model is known;
for its strength, whenever it patches; and, through the hook's keyframe group, at every step whether that has changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import comfy.hooks
import comfy.lora
import comfy.utils
from comfy.patcher_extension import CallbacksMP

from ..trilora_ops.block_schedule import Curve, Schedule, steps
from ..trilora_ops.block_syntax import BlockWeights, items, read_native, written
from ..trilora_ops.blocks import LAYOUTS, Blocks
from ..trilora_ops.checkpoint import AdapterState
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.key_names import names_in
from ..trilora_ops.naming import split_target
from . import compat
from .block_strengths import block_strengths
from .comfy_patches import Places
from .comfy_stack import new_shape
from .names import names_of_today
from .notices import collected

# one timestep of training: schedulers round theirs down, and step 1 of 6 shall be at 1/6
_TIMESTEP = 1e-3
_ALWAYS = ((0.0, 1.0),)


class ScheduledKeyframes(comfy.hooks.HookKeyframeGroup):
    """The steps of a curve times the host's keyframes, for the hook of this `hook_ref` and its clones.

    steps: ((start, strength), ...), start being the host's percent; host: the group that Set Hook Keyframes gives, or an
    empty one. While a text encoder runs there is no time: the strength is then the host's alone, except where Set CLIP
    Hooks has `schedule_clip` on and takes the keyframes one by one.
    """

    def __init__(self, steps: Sequence[tuple[float, float]], host: comfy.hooks.HookKeyframeGroup, hook_ref):
        super().__init__()
        self.steps, self.host, self.hook_ref = tuple(steps), host, hook_ref
        self._model = self._sigmas = None  # what is sampled (a weak reference), and where in it the steps begin
        self._own = 1.0
        self._known: float | None = None  # the strength that the host was told of

    @property
    def strength(self) -> float:
        return self._own * self.host.strength if self._current_keyframe is None else self._current_keyframe.strength

    def for_text_encoder(self) -> None:
        """Give the product as plain keyframes, which is what `schedule_clip` reads. Without them it encodes once."""
        host, starts = self.host.keyframes, {start for start, _ in self.steps} | {frame.start_percent for frame in self.host.keyframes}
        self.keyframes = []
        for t in sorted(starts):
            own = next(strength for start, strength in reversed(self.steps) if start <= t)
            theirs = next((frame.strength for frame in reversed(host) if frame.start_percent <= t), host[0].strength if host else 1.0)
            self.keyframes.append(comfy.hooks.HookKeyframe(own * theirs, t, guarantee_steps=0))

    def initialize_timesteps(self, model) -> None:
        self._model = weakref.ref(model)
        self._sigmas = [float(model.model_sampling.percent_to_sigma(max(start - _TIMESTEP, 0.0))) for start, _ in self.steps]
        self.host.initialize_timesteps(model)

    def reset(self) -> None:
        self._current_keyframe, self._own, self._known = None, 1.0, None
        self.host.reset()

    def prepare_current_keyframe(self, curr_t, transformer_options) -> bool:
        """Whether the host has to patch anew all weights of the hooks that this one is among."""
        self.host.prepare_current_keyframe(curr_t, transformer_options)
        begun = sum(sigma >= float(curr_t) for sigma in self._sigmas)
        self._own = self.steps[max(begun, 1) - 1][1]
        changed, self._known = self.strength != self._known, self.strength
        return changed and not self._patch_anew(self._model().current_patcher)

    def _patch_anew(self, patcher) -> bool:
        """Patch the weights of this hook anew in place, and no others; False where only the host can tell what else there is."""
        group = patcher.current_hooks
        if group is None or all(hook.hook_ref is not self.hook_ref for hook in group.hooks):
            return False
        # copies of the weights, by group or by device, and others who wait for the host to do it
        if (patcher.hook_mode != comfy.hooks.EnumHookMode.MinVram or patcher.get_additional_models_with_key("multigpu")
                or patcher.get_all_callbacks(CallbacksMP.ON_APPLY_HOOKS)):  # fmt: skip
            return False
        with patcher.use_ejected():
            patches, originals = patcher.get_combined_hook_patches(group), patcher.get_key_patches()
            for key in patcher.hook_patches[self.hook_ref]:
                weight, device = patcher.hook_backup[key]
                comfy.utils.copy_to_param(patcher.model, key, weight.to(device=device))
                patcher.patch_hook_weight_to_device(hooks=group, combined_patches=patches, key=key, original_weights=originals, memory_counter=None)
        return True

    def add(self, keyframe) -> None:
        self.host.add(keyframe)

    def clone(self) -> "ScheduledKeyframes":
        return ScheduledKeyframes(self.steps, self.host.clone(), self.hook_ref)


class AdapterHook(comfy.hooks.WeightHook):
    """The blocks of an adapter that share one curve; without a curve those whose strength stays the same.

    adapter: shared by the hooks of one file; steps: the curve's, see `block_schedule.steps`. The host makes clones with no
    arguments and fills them in.
    """

    def __init__(self, adapter: "HookedAdapter | None" = None, curve: Curve | None = None, steps: Sequence[tuple[float, float]] = _ALWAYS,
                 strength_model: float = 1.0, strength_clip: float = 1.0):
        self.adapter, self.curve, self.steps = adapter, curve, tuple(steps)
        super().__init__(strength_model, strength_clip)

    @property
    def hook_keyframe(self) -> comfy.hooks.HookKeyframeGroup:
        return self._keyframes

    @hook_keyframe.setter
    def hook_keyframe(self, group: comfy.hooks.HookKeyframeGroup) -> None:
        # the host gives all hooks of a group one object, and only the first of them would see it change
        host = group.host if isinstance(group, ScheduledKeyframes) else group
        self._keyframes = ScheduledKeyframes(self.steps, host.clone(), self.hook_ref)

    def add_hook_patches(self, model, model_options, target_dict, registered) -> bool:
        """Give the patches to a MODEL's or CLIP's patcher. Raises TriLoRAError, before any of them is used, if the file does not fit."""
        if not self.should_register(model, model_options, target_dict, registered):
            return False
        is_clip = target_dict.get("target") == comfy.hooks.EnumWeightTarget.Clip
        strength = self._strength_clip if is_clip else self._strength_model
        groups = self.adapter.groups(model, is_clip).get(self.curve) if strength else None
        if not groups:
            return False
        for ratio, patches in groups.items():
            model.add_hook_patches(self, patches, strength * ratio)
        if is_clip:
            self._keyframes.for_text_encoder()
        registered.add(self)
        return True

    def clone(self) -> "AdapterHook":
        clone = super().clone()
        clone.adapter, clone.curve, clone.steps, clone._keyframes = self.adapter, self.curve, self.steps, self._keyframes
        return clone


class HookedAdapter:
    """A file with its block weights and its schedule, and its patches for the model that was met last."""

    def __init__(self, state: AdapterState, name: str, keep: int, block_weights: str, schedule: Schedule, node_id: str | None = None,
                 said: Sequence[str] = ()):
        """node_id: of the node on which notices are shown; said: those that it shows already."""
        self.node_id, self.said = node_id, list(said)
        self.state, self.name, self.keep, self.block_weights, self.schedule = state, name, keep, block_weights or "", schedule
        self._met: dict[bool, tuple[weakref.ref, dict]] = {}
        self._of_clip: set[str] = set()  # keys that have gone into a text encoder

    def hooks(self, switches: int, strength_model: float, strength_clip: float) -> comfy.hooks.HookGroup:
        """One hook for what stays the same, and one for each curve. Raises TriLoRAError if `switches` are too few for them."""
        group, moving = comfy.hooks.HookGroup(), [curve for curve in self.schedule.curves if not curve.is_constant]
        group.add(AdapterHook(self, None, _ALWAYS, strength_model, strength_clip))
        for curve, found in zip(moving, steps(moving, switches), strict=True):
            group.add(AdapterHook(self, curve, found, strength_model, strength_clip))
        return group

    def groups(self, patcher, is_clip: bool) -> dict[Curve | None, dict[float, dict]]:
        """Curve -> ratio -> the patches with them, on a MODEL's or a CLIP's patcher; None is the curve that stays the same."""
        model, found = self._met.get(is_clip, (lambda: None, {}))
        if model() is not patcher.model:
            found = self._on_clip(patcher) if is_clip else self._on_model(patcher)
            self._met[is_clip] = (weakref.ref(patcher.model), found)
        return found

    def _on_model(self, patcher) -> dict:
        tensors = {key: tensor for key, tensor in self.state.items() if key not in self._of_clip}
        if self._of_clip and not tensors:
            return {}
        places = Places.of(patcher, None)
        patches = self._patches(tensors, places)
        return self._sorted(patches, places.blocks, block_strengths(self.block_weights, places.blocks, self.name), strict=True)

    def _on_clip(self, patcher) -> dict:
        names = names_of_today(comfy.lora.model_lora_keys_clip(patcher.model, {}))
        shapes = {key: tensor.shape for key, tensor in patcher.model.named_parameters(remove_duplicate=False)}
        places = Places(names, shapes, has_clip=True)
        placed = places.match(self.state, self.name).diagnosis.placed
        tensors = {key: tensor for key, tensor in self.state.items() if names_in(key, placed)}
        if not tensors:
            return {}
        self._of_clip = set(tensors)
        patches = self._patches(tensors, places)
        return self._sorted(patches, places.blocks, _text_encoder_strengths(self.block_weights, places.blocks, shapes, self.name), strict=False)

    def _patches(self, tensors, places: Places) -> dict:
        with collected() as said:  # the node itself ran long before
            patches = places.patches(AdapterState(tensors, self.state.metadata), self.name, self.keep)
        if new := [text for text in said if text not in self.said]:
            self.said += new
            compat.show_text("\n".join(self.said), self.node_id)
        for target, patch in patches.items():
            _check_same_shape(self.name, target, patch, places.shapes)
        return patches

    def _sorted(self, patches, blocks: Blocks, weights: BlockWeights, strict: bool) -> dict:
        try:
            schedule = self.schedule.on(blocks, strict)
        except TriLoRAError as error:
            raise TriLoRAError(f"{self.name}: {error}; nothing was applied") from None
        groups: dict = {}
        for target, patch in patches.items():
            place = blocks.place(target)
            ratio, curve = weights.at(place), schedule.at(place)
            if curve.is_constant:
                ratio, curve = ratio * curve.at(0), None
            if ratio:
                groups.setdefault(curve, {}).setdefault(ratio, {})[target] = patch
        return groups


def _text_encoder_strengths(text: str, blocks: Blocks, keys, name: str) -> BlockWeights:
    """Block weights on a text encoder, while its model is not known: as every known model with such text encoders reads them.

    Raises TriLoRAError where no model reads them, or two read different strengths for the text encoder.
    """
    layouts = [layout for layout, known in LAYOUTS.items() if known.encoders.keys() == blocks.groups.keys()] or list(LAYOUTS)
    readings: dict[tuple, tuple[str, BlockWeights]] = {}
    for layout in layouts:
        try:
            weights = block_strengths(text, Blocks.layout(layout), name)
        except TriLoRAError as error:
            problem = error
            continue
        readings.setdefault(tuple(weights.at(blocks.place(key)) for key in keys), (layout, weights))
    if not readings:
        return _without_model_blocks(text, blocks, problem)
    found = list(readings.values())
    if len(found) > 1:
        (layout, _), (other, _) = found[:2]
        raise TriLoRAError(f"block_weights for {name}: {text.strip()!r} means other strengths for the text encoder of {layout} than of {other}; "
                           "write selectors, like default=1, TE=0.5; nothing was applied")
    return found[0][1]


def _without_model_blocks(text: str, blocks: Blocks, problem: TriLoRAError) -> BlockWeights:
    """The items of a text that name a text encoder's places; raises `problem` where it does not consist of items."""
    try:
        found = items(text)
    except TriLoRAError:
        raise problem from None
    known = []
    for selector, value in found:
        if selector.startswith("%"):  # another dialect
            raise problem
        item = f"{selector}={written(value)}"
        try:
            read_native(item, blocks)
        except TriLoRAError:  # a block of the model; sampling will ask it
            continue
        known.append(item)
    return read_native(", ".join(known), blocks)


def _check_same_shape(name: str, target, patch, shapes) -> None:
    key = split_target(target)[0]
    new = new_shape(patch, key)
    if new is not None and tuple(new) != tuple(shapes[key]):
        raise TriLoRAError(f"{name}: its layer for {key} gives it the shape {tuple(new)} instead of {tuple(shapes[key])}, which cannot be done for "
                           "some conditionings only; use TriLoRA Loader; nothing was applied")
