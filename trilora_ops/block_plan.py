"""Block plans: which blocks of a model are trained, and with which method, rank, alpha and learning rate.

The texts of a plan are block weights (`block_syntax`) with other numbers in them. What a text does not speak of keeps what
the method says. Rank 0 and learning rate 0 both mean that a layer is not trained, as in kohya's sd-scripts and in
Block-wise LoRA (arXiv:2403.07500): it gets no adapter, no parameters and no place in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

from .block_presets import BUILT_IN
from .block_selectors import Selector, quoted
from .block_syntax import BlockWeights, written
from .blocks import TEXT_GROUPS, Blocks, Place
from .bounds import read_json
from .errors import TriLoRAError
from .plan_texts import read_numbers
from .registry import RESIDUALS, TRANSFORMS, Method

METADATA = "trilora.block_plan"
_MOST_PLANS = 100  # of a chain that metadata hold


@dataclass(frozen=True)
class BlockPlan:
    """A plan as it is written, before there is a model to read it for.

    rank: whole numbers, 0 = not trained; a text with no number but 0 and 1 chooses: 1 = with the method's own rank.
    alpha: 0 = the method's own. learning_rate: factors of the run's, 0 = not trained. Each "" = the method's own everywhere.
    method: of the layers that this plan trains, None = the run's. earlier: decides about those that it does not train.
    """

    rank: str = ""
    alpha: str = ""
    learning_rate: str = ""
    method: Method | None = None
    earlier: BlockPlan | None = None

    def read(self, blocks: Blocks, method: Method, presets: Mapping[str, str] = BUILT_IN) -> ReadPlan:
        """The plan on a model's blocks; method: the run's. Raises TriLoRAError naming plan, text and rule of what cannot be read."""
        return ReadPlan(blocks, tuple(_Step.read(plan, blocks, method, presets) for plan in self.chain()))

    def chain(self) -> Iterator[BlockPlan]:
        """This plan, then the earlier ones."""
        plan: BlockPlan | None = self
        while plan is not None:
            yield plan
            plan = plan.earlier


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is trained. rate: factor of the run's learning rate, > 0."""

    method: Method
    rate: float = 1.0


@dataclass(frozen=True)
class _Step:
    """One plan of a chain on a model; given: the method of its own, None = the run's."""

    method: Method
    given: Method | None
    rank: BlockWeights
    alpha: BlockWeights | None
    rate: BlockWeights | None

    @classmethod
    def read(cls, plan: BlockPlan, blocks: Blocks, run: Method, presets: Mapping[str, str]) -> _Step:
        method = plan.method or run
        size = method.residual.SIZE
        own = getattr(method.residual, size) if size else 1
        rank = _ranks(plan.rank, blocks, presets, own)
        for value in {rank.default, *_values(rank)}:
            if value < 0 or value != int(value):
                raise TriLoRAError(f"block plan: rank: {_where(rank, value)}: a rank is a whole number of 1 or more, or 0 for a layer that is not trained")
            if not size and value > 1:
                raise TriLoRAError(f"block plan: rank: {_where(rank, value)}: {method.name} has no rank; write 1 for the blocks to train and 0 for the others")
        alpha = read_numbers("alpha", plan.alpha, blocks, presets, 0) if plan.alpha.strip() else None
        if alpha and (low := min(alpha.default, *_values(alpha), 0)) < 0:
            raise TriLoRAError(f"block plan: alpha: {_where(alpha, low)}: alpha is a positive number, or 0 for the method's own")
        if alpha and not any(f.name == "alpha" for f in fields(method.residual)):
            raise TriLoRAError(f"block plan: alpha={quoted(plan.alpha)}: {method.name} has no alpha; leave this text empty")
        rate = read_numbers("learning_rate", plan.learning_rate, blocks, presets, 1) if plan.learning_rate.strip() else None
        if rate and (low := min(rate.default, *_values(rate), 0)) < 0:
            raise TriLoRAError(f"block plan: learning_rate: {_where(rate, low)}: a factor of the learning rate is a positive number, or 0 for a layer that is not trained")
        return cls(method, plan.method, rank, alpha, rate)

    def at(self, place: Place) -> LayerPlan | None:
        rank, rate = int(self.rank.at(place)), 1.0 if self.rate is None else self.rate.at(place)
        if not rank or not rate:
            return None
        size, alpha = self.method.residual.SIZE, 0.0 if self.alpha is None else self.alpha.at(place)
        changes = ({size: rank} if size else {}) | ({"alpha": alpha} if alpha else {})
        return LayerPlan(replace(self.method, residual=replace(self.method.residual, **changes)), rate)


