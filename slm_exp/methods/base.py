"""The `method` group: from a model, tokens and a score to a merge plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from slm_exp.core.errors import ConfigError, PlanError, require, require_one_of
from slm_exp.core.registry import Component
from slm_exp.core.types import Group, MergePlan, Trial

if TYPE_CHECKING:
    from slm_exp.merging.rules.base import MergeRule
    from slm_exp.models.base import ModelHandle
    from slm_exp.pipeline.config import RunConfig
    from slm_exp.search.reduced import ReducedModels
    from slm_exp.search.task import PlanTask

COMPENSATIONS = ("magnitude",)


@dataclass
class Method(Component, ABC):
    """How the size is asked for; at most one of the three, none set means the method's own default."""

    uses_layer_similarity: ClassVar[bool] = False
    """Whether the plan depends on the layer similarity matrix (and so on the kernel)."""

    threshold: float | None = None
    """Accept a merge while the score stays above this."""
    target_layers: int | None = None
    """Layers to be left."""
    target_ratio: float | None = None
    """Share of parameters to remove."""
    compensate: str | None = None
    """magnitude: rescale the stream behind every cut (Prune&Comp; see merging/compensation.py)."""

    def check(self) -> None:
        asked = {
            f"method.{name}": value
            for name in ("threshold", "target_layers", "target_ratio")
            if (value := getattr(self, name)) is not None
        }
        if len(asked) > 1:
            raise ConfigError(
                "set at most one of method.threshold, method.target_layers, method.target_ratio; got "
                + ", ".join(f"{k} = {v}" for k, v in asked.items())
                + ". Reset one with, e.g., method.threshold=null."
            )
        if self.threshold is not None:
            require(-1 <= self.threshold <= 1, "method.threshold", self.threshold, "a score in [-1, 1]",
                    "Scores are similarities to the dense model, 1 is identical: try 0.9.")
        if self.target_layers is not None:
            require(self.target_layers >= 1, "method.target_layers", self.target_layers, "a whole number >= 1")
        if self.target_ratio is not None:
            require(0 < self.target_ratio < 1, "method.target_ratio", self.target_ratio,
                    "a share of the parameters in (0, 1)", "0.1 removes a tenth.")
        if self.compensate is not None:
            require_one_of("method.compensate", self.compensate, COMPENSATIONS)

    def identity(self) -> dict[str, Any]:
        """An option that is off leaves no trace: what was named before there was the option keeps its name."""
        return {k: v for k, v in super().identity().items() if k != "compensate" or v is not None}

    def uses_merge_rule(self) -> bool:
        """Whether the plan depends on the `merge_rule` group."""
        return True

    def merge_rule(self, asked: MergeRule) -> MergeRule:
        """The rule the run merges by, given the `merge_rule` group's: that one, unless the method brings its own."""
        return asked

    def refuses(self, cfg: RunConfig) -> str | None:
        """Why this method cannot run with the rest of the config, or None. Checked before anything loads."""
        return None

    def check_model(self, handle: ModelHandle) -> None:
        """Raise ConfigError where this model has no such size. Called before weights load; may not load them."""

    @abstractmethod
    def plan(self, task: PlanTask) -> MergePlan:
        """Decide. Weights are left bit for bit as they were, also on an exception."""


@dataclass(frozen=True)
class Choice:
    """What a baseline chose. Layers are original indices."""

    dropped: tuple[int, ...] = ()
    groups: tuple[Group, ...] = ()
    """Half-open runs merged into one layer, where the method merges by itself."""
    sublayers: tuple[dict[str, Any], ...] = ()
    """`{layer, kind}`, kind `attention` or `mlp`."""
    trace: tuple[Trial, ...] = ()
    """What was scored, in the method's own score."""
    notes: tuple[str, ...] = ()
    target: dict[str, Any] = field(default_factory=dict)
    """More to say of the size asked for, beside `asked`, `complete` and `layers`."""
    models: ReducedModels | None = None
    """The engine it was found with, if any: its dense pass serves the final score, its cost goes into the plan."""
    evaluations: int = 0
    """Candidates scored outside `models`."""
    block_forwards: int = 0
    """Spent outside `models`."""


