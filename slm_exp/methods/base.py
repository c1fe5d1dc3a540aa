"""The `method` group: from a model, tokens and a score to a merge plan."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from slm_exp.core.cost import Count, Work
from slm_exp.core.errors import NOT_FINITE, ConfigError, PlanError, require, require_one_of
from slm_exp.core.registry import Component, Fields
from slm_exp.core.timing import ROUNDS, WARM, LatencyTable
from slm_exp.core.together import Together
from slm_exp.core.types import BudgetReached, Group, MergePlan, Sublayer, Target, Trial
from slm_exp.merging.rules.base import MergeRule
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes
from slm_exp.search.budget import PHASES, Budget, flops_budget, latency_budget, parse_latency
from slm_exp.search.task import PlanTask

COMPENSATIONS = ("magnitude",)
BUDGETS = ("target_flops", "target_latency")
"""What the compressed model may cost at most; see search/budget.py."""
SIZES = ("threshold", "target_layers", "target_ratio", *BUDGETS)
SHAPE = ("batch", "length", "phase")
"""Of the input that a budget is for."""


@dataclass
class Method(Component, ABC):
    """Decides which layers go. A subclass gives `plan`; what it does not say of itself has a sound default here."""

    uses_layer_similarity: ClassVar[bool] = False
    """Whether the plan depends on the layer similarity matrix (and so on the kernel)."""
    targets: ClassVar[tuple[str, ...]] = ()
    """Which of the settings that request a size it takes; at most one of them may be set."""

    compensate: str | None = None
    """magnitude: rescale the residual stream after every cut (Prune&Comp; see search/compensation.py)."""
    threshold: float | None = None
    """Accept a merge while the score stays above this."""
    target_layers: int | None = None
    """Layers to be left."""
    target_ratio: float | None = None
    """Share of parameters to remove."""
    target_flops: float | None = None
    """Share of the dense model's operations a token that may be left, at `length`."""
    target_latency: str | None = None
    """What a pass of the compressed model may take: 20ms, or 80% of dense; the unit is required. In decode a pass gives
    a token to every sequence, in prefill it reads the prompt. By a table of units measured on the device."""
    batch: int = 1
    """Sequences of a pass that target_latency is for."""
    length: int = 128
    """Tokens of the prompt (prefill), or before the token (decode), that a budget is for."""
    phase: str | None = None
    """prefill or decode; null: prefill for target_flops, decode for target_latency."""
    table: ClassVar[LatencyTable | None] = None
    """That target_latency is met by, once it is measured: see `timed`."""

    def check(self) -> None:
        for name in SIZES:
            if name not in self.targets:
                require(getattr(self, name) is None, f"method.{name}", getattr(self, name), *self.no_target(name))
        requested = {f"method.{name}": getattr(self, name) for name in SIZES if getattr(self, name) is not None}
        if len(requested) > 1:
            got = ", ".join(f"{k} = {v}" for k, v in requested.items())
            raise ConfigError(f"set at most one of {', '.join(f'method.{name}' for name in self.targets)}; got {got}. "
                              f"Reset one with, e.g., {next(iter(requested))}=null.")
        if self.threshold is not None:
            require(-1 <= self.threshold <= 1, "method.threshold", self.threshold, "a score in [-1, 1]",
                    "Scores are similarities to the dense model, 1 is identical: try 0.9.")
        self.at_least(1, "target_layers", "batch", "length")
        if self.target_ratio is not None:
            require(0 < self.target_ratio < 1, "method.target_ratio", self.target_ratio,
                    "a share of the parameters in (0, 1)", "0.1 removes a tenth.")
        if self.target_flops is not None:
            require(0 < self.target_flops < 1, "method.target_flops", self.target_flops,
                    "a share of the dense model's operations in (0, 1)", "0.8 leaves four fifths of them.")
        if self.target_latency is not None:
            parse_latency(self.target_latency)
        if self.phase is not None:
            require_one_of("method.phase", self.phase, PHASES)
        if not self.budgeted:
            for name in SHAPE:
                require(getattr(self, name) == getattr(Method, name), f"method.{name}", getattr(self, name),
                        f"no such setting without {_either(BUDGETS)}")
        if self.compensate is not None:
            require_one_of("method.compensate", self.compensate, COMPENSATIONS)

    def identity(self) -> Fields:
        """An option that is off leaves no trace: what was named before there was the option keeps its name."""
        off = {name for name in ("compensate", *BUDGETS) if getattr(self, name) is None}
        own = {k: v for k, v in super().identity().items() if k not in (off if self.budgeted else off | {*SHAPE})}
        return own | ({"phase": self._phase} if self.budgeted else {})

    def with_ratio(self, ratio: float) -> Self:
        """The same method for another `target_ratio`; of one that has such a target."""
        return replace(self, target_ratio=ratio)

    @property
    def budgeted(self) -> str:
        """The setting by which operations or time are limited; empty where none is set."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), "")

    @property
    def _phase(self) -> str:
        return self.phase or ("decode" if self.target_latency is not None else "prefill")

    def lengths(self) -> dict[str, int]:
        """Tokens of the longest sequence that it makes the model read, by the setting that says so."""
        if self.target_latency is None:
            return {}
        return {"method.length": self.length + (ROUNDS + WARM if self._phase == "decode" else 0)}

    def timed_by(self) -> dict[str, Any] | None:
        """The shape of input that a table of times is needed for, by name; None where no target is a time."""
        return None if self.target_latency is None else {
            "batch": self.batch, "length": self.length, "phase": self._phase}

    def timing_cost(self, sizes: Sizes, weights: float) -> Work:
        """Of measuring that table. `weights`: bytes of the model's."""
        passes, tokens = 5.0 * (ROUNDS + WARM), self.batch * (self.length if self._phase == "prefill" else 1)
        return Work(blocks=passes * sizes.n_layers * sizes.block_flops(tokens, self.length),
                    head=passes * sizes.head_flops(tokens), read=passes * weights, fixed=3 * sizes.total / 5e7)

    def timed(self, table: LatencyTable) -> Self:
        """The same method with the table that its target is met by."""
        out = copy.copy(self)
        vars(out)["table"] = table
        return out

    def budget(self, handle: ModelHandle) -> Budget | None:
        """What the compressed model may cost; None where no such target is set, or none that is known before the table
        of times is measured. Loads no weights."""
        if self.target_flops is not None:
            return flops_budget(handle, self.target_flops, self.length, self._phase)
        if self.target_latency is not None and self.table is not None:
            return latency_budget(self.target_latency, self.table)
        return None

    @property
    def share_removed(self) -> float:
        """About what share of the model goes, for guesses at what a search costs; 0 where nothing says it."""
        if self.target_latency is not None:
            number, percent = parse_latency(self.target_latency)
            return 1 - number if percent else 0.25
        return 1 - self.target_flops if self.target_flops is not None else self.target_ratio or 0.0

    @property
    def requested(self) -> Any:
        """The size that is set; None where none is."""
        return next((value for name in self.targets if (value := getattr(self, name)) is not None), None)

    def reached(self, handle: ModelHandle, plan: MergePlan) -> BudgetReached | None:
        """What a plan's model costs, where a budget is set."""
        return budget.reached(plan) if (budget := self.budget(handle)) else None

    @property
    def unmeasured(self) -> bool:
        """Whether the size is that of a latency whose table is not there yet."""
        return self.target_latency is not None and self.table is None

    @property
    def replays(self) -> MergePlan | None:
        """The plan that is carried out as it stands; None where one is searched."""
        return None

    @property
    def plan_path(self) -> str:
        """Where that plan came from; empty where one is searched."""
        return ""

    @property
    def removes_sublayers(self) -> bool:
        """Whether attention and MLP are removed by themselves: `target_ratio` counts them, and their layers stay."""
        return False

    @property
    def narrows(self) -> bool:
        """Whether its plan narrows layers by itself, so that no width pruner can follow."""
        return False

    def uses_merge_rule(self) -> bool:
        """Whether the plan depends on the `merge_rule` group."""
        return True

    def merge_rule(self, requested: MergeRule) -> MergeRule:
        """The rule the run merges by, given the `merge_rule` group's: that one, unless the method brings its own."""
        return requested

    def refuses(self, others: Together) -> str | None:
        """Why this method cannot run with the rest of the config, or None. Checked before anything loads."""
        return None

    def check_model(self, handle: ModelHandle) -> None:
        """Raise ConfigError where this model has no such size. Called before weights load; may not load them."""
        self.layers_left(handle)

    def check_data(self, dense: ModelHandle) -> None:
        """Raise ConfigError or DataError where texts that it reads are absent or malformed. Called before weights
        load."""

    def layers_left(self, handle: ModelHandle) -> int | None:
        """Layers that the plan will leave, where the config says it; None where the search decides. Loads no weights.
        Raises ConfigError: this model has no such size."""
        return None

    def no_target(self, name: str) -> tuple[str, str]:
        """What is expected of a setting that the method does not take, and the remedy."""
        return f"null: method={self.name} takes a size", f"Set {_either(self.targets)} instead."

    def requested_layers(self, handle: ModelHandle, fewest: int, hint: str) -> int | None:
        """Layers to be left by a target; None where none is set, or a latency whose table is yet to be measured. Loads
        no weights. Raises ConfigError: the size cannot be reached; names the nearest."""
        if (budget := self.budget(handle)) is not None:
            return budget.layers(fewest)
        if self.target_ratio is not None:
            return layers_for_ratio(handle, self.target_ratio, fewest)
        if self.target_layers is not None:
            require(fewest <= self.target_layers <= handle.n_layers, "method.target_layers", self.target_layers,
                    f"{fewest} to {handle.n_layers} for {handle.name}", hint)
        return self.target_layers

    def bounds(self, n_layers: int) -> tuple[int, int] | None:
        """The fewest and the most layers that a search may leave; None where that is not known."""
        return None

    def cost(self, n_layers: int, removed: int | None) -> Count:
        """Of the search and its compensation; `removed`: layers that the plan removes, None where nobody knows yet."""
        count = self.search_cost(n_layers, removed)
        more = 2 * n_layers if self.compensate else 0
        return replace(count, blocks=count.blocks + more, scores=count.scores + bool(more))

    def memory(self, sizes: Sizes, seq_len: int) -> float:
        """Bytes that the search takes beside the model and the calibration's states, about. `seq_len`: of the latter's
        sequences."""
        return 0

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        """`cost` without a compensation: one look at the dense states and one compressed model, which runs anew from
        its first cut up. Override where a search takes more."""
        return Count(2 * n_layers - (removed or 0))

    def plan_from_scores(self, n_layers: int, scores: Mapping[str, float], rule_name: str) -> MergePlan | None:
        """The plan, where scores that an earlier search kept (see `search.inputs`) decide it; None where not."""
        return None

    @abstractmethod
    def plan(self, task: PlanTask) -> MergePlan:
        """Decide. Weights are left bit for bit as they were, also on an exception."""


