"""The exact threshold path: every plan that any threshold in a range can produce, each with its exact interval.

The search compares scores with the threshold and does nothing else with it. So a candidate's score s splits the
thresholds still in question, [low, high), into those that accept it, below s, and those that do not, from s on.
Following both sides, with every score computed once, answers for all thresholds what a run answers for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from slm_exp.core.errors import PlanError
from slm_exp.core.types import Group
from slm_exp.engine.progress import ticking
from slm_exp.search.early import Bounded
from slm_exp.search.state import Candidate, SearchState


class Scores(Protocol):
    """What the path needs of a scoring engine."""

    def score(self, candidate: Candidate, /) -> float:
        """The candidate's score; computed at most once."""

    def bounded(self, candidate: Candidate, threshold: float, /) -> Bounded:
        """The same, or a bound on it that is `threshold` or less."""


Foresee = Callable[[Sequence[Candidate]], None]
"""Told which candidates will be scored next, so that what helps to do it at once can be done."""


@dataclass(frozen=True)
class Branch:
    """A state of the search that exactly the thresholds [low, high) reach."""

    state: SearchState
    low: float
    high: float


@dataclass(frozen=True)
class PathPlan:
    """What every threshold in [low, high) merges."""

    low: float
    high: float
    groups: tuple[Group, ...]
    """Highest first."""
    n_layers: int
    """Layers left."""
    final_score: float
    """The merged model against the dense one; 1 where nothing is merged."""

    def to_json(self) -> dict[str, Any]:
        return {"threshold_low": self.low, "threshold_high": self.high, "n_layers": self.n_layers,
                "groups": sorted(list(g) for g in self.groups), "final_score": self.final_score}


@dataclass(frozen=True)
class Path:
    """Plans and, where a budget ended the search or a size was out of reach, what was not followed."""

    plans: tuple[PathPlan, ...]
    """Ascending in threshold; neighbours differ."""
    unknown: tuple[tuple[float, float], ...] = ()
    """Intervals that a budget left open."""
    evaluations: int = 0
    """Candidates scored."""

    @property
    def complete(self) -> bool:
        return not self.unknown


def follow(scores: Scores, start: SearchState, n_layers: int, low: float, high: float, commit_open_window: bool = True,
           max_evaluations: int | None = None, wanted: Callable[[range], bool] | None = None,
           show: Callable[[Branch, int], None] | None = None, scored: set[Candidate] | None = None,
           only: float | None = None, foresee: Foresee | None = None, early_stop: bool = False) -> Path:
    """Every plan of the thresholds [low, high), from the highest threshold down.

    Args:
        max_evaluations: candidates that may be scored; what is left then is `unknown`.
        wanted: sees the sizes (layers left) that a branch can still reach, and says whether to follow it; those it
            refuses are left out of the plans without being `unknown`.
        scored: candidates scored before that count towards `max_evaluations`; those scored here join them.
        show: called with a branch before it is decided, and the number of candidates scored so far.
        only: follow this one threshold; its plan has the interval that decides the same.
        foresee: called with the candidates of both sides of a split before either is scored.
        early_stop: end a score as soon as every threshold of its branch is certain to reject it. Same plans.
    Cost: one score for every distinct candidate of any threshold in the range.
    """
    plans: list[PathPlan] = []
    unknown: list[tuple[float, float]] = []
    scored = set() if scored is None else scored
    todo = [Branch(start, low, high)]
    while todo:
        branch = todo.pop()
        state = branch.state
        if only is not None and not branch.low <= only < branch.high:
            continue
        if wanted is not None and not wanted(sizes(state, n_layers, commit_open_window)):
            continue
        candidate = state.candidate
        if candidate is None:
            plans.append(_leaf(scores, branch, n_layers, commit_open_window, early_stop))
            continue
        if max_evaluations is not None and candidate not in scored and len(scored) >= max_evaluations:
            unknown.append((branch.low, branch.high))
            continue
        if show:
            show(branch, len(scored))
        if foresee:
            beside = [b.state.candidate for b in todo[-1:]
                      if wanted is None or wanted(sizes(b.state, n_layers, commit_open_window))]
            room = None if max_evaluations is None else max(1, max_evaluations - len(scored))
            foresee([candidate, *(c for c in beside if c is not None)][:room])
        scored.add(candidate)
        score = scores.bounded(candidate, branch.low).most if early_stop else scores.score(candidate)
        if branch.low < score:
            todo.append(Branch(state.accept(), branch.low, min(branch.high, score)))
        if score < branch.high:
            todo.append(Branch(state.reject(), max(branch.low, score), branch.high))
    return Path(tuple(_joined(plans)), tuple(sorted(unknown)), len(scored))