@dataclass
class Baseline(Method):
    """A method that removes a number of layers asked for, never by a threshold.

    A subclass gives `choose`, and its published `protect_first` and `protect_last` as defaults.
    """

    targets: ClassVar[tuple[str, ...]] = ("target_layers", "target_ratio")
    """Fields that ask for a size; exactly one must be set."""
    mergeable: ClassVar[bool] = True
    """Whether what is removed are whole layers, which `merge` can merge instead."""
    keeps_one: ClassVar[bool] = False
    """Whether one layer that is not protected always stays, because the others are merged into it."""

    protect_first: int = 0
    """Layers at the bottom that are never removed."""
    protect_last: int = 0
    """Layers at the top that are never removed."""
    merge: bool = False
    """Merge every run of chosen layers into the kept layer below it (above, where that one is protected), by the run's
    merge_rule, instead of removing. One layer that is not protected always stays."""

    def check(self) -> None:
        require(self.threshold is None, "method.threshold", self.threshold, f"null: method={self.name} takes a size",
                f"Set {_either(self.targets)} instead.")
        super().check()
        asked = [name for name in self.targets if getattr(self, name) is not None]
        if len(asked) != 1:
            raise ConfigError(f"method={self.name} takes a size: set exactly one of {_either(self.targets)}; got "
                              f"{' and '.join(asked) or 'none'}. For example method.target_ratio=0.1.")
        for name in ("protect_first", "protect_last"):
            require(getattr(self, name) >= 0, f"method.{name}", getattr(self, name), "a whole number >= 0")
        require(self.mergeable or not self.merge, "method.merge", self.merge,
                f"false: method={self.name} removes parts of layers", "Only whole layers can be merged.")

    def uses_merge_rule(self) -> bool:
        return self.merge

    def check_model(self, handle: ModelHandle) -> None:
        self.layers_to_remove(handle)

    def removable(self, n_layers: int) -> range:
        """The layers that are not protected."""
        low = min(self.protect_first, n_layers)
        return range(low, max(low, n_layers - self.protect_last))

    def layers_to_remove(self, handle: ModelHandle) -> int:
        """How many layers the size asked for takes away. Loads no weights.

        Raises:
            ConfigError: the size cannot be reached; names the nearest.
        """
        from slm_exp.search.target import layers_for_ratio

        n = handle.n_layers
        fewest = max(1, n - max(0, len(self.removable(n)) - (self.keeps_one or self.merge)))
        if self.target_ratio is not None:
            return n - layers_for_ratio(handle, self.target_ratio, fewest)
        assert self.target_layers is not None
        protected = f"method.protect_first={self.protect_first} and protect_last={self.protect_last} keep layers."
        if self.merge:
            protected += " With method.merge=true one more stays, into which the others are merged."
        require(fewest <= self.target_layers <= n, "method.target_layers", self.target_layers,
                f"{fewest} to {n} for {handle.name}", protected if self.protect_first + self.protect_last else "")
        return n - self.target_layers

    @abstractmethod
    def choose(self, task: PlanTask, n_remove: int) -> Choice:
        """Which `n_remove` layers go (0 included)."""

    def plan(self, task: PlanTask) -> MergePlan:
        """Decide, find the compensation where asked, and score the result. Cost: the choice, then one model."""
        choice = self.choose(task, self.layers_to_remove(task.handle))
        return self.carried_out(task, choice)

    def carried_out(self, task: PlanTask, choice: Choice) -> MergePlan:
        """The plan of a choice, with its compensation, final score and cost."""
        from slm_exp.search.reduced import ReducedModels

        n, dropped, groups = task.handle.n_layers, choice.dropped, choice.groups
        if self.merge and dropped:
            dropped, groups = (), (*groups, *merged_runs(dropped, n, self.removable(n)))
        plan = MergePlan(
            n_layers=n, groups=groups, dropped=dropped, sublayers=choice.sublayers, method=self.name,
            rule=task.rule.name if groups else "", similarity=task.similarity.name, trace=choice.trace,
            evaluations=choice.evaluations, block_forwards=choice.block_forwards, notes=choice.notes,
        )
        asked = [value for name in self.targets if (value := getattr(self, name)) is not None]
        if asked:
            target = {"asked": asked[0], "complete": True, "layers": plan.n_layers_out, **choice.target}
            plan = replace(plan, target=target)
        return scored(task, plan, choice.models or ReducedModels(task), self.compensate)