@dataclass(frozen=True)
class Selection:
    """What a baseline selected. Layers are original indices."""

    dropped: tuple[int, ...] = ()
    groups: tuple[Group, ...] = ()
    """Half-open runs merged into one layer, where the method merges by itself."""
    sublayers: tuple[Sublayer, ...] = ()
    trace: tuple[Trial, ...] = ()
    """What was scored, in the method's own score."""
    threshold: float | None = None
    """That reaches the size, where the method tries some."""
    block_forwards: int = 0
    """Spent beside what the task's engine counts."""


@dataclass
class Sized(Method):
    """A method that removes as much as is asked for, never by a threshold."""

    targets: ClassVar[tuple[str, ...]] = ("target_layers", "target_ratio", *BUDGETS)
    """Settings that request a size; exactly one must be set."""
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
        super().check()
        requested = [name for name in self.targets if getattr(self, name) is not None]
        if len(requested) != 1:
            raise ConfigError(f"method={self.name} takes a size: set exactly one of {_either(self.targets)}; got "
                              f"{' and '.join(requested) or 'none'}. For example method.target_ratio=0.1.")
        self.at_least(0, "protect_first", "protect_last")
        require(self.mergeable or not self.merge, "method.merge", self.merge,
                f"false: method={self.name} removes parts of layers", "Only whole layers can be merged.")

    def uses_merge_rule(self) -> bool:
        return self.merge

    def layers_left(self, handle: ModelHandle) -> int | None:
        return None if self.unmeasured else handle.n_layers - self.layers_to_remove(handle)

    def bounds(self, n_layers: int) -> tuple[int, int] | None:
        return (1, n_layers) if self.unmeasured else None

    def removable(self, n_layers: int) -> range:
        """The layers that are not protected."""
        low = min(self.protect_first, n_layers)
        return range(low, max(low, n_layers - self.protect_last))

    def layers_to_remove(self, handle: ModelHandle) -> int:
        """How many layers the requested size takes away. Loads no weights. Raises ConfigError: the size cannot be
        reached; names the nearest."""
        n = handle.n_layers
        hint = f"method.protect_first={self.protect_first} and protect_last={self.protect_last} keep layers."
        if self.merge:
            hint += " With method.merge=true one more stays, into which the others are merged."
        fewest = max(1, n - max(0, len(self.removable(n)) - (self.keeps_one or self.merge)))
        left = self.requested_layers(handle, fewest, hint if self.protect_first + self.protect_last else "")
        assert left is not None
        return n - left


