"""Plans of a requested size: the threshold path, followed only where that size can still be reached."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from slm_exp.core.errors import PlanError
from slm_exp.engine.progress import ticking
from slm_exp.search.path import PathPlan, Scores, follow, single
from slm_exp.search.state import Candidate, SearchState

BUDGET = 400
"""Candidates scored for a size where no budget is set."""
PROBES = 8
"""Thresholds tried by bisection at most."""


@dataclass(frozen=True)
class SearchResult:
    """The best plan of a size, and how sure that is."""

    plan: PathPlan
    complete: bool
    """False when the budget ended the search: a better plan of this size may exist."""
    neighbours: tuple[PathPlan, ...]
    """What a threshold just below and just above the plan's interval gives, where range and budget allow."""
    met: tuple[PathPlan, ...]
    """Every plan that the search came upon, of this size and of others."""


def best_of_size(
    scores: Scores, start: SearchState, n_layers: int, layers: int, low: float, high: float,
    commit_open_window: bool = True, budget: int = BUDGET,
) -> SearchResult:
    """Among the plans of thresholds [low, high) that leave `layers` layers, the one with the best final score.

    A plan's final score is no lower than its thresholds, so they are followed from the highest down. Bisection comes
    first: a budget that ends before small models are met then still has a plan of that size.

    Raises:
        PlanError: no threshold in the range leaves that many layers (or the budget ended first); names the nearest.
    """
    scored: set[Candidate] = set()

    def at(threshold: float) -> PathPlan | None:
        return single(scores, start, n_layers, low, high, threshold, commit_open_window, budget, scored)

    with ticking(f"search for {layers} layers", budget, "candidate") as tick:
        probed = _bisect(at, layers, low, high, lambda about: tick(about, len(scored)))
        path = follow(scores, start, n_layers, low, high, commit_open_window, budget,
                      wanted=lambda sizes: layers in sizes, scored=scored,
                      show=lambda branch, n: tick(f"below {branch.high:.4f} to do", n))
    best = max((p for p in (*path.plans, *probed) if p.n_layers == layers), key=lambda p: p.final_score, default=None)
    if best is None:
        met = sorted({p.n_layers for p in (*path.plans, *probed)}, key=lambda n: abs(n - layers))[:2]
        nearest = f" Nearest sizes met: {', '.join(map(str, sorted(met)))}." if met else ""
        why = ("" if path.complete else f" {path.evaluations} candidates were scored, then method.max_evaluations = "
               f"{budget} ended the search; raise it.")
        raise PlanError(f"no threshold in [{low:g}, {high:g}) leaves {layers} of {n_layers} layers.{nearest}{why} "
                        "Another rule or similarity reaches other sizes; method.threshold_range widens the search.")
    beside = (math.nextafter(best.low, -math.inf), best.high)
    neighbours = tuple(plan for t in beside if low <= t < high and (plan := at(t)))
    return SearchResult(best, path.complete, neighbours, (*path.plans, *probed, *neighbours))


def _bisect(
    at: Callable[[float], PathPlan | None], layers: int, low: float, high: float, show: Callable[[str], None]
) -> list[PathPlan]:
    """Plans met on the way to a threshold in [low, high) that leaves `layers` layers; the last has that size, if any.

    Layers left rise with the threshold on the whole, not strictly, so a size may be missed that the path has.
    """
    met: list[PathPlan] = []
    while len(met) < PROBES and low < high and (plan := at((low + high) / 2)):
        met.append(plan)
        show(f"threshold {(low + high) / 2:.4f} leaves {plan.n_layers}")
        if plan.n_layers == layers:
            break
        low, high = (low, plan.low) if plan.n_layers > layers else (plan.high, high)
    return met