@dataclass(frozen=True)
class ReadPlan:
    """A plan on one model."""

    blocks: Blocks
    steps: tuple[_Step, ...] = field(repr=False)

    def at(self, key: str) -> LayerPlan | None:
        """How the layer of a target key is trained, None = not at all: by the first plan of the chain that trains it."""
        place = self.blocks.place(key)
        return next((layer for step in self.steps if (layer := step.at(place))), None)

    def canonical(self) -> BlockPlan:
        """The same plan in canonical texts, with the ranks that the methods gave it."""
        plan = None
        for step in reversed(self.steps):
            texts = ["" if weights is None else weights.text() for weights in (step.rank, step.alpha, step.rate)]
            plan = BlockPlan(*texts, step.given, plan)
        return plan

    def _asked(self) -> list[Selector]:
        return [selector for step in self.steps for weights in (step.rank, step.rate) if weights for selector, value in weights.rules if value]

    def text_encoders(self) -> list[str]:
        """What the plan asks for in text encoders, which are not trained: selectors, in the order of the texts."""
        return list(dict.fromkeys(s.text for s in self._asked() if s.blocks and all(block.partition(".")[0] in TEXT_GROUPS for block in s.blocks)))

    def unmet(self, chosen: Iterable[str], others: Iterable[str]) -> list[str]:
        """What the plan asks for and `chosen`, the layers of the target, cannot give: selectors, in the order of the texts.

        Those that match no layer there, but some of `others`, the model's other layers.
        """
        inside, outside = ([self.blocks.place(key) for key in keys] for keys in (chosen, others))
        return list(dict.fromkeys(selector.text for selector in self._asked()
                                  if not any(map(selector.matches, inside)) and any(map(selector.matches, outside))))


def to_metadata(plan: BlockPlan) -> str:
    """A plan and the earlier ones as one line of text; `from_metadata` of it is equal to the plan."""
    return json.dumps([{"rank": p.rank, "alpha": p.alpha, "learning_rate": p.learning_rate, "method": p.method and p.method.options} for p in plan.chain()])


def from_metadata(text: str) -> BlockPlan:
    """Raises TriLoRAError for a text that is not one of ours, or has a method that this release does not know."""
    try:
        plan = None
        entries = read_json(text)
        if len(entries) > _MOST_PLANS:
            raise ValueError(f"{len(entries):,} plans, at most {_MOST_PLANS} are read")
        for entry in reversed(entries):
            method = entry["method"] and Method(*(_config(kinds, entry["method"][part]) for part, kinds in (("residual", RESIDUALS), ("transform", TRANSFORMS))))
            texts = [entry[name] for name in ("rank", "alpha", "learning_rate")]
            if not all(isinstance(t, str) for t in texts):
                raise TypeError(texts)
            plan = BlockPlan(*texts, method, plan)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TriLoRAError(f"its {METADATA} cannot be read ({error!s:.200}); update ComfyUI-TriLoRA, or write the plan anew") from None
    if plan is None:
        raise TriLoRAError(f"its {METADATA} holds no plan; write the plan anew")
    return plan


def _config(kinds: Mapping[str, type], options: Mapping):
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items() if name != "kind"}
    return kinds[options["kind"]](**values)


def _ranks(text: str, blocks: Blocks, presets: Mapping[str, str], own: int) -> BlockWeights:
    """own: the rank of layers of which the text says nothing, and of those to which a text of zeros and ones gives 1."""
    weights = read_numbers("rank", text, blocks, presets, 1)
    if {weights.default, *_values(weights)} <= {0, 1}:  # as presets, block weights and lists of indices have it
        return BlockWeights(weights.default * own, tuple((selector, value * own) for selector, value in weights.rules))
    return read_numbers("rank", text, blocks, presets, own)


def _values(weights: BlockWeights) -> list[float]:
    return [value for _, value in weights.rules]


def _where(weights: BlockWeights, value: float) -> str:
    return f"{next((_short(selector.text) for selector, found in weights.rules if found == value), 'default')}={written(value)}"


def _short(selector: str) -> str:
    return selector if len(selector) <= 80 else f"{selector[:70]} ..."