@dataclass
class Baseline(Sized):
    """Removes layers or parts of them.

    A subclass gives `choose`, and its published `protect_first` and `protect_last` as defaults.
    """

    @abstractmethod
    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        """Which `n_remove` layers go (0 included). What scoring them costs, `task.engine` counts."""

    def plan(self, task: PlanTask) -> MergePlan:
        """Decide, find the compensation if requested, and score the result. Cost: the selection, then one model."""
        task = replace(task)  # an engine of its own, for a cost of its own
        return self.finished(task, self.choose(task, self.layers_to_remove(task.handle)))

    def finished(self, task: PlanTask, selection: Selection) -> MergePlan:
        """The plan of a selection, with its compensation, final score and cost."""
        n, dropped, groups = task.handle.n_layers, selection.dropped, selection.groups
        if self.merge and dropped:
            dropped, groups = (), (*groups, *merged_runs(dropped, n, self.removable(n)))
        plan = MergePlan(n, groups, dropped, sublayers=selection.sublayers, method=self.name, trace=selection.trace,
                         rule=task.rule.name if groups else "", similarity=task.similarity.name,
                         block_forwards=selection.block_forwards)
        target = Target(self.requested, True, plan.n_layers_out, threshold=selection.threshold,
                        sublayers=len(selection.sublayers) if self.removes_sublayers else None,
                        budget=self.reached(task.handle, plan))
        return task.scored(replace(plan, target=target), self.compensate)


