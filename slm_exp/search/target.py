"""Plans of a size asked for: the threshold path, followed only where that size can still be reached."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.errors import ConfigError, PlanError
from slm_exp.search.path import Branch, PathPlan, Scores, follow
from slm_exp.search.progress import ticking

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle
    from slm_exp.search.state import Candidate, SearchState

BUDGET = 400
"""Candidates scored for a size where no budget is set."""
PROBES = 8
"""Thresholds tried by bisection, to within 0.002 of the range 0.5 to 1."""


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

    Bisection finds a threshold that leaves about so many, and the path is followed from there outwards: what a budget
    leaves out is what is farthest from it.

    Raises:
        PlanError: no threshold in the range leaves that many layers (or the budget ended first); names the nearest.
    """
    budget = BUDGET if max_evaluations is None else max_evaluations
    asked: set[Candidate] = set()
    with ticking(f"search for {layers} layers", budget, "candidate") as tick:

        def show(branch: Branch, scored: int) -> None:
            tick(f"thresholds from {branch.low:.4f} to {branch.high:.4f}", scored)

        def at(threshold: float) -> tuple[PathPlan, ...]:
            """What this threshold gives; nothing where the budget does not reach so far."""
            return follow(scores, start, n_layers, threshold, math.nextafter(threshold, math.inf), commit_open_window,
                          budget, asked=asked, show=show).plans

        probed, near = _bisect(at, layers, low, high)
        path = follow(scores, start, n_layers, low, high, commit_open_window, budget,
                      wanted=lambda sizes: layers in sizes, asked=asked, near=near, show=show)
        of_size = [p for p in (*path.plans, *probed) if p.n_layers == layers]
        best = max(of_size, key=lambda p: p.final_score, default=None)
        beside = [] if best is None else [math.nextafter(best.low, -math.inf), best.high]
        neighbours = [plan for t in beside if low <= t < high for plan in at(t)]
    if best is None:
        met = sorted({p.n_layers for p in (*path.plans, *probed)}, key=lambda n: abs(n - layers))[:2]
        nearest = f" Nearest sizes met: {', '.join(map(str, sorted(met)))}." if met else ""
        why = ("" if path.complete else f" {path.evaluations} candidates were scored, then method.max_evaluations = "
               f"{budget} ended the search; raise it.")
        raise PlanError(f"no threshold in [{low:g}, {high:g}) leaves {layers} of {n_layers} layers.{nearest}{why} "
                        "Another rule or similarity reaches other sizes; method.threshold_range widens the search.")
    return Found(best, path.complete, tuple(neighbours), (*path.plans, *probed, *neighbours))


def _bisect(
    at: Callable[[float], tuple[PathPlan, ...]], layers: int, low: float, high: float
) -> tuple[list[PathPlan], float]:
    """A threshold in [low, high) that leaves `layers` layers, or nearly, and the plans met on the way.

    Layers left rise with the threshold on the whole, not strictly: a start for the search, not its answer.
    """
    met: list[PathPlan] = []
    near = (low + high) / 2
    for _ in range(PROBES):
        plans = at(near)
        met += plans
        if not plans or plans[0].n_layers == layers:
            break
        low, high = (low, near) if plans[0].n_layers > layers else (near, high)
        near = (low + high) / 2
    return met, near


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
