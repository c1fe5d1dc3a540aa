"""Greedy removal: take away the part whose loss hurts least, look again, until enough is gone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from slm_exp.core.errors import NOT_FINITE, PlanError
from slm_exp.core.types import Kind, Trial
from slm_exp.engine.progress import ticking

if TYPE_CHECKING:
    from slm_exp.search.scoring import ScoringEngine, Slots

INFINITE = 1e9
"""What the trace, being JSON, holds of an infinite cost."""


class Unit(NamedTuple):
    """What can be removed: a whole layer, or a sublayer. Ordered from the bottom up."""

    layer: int
    """Original index."""
    kind: Kind | None = None
    """None is the whole layer."""

    def __str__(self) -> str:
        return f"{self.kind or 'layer'} {self.layer}"


Costs = Callable[[Sequence["Slots"]], Iterable[float]]
"""Of models, one after the other."""
Wanted = Callable[[Sequence[Unit], Unit], bool]
"""Whether a part may go, given those removed so far."""


@dataclass(frozen=True)
class Removed:
    """What a greedy search took away, in that order, and every candidate it scored."""

    units: tuple[Unit, ...]
    trace: tuple[Trial, ...]
    """`low` and `high`: the layer's position in the model at that moment; attention before mlp."""
    block_forwards: int = 0
    """Spent beside the engine's values."""


def without(slots: Slots, unit: Unit) -> Slots:
    """A model with one more part removed. A layer whose other sublayer is gone already goes as a whole."""
    at = position(slots, unit)
    slot = slots[at]
    whole = unit.kind is None or slot.without
    left = () if whole else (replace(slot, without=frozenset({str(unit.kind)})),)
    return (*slots[:at], *left, *slots[at + 1 :])


def position(slots: Slots, unit: Unit) -> int:
    """Where in a model the layer of a part now is."""
    return next(i for i, slot in enumerate(slots) if slot.host == unit.layer)


def greedy(engine: ScoringEngine, units: Sequence[Unit], cost: Costs, wanted: Wanted, what: str,
           last: Sequence[Unit] = ()) -> Removed:
    """Remove one part at a time, each time the one without which `cost` is lowest (the lower one at a tie).

    What was removed becomes the base of `engine`, so a candidate runs only the layers from its part upwards.
    Args:
        units: what may go, from the bottom up.
        cost: of models; lower is better.
        wanted: the search ends when no part is.
        last: parts that may go only when none of `units` may.
    Raises PlanError: every candidate's cost is infinite.
    Cost: for every removal, each part left is taken out once: about half the layers run for a model of its own.
    """
    slots = engine.dense
    removed: list[Unit] = []
    trace: list[Trial] = []

    def may_go(parts: Sequence[Unit]) -> list[Unit]:
        return [u for u in parts if u not in removed and without(slots, u) and wanted(removed, u)]

    while left := may_go(units) or may_go(last):
        costs = each_alone(slots, left, cost, f"{what}, part {len(removed) + 1}")
        best = min(left, key=lambda u: costs[u])
        _check_finite(costs, best)
        trace += traced(costs, {best}, slots)
        slots = without(slots, best)
        removed.append(best)
        engine.commit(slots)
    return Removed(tuple(removed), tuple(trace))


def each_alone(slots: Slots, units: Sequence[Unit], cost: Costs, what: str) -> dict[Unit, float]:
    """The cost of a model without each part, one at a time."""
    costs: dict[Unit, float] = {}
    with ticking(what, len(units)) as tick:
        for unit, value in zip(units, cost([without(slots, unit) for unit in units]), strict=True):
            costs[unit] = value
            tick(f"{costs[unit]:.4f} without {unit}")
    return costs


def one_shot(slots: Slots, costs: Mapping[Unit, float], wanted: Wanted) -> tuple[Unit, ...]:
    """The parts of lowest cost (the first at a tie), in that order, each if it is still wanted when its turn comes.
    Raises PlanError: a part's cost is infinite, and those of finite cost are not enough."""
    removed: list[Unit] = []
    for unit in sorted(costs, key=lambda u: costs[u]):
        left = without(slots, unit)
        if left and wanted(removed, unit):
            _check_finite(costs, unit)
            removed.append(unit)
            slots = left
    return tuple(removed)


def _check_finite(costs: Mapping[Unit, float], taken: Unit) -> None:
    if not math.isfinite(costs[taken]):
        refuse_infinite(costs)


def refuse_infinite(costs: Mapping[Unit, float]) -> None:
    """Raise PlanError where a part's cost is not finite; says how many."""
    if not all(map(math.isfinite, costs.values())):
        good = sum(map(math.isfinite, costs.values()))
        raise PlanError(f"{len(costs) - good} of {len(costs)} parts have a score that is not a finite number. "
                        f"{NOT_FINITE}")


def traced(costs: Mapping[Unit, float], taken: Collection[Unit], slots: Slots) -> list[Trial]:
    """The candidates as a plan's trace: scores are costs with the sign turned, so that higher is better."""
    at = {unit: position(slots, unit) for unit in costs}
    return [Trial(at[u], at[u], -min(cost, INFINITE), u in taken) for u, cost in costs.items()]