def layers_for_ratio(handle: ModelHandle, ratio: float, fewest: int) -> int:
    """How many layers, `fewest` or more, are left when about `ratio` of the parameters is gone. Loads no weights.
    Raises ConfigError: even the nearest size is off by more than one layer's share; names it and its ratio."""
    share = handle.layer_params / handle.n_params
    layers = min(range(fewest, handle.n_layers + 1), key=lambda n: abs((handle.n_layers - n) * share - ratio))
    reached = (handle.n_layers - layers) * share
    if abs(reached - ratio) > share:
        raise ConfigError(f"method.target_ratio = {ratio}; expected a share of the parameters that removing layers "
                          f"can reach. The nearest is {reached:.3f} ({layers} of {handle.n_layers} layers left); each "
                          f"layer is {share:.1%}.")
    return layers


def greedy_cost(n_layers: int, parts: float, removals: int, per_layer: int = 1, share: float = 1.0, heads: int = 1
                ) -> Count:
    """Of removing part by part the one that costs least: candidates run from their own part upwards, then the head.

    Args:
        parts: that may go, `per_layer` of them in a layer.
        share: of the parts, from the top down, that are tried.
        heads: passes of the head for each candidate.
    """
    blocks = tried = reads = 0.0
    for k in range(removals):
        left = max(0.0, parts * share - k)
        blocks += left * (n_layers - k / per_layer) * share / 2
        tried += left
        reads += (n_layers - k / per_layer) * share
    return Count(blocks + 2 * n_layers, tried * heads, reads=reads + 2 * n_layers)


def lowest(scores: Mapping[int, float], n: int, shown: Callable[[float], float] = float,
           block_forwards: int = 0) -> Selection:
    """The n layers of lowest score (the lower layer at a tie) go; the trace holds what `shown` makes of the scores.
    Raises PlanError: a score is not a number; names its layer."""
    for i, score in scores.items():
        if score != score:
            raise PlanError(f"layer {i} has a score that is not a number: its weights or states are not finite. "
                            f"{NOT_FINITE}")
    dropped = set(sorted(scores, key=lambda i: (scores[i], i))[:n])
    trace = tuple(Trial(i, i, shown(score), i in dropped) for i, score in sorted(scores.items()))
    return Selection(tuple(sorted(dropped)), trace=trace, block_forwards=block_forwards)


def merged_runs(dropped: Iterable[int], n_layers: int, free: range | None = None) -> tuple[Group, ...]:
    """Every run of dropped layers with the kept layer below it, as groups: as many layers are left either way.

    As in LaCo (arXiv:2402.11187), where layers collapse into the one below them. A run at the very bottom, or above a
    protected layer, takes the kept layer above it, and the run that would have taken that one joins.
    `free`: the layers that are not protected; null is all. Raises PlanError: a run has protected layers, or none, on
    both sides.
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
