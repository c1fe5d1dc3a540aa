"""Plans of a size asked for: the threshold path, followed only where that size can still be reached."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.errors import ConfigError, PlanError
from slm_exp.engine.progress import ticking
from slm_exp.search.path import PathPlan, Scores, follow, single

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle
    from slm_exp.search.state import Candidate, SearchState

BUDGET = 400
"""Candidates scored for a size where no budget is set."""
PROBES = 8
"""Thresholds tried by bisection at most."""


@dataclass(frozen=True)
class Found:
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
    commit_open_window: bool = True, max_evaluations: int | None = None,
) -> Found:
    """Among the plans of thresholds [low, high) that leave `layers` layers, the one with the best final score.

    A plan's final score is no lower than its thresholds, so they are followed from the highest down. Bisection comes
    first: a budget that ends before small models are met then still has a plan of that size.

    Raises:
        PlanError: no threshold in the range leaves that many layers (or the budget ended first); names the nearest.
    """
    budget = BUDGET if max_evaluations is None else max_evaluations
    asked: set[Candidate] = set()

    def at(threshold: float) -> PathPlan | None:
        return single(scores, start, n_layers, low, high, threshold, commit_open_window, budget, asked)

    with ticking(f"search for {layers} layers", budget, "candidate") as tick:
        probed = _bisect(at, layers, low, high, lambda told: tick(told, len(asked)))
        path = follow(scores, start, n_layers, low, high, commit_open_window, budget,
                      wanted=lambda sizes: layers in sizes, asked=asked,
                      show=lambda branch, scored: tick(f"below {branch.high:.4f} to do", scored))
    best = max((p for p in (*path.plans, *probed) if p.n_layers == layers), key=lambda p: p.final_score, default=None)
    if best is None:
        met = sorted({p.n_layers for p in (*path.plans, *probed)}, key=lambda n: abs(n - layers))[:2]
        nearest = f" Nearest sizes met: {', '.join(map(str, sorted(met)))}." if met else ""
        why = ("" if path.complete else f" {path.evaluations} candidates were scored, then method.max_evaluations = "
               f"{budget} ended the search; raise it.")
        raise PlanError(f"no threshold in [{low:g}, {high:g}) leaves {layers} of {n_layers} layers.{nearest}{why} "
                        "Another rule or similarity reaches other sizes; method.threshold_range widens the search.")
    beside = [at(t) for t in (math.nextafter(best.low, -math.inf), best.high) if low <= t < high]
    neighbours = tuple(plan for plan in beside if plan is not None)
    return Found(best, path.complete, neighbours, (*path.plans, *probed, *neighbours))


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


def layers_for_ratio(handle: ModelHandle, ratio: float, fewest: int) -> int:
    """How many layers are left when about `ratio` of the parameters is gone: the nearest size. Loads no weights.

    Args:
        fewest: layers that any plan leaves.
    Raises:
        ConfigError: even the nearest size is off by more than one layer's share; names it and its ratio.
    """
    share = handle.layer_params / handle.n_params
    layers = min(range(fewest, handle.n_layers + 1), key=lambda n: abs((handle.n_layers - n) * share - ratio))
    reached = (handle.n_layers - layers) * share
    if abs(reached - ratio) > share:
        raise ConfigError(
            f"method.target_ratio = {ratio}; expected a share of the parameters that removing layers can reach. The "
            f"nearest is {reached:.3f} ({layers} of {handle.n_layers} layers left); each layer is {share:.1%}."
        )
    return layers