def single(scores: Scores, start: SearchState, n_layers: int, low: float, high: float, threshold: float,
           commit_open_window: bool = True, max_evaluations: int | None = None,
           scored: set[Candidate] | None = None, early_stop: bool = False) -> PathPlan | None:
    """The plan of one threshold in [low, high), see `follow`; None beyond the budget."""
    plans = follow(scores, start, n_layers, low, high, commit_open_window, max_evaluations, scored=scored,
                   only=threshold, early_stop=early_stop).plans
    return plans[0] if plans else None


def sizes(state: SearchState, n_layers: int, commit_open_window: bool = True) -> range:
    """Layers left that some end of the search from here on can have; bounds, from the fewest to the most. Fewest: every
    candidate passes. Most: none does; or, where an open window is forgotten, all do."""
    committed = sum(g.stop - g.start - 1 for g in state.groups)
    window = state.high - state.low - 1  # removed once the open window is committed; 0 for a single layer
    least = most = committed + (window if commit_open_window else 0)
    if state.candidate:
        most = committed + state.high - state.floor - (0 if commit_open_window else 1)
    return range(n_layers - most, n_layers - least + 1)


def _leaf(scores: Scores, branch: Branch, n_layers: int, commit_open_window: bool, early_stop: bool) -> PathPlan:
    end = branch.state.close() if commit_open_window else branch.state
    left = n_layers - sum(g.stop - g.start - 1 for g in end.groups)
    final = 1.0
    if end.model is not None:  # it passed once: known
        final = scores.bounded(end.model, -math.inf).most if early_stop else scores.score(end.model)
    return PathPlan(branch.low, branch.high, end.groups, left, final)


def _joined(plans: Iterable[PathPlan]) -> list[PathPlan]:
    """In ascending order, neighbours of equal groups as one: different decisions can end in the same plan."""
    out: list[PathPlan] = []
    for plan in sorted(plans, key=lambda p: p.low):
        if out and out[-1].high == plan.low and out[-1].groups == plan.groups:
            plan = PathPlan(out.pop().low, plan.high, plan.groups, plan.n_layers, plan.final_score)
        out.append(plan)
    return out


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


def best_of_size(scores: Scores, start: SearchState, n_layers: int, layers: int, low: float, high: float,
                 commit_open_window: bool = True, budget: int = BUDGET, foresee: Foresee | None = None,
                 early_stop: bool = False) -> SearchResult:
    """Among the plans of thresholds [low, high) that leave `layers` layers, the one with the best final score.

    A plan's final score is no lower than its thresholds, so they are followed from the highest down. Bisection comes
    first: a budget that ends before small models are met then still has a plan of that size.
    Raises PlanError: no threshold in the range leaves that many layers (or the budget ended first); names the nearest.
    """
    scored: set[Candidate] = set()

    def at(threshold: float) -> PathPlan | None:
        return single(scores, start, n_layers, low, high, threshold, commit_open_window, budget, scored, early_stop)

    with ticking(f"search for {layers} layers", budget, "candidate") as tick:
        probed = _bisect(at, layers, low, high, lambda about: tick(about, len(scored)))
        path = follow(scores, start, n_layers, low, high, commit_open_window, budget,
                      wanted=lambda sizes: layers in sizes, scored=scored, foresee=foresee, early_stop=early_stop,
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


def _bisect(at: Callable[[float], PathPlan | None], layers: int, low: float, high: float,
            show: Callable[[str], None]) -> list[PathPlan]:
    """Plans met on the way to a threshold in [low, high) that leaves `layers` layers; the last has that size, if any.
    Layers left rise with the threshold on the whole, not strictly, so a size may be missed that the path has."""
    met: list[PathPlan] = []
    while len(met) < PROBES and low < high and (plan := at((low + high) / 2)):
        met.append(plan)
        show(f"threshold {(low + high) / 2:.4f} leaves {plan.n_layers}")
        if plan.n_layers == layers:
            break
        low, high = (low, plan.low) if plan.n_layers > layers else (plan.high, high)
    return met