def scored(task: PlanTask, plan: MergePlan, models: ReducedModels, compensate: str | None) -> MergePlan:
    """A plan with its compensation, its final score, what its sublayers leave behind, and the cost added to its own.

    Cost: what `models` has spent so far, one model, and for a compensation one pass over the dense layers.
    """
    from slm_exp.merging.compensation import magnitudes
    from slm_exp.merging.surgery import zeroed_note
    from slm_exp.search.reduced import slots_of
    from slm_exp.search.refit import note

    if compensate:
        compensation, forwards = magnitudes(task, plan, models)
        plan = replace(plan, compensation=compensation, block_forwards=plan.block_forwards + forwards)
    score = models.score(slots_of(plan, task.rule))
    return replace(plan, final_score=score, evaluations=plan.evaluations + models.evaluations,
                   block_forwards=plan.block_forwards + models.block_forwards,
                   notes=(*plan.notes, *zeroed_note(task.handle, plan), *note(task)))


def lowest(
    scores: Mapping[int, float], n: int, shown: Callable[[float], float] = float
) -> tuple[tuple[int, ...], tuple[Trial, ...]]:
    """The n layers of lowest score (the lower layer at a tie), and the trace of all.

    Args:
        shown: what the trace holds of a score.
    Raises:
        PlanError: a score is not a number; names its layer.
    """
    for i, score in scores.items():
        if score != score:
            raise PlanError(f"layer {i} has a score that is not a number: its weights or states are not finite. "
                            "Use model.dtype=float32 or bfloat16; if it is float32 already, the weights are damaged.")
    dropped = set(sorted(scores, key=lambda i: (scores[i], i))[:n])
    trace = tuple(Trial(i, i, shown(score), i in dropped) for i, score in sorted(scores.items()))
    return tuple(sorted(dropped)), trace


def merged_runs(dropped: Iterable[int], n_layers: int, free: range | None = None) -> tuple[Group, ...]:
    """Every run of dropped layers with the kept layer below it, as groups: as many layers are left either way.

    As in LaCo (arXiv:2402.11187), where layers collapse into the one below them. A run at the very bottom, or above a
    protected layer, takes the kept layer above it, and the run that would have taken that one joins.

    Args:
        free: the layers that are not protected; null is all.
    Raises:
        PlanError: a run has protected layers, or none, on both sides.
    """
    gone, free = set(dropped), range(n_layers) if free is None else free
    groups: list[Group] = []
    for i in sorted(gone):
        low, high = i - 1, i + 1
        if low not in free:
            low, high = i, next((k for k in free if k >= i and k not in gone), n_layers) + 1
            if high > n_layers:
                raise PlanError(f"method.merge = True: the layers from {i} up have only protected ones beside them. "
                                "Lower method.protect_first or method.protect_last, or remove fewer layers.")
        if groups and low < groups[-1].stop:
            groups[-1] = Group(groups[-1].start, max(high, groups[-1].stop))
        else:
            groups.append(Group(low, high))
    return tuple(groups)


def _either(fields: Iterable[str]) -> str:
    return " or ".join(f"method.{name}" for name in fields)
