"""EvoPress's evolutionary search and a beam search over sets of parts to remove. Runs no model itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from slm_exp.core.errors import NOT_FINITE, PlanError
from slm_exp.core.types import MergePlan, Sublayer, Trial
from slm_exp.engine.progress import ticking
from slm_exp.search.greedy import INFINITE, Unit, Wanted

Parts = frozenset[Unit]
"""What a candidate lacks."""
Cost = Callable[[Parts], float]
"""Of the model without them; lower is better, infinite where it is no number."""


def plan_without(n_layers: int, parts: Collection[Unit]) -> MergePlan:
    """The plan that removes parts."""
    return MergePlan(n_layers, dropped=tuple(u.layer for u in parts if u.kind is None),
                     sublayers=tuple(Sublayer(u.layer, u.kind) for u in parts if u.kind))


class Found(NamedTuple):
    """The best set of parts, and what was tried on the way."""

    parts: Parts
    trace: tuple[Trial, ...]


@dataclass(frozen=True)
class Evolution:
    """What a generation of EvoPress is. Source: arXiv:2410.14649, github.com/IST-DASLab/EvoPress."""

    starts: int
    """Random sets, of which the best is the first parent."""
    children: int
    survivors: int
    """Children that are looked at closely, beside the parent."""
    swaps: int
    """At most, of one child."""
    generations: int
    max_evaluations: int | None
    """Sets that may be scored, whether by the quick look or the close one."""

    def run(self, pools: Sequence[Sequence[Unit]], counts: Sequence[int], quick: Cost, close: Cost,
            settle: Callable[[Parts], None], random: Random) -> Found:
        """Sets that keep the number of parts taken from every pool.

        Args:
            pools: parts that may stand in for each other.
            counts: how many of each go.
            quick, close: scores on few tokens and on all.
            settle: is told of every new parent.
        Raises PlanError: no set has a finite score.
        """
        seen: dict[Parts, float] = {}
        trace: list[Trial] = []

        def looked(parts: Parts) -> float:
            if parts not in seen:
                seen[parts] = quick(parts)
            return seen[parts]

        def spent() -> bool:
            return self.max_evaluations is not None and len(seen) + len(trace) >= self.max_evaluations

        def drawn() -> Parts:
            return frozenset(u for pool, n in zip(pools, counts, strict=True) for u in random.sample(list(pool), n))

        movable = [i for i, (pool, n) in enumerate(zip(pools, counts, strict=True)) if 0 < n < len(pool)]
        with ticking("evopress", self.generations, "generation") as tick:
            first = [drawn() for _ in range(self.starts if movable else 1)]
            parent = min(first[: self.max_evaluations], key=looked)
            cost = close(parent)
            trace.append(_trial(parent, frozenset(), cost, True))
            for _ in range(self.generations if movable else 0):
                if spent():
                    break
                settle(parent)
                children = {self._child(parent, pools, movable, random): None for _ in range(self.children)}
                best = sorted((c for c in children if c != parent), key=looked)[: self.survivors]
                costs = {child: close(child) for child in best}
                winner = min(costs, key=lambda c: costs[c], default=parent)
                better = costs.get(winner, math.inf) < cost
                trace += [_trial(child, parent, value, better and child == winner) for child, value in costs.items()]
                parent, cost = (winner, costs[winner]) if better else (parent, cost)
                tick(f"{cost:.4f}")
        if not math.isfinite(cost):
            raise PlanError(f"no set of parts has a score that is a finite number. {NOT_FINITE}")
        return Found(parent, tuple(trace))

    def _child(self, parent: Parts, pools: Sequence[Sequence[Unit]], movable: Sequence[int], random: Random) -> Parts:
        """A parent with a few parts swapped, each for another of its pool; the smaller of two draws is how many."""
        child = set(parent)
        for _ in range(min(random.randint(1, self.swaps), random.randint(1, self.swaps))):
            pool = pools[random.choice(movable)]
            child.remove(random.choice([u for u in pool if u in child]))
            child.add(random.choice([u for u in pool if u not in child]))
        return frozenset(child)


def beam(units: Sequence[Unit], width: int, cost: Cost, wanted: Wanted, settle: Callable[[Parts], None]) -> Found:
    """Sets of parts grown by one part at a time: of all that the best `width` sets can become, the best `width` go on.

    A set is done when no further part is wanted; of those that are done the best is found. Width 1 is greedy.
    Args:
        units: what may go, from the bottom up; of two equal costs the lower part's comes first.
        settle: is told of a set before those that it can become are scored.
    Raises PlanError: every set has a cost that is not finite.
    """
    known: dict[Parts, float] = {frozenset(): 0.0}
    sets, done, trace = [*known], list[Parts](), list[Trial]()
    while sets:
        grown = {parts: [u for u in units if u not in parts and wanted([*parts], u)] for parts in sets}
        done += [parts for parts, more in grown.items() if not more]
        new: dict[Parts, Parts] = {}
        with ticking(f"beam, part {len(sets[0]) + 1}", sum(map(len, grown.values()))) as tick:
            for parts, more in grown.items():
                settle(parts)
                for unit in more:
                    candidate = parts | {unit}
                    new.setdefault(candidate, parts)
                    known[candidate] = known[candidate] if candidate in known else cost(candidate)
                    tick(f"{known[candidate]:.4f} without {unit}")
        sets = sorted(new, key=lambda parts: known[parts])[:width]
        trace += [_trial(candidate, parts, known[candidate], candidate in sets) for candidate, parts in new.items()]
        if sets and not math.isfinite(known[sets[0]]):
            raise PlanError(f"every set of {len(sets[0])} parts has a score that is not a finite number. {NOT_FINITE}")
    return Found(min(done, key=lambda parts: known[parts]), tuple(trace))


def _trial(parts: Parts, base: Parts, cost: float, accepted: bool) -> Trial:
    """A candidate in a plan's trace: the lowest and the highest layer, in original numbers, in which it differs from
    what it came from; costs with the sign turned, so that higher is better."""
    layers = [u.layer for u in parts ^ base] or [0]
    return Trial(min(layers), max(layers), -min(cost, INFINITE), accepted)
