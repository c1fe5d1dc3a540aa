"""Sliding layer merging carried through: the search at a threshold, or for a size, and the plan it ends in."""

from __future__ import annotations

from dataclasses import replace

from slm_exp.core.types import MergePlan, Neighbour, Target, Trial
from slm_exp.search.cost import sizes
from slm_exp.search.path import best_of_size
from slm_exp.search.refit import note
from slm_exp.search.scoring import ScoringEngine
from slm_exp.search.state import SearchState
from slm_exp.search.task import PlanTask
from slm_exp.search.threshold import search


def slide(task: PlanTask, start: SearchState, threshold: float, size: Target | None,
          threshold_range: tuple[float, float], budget: int, commit_open_window: bool,
          screen_dtype: str | None) -> MergePlan:
    """The plan that the search from a state ends in.

    Args:
        threshold: decides where no size is requested.
        size: requested; `layers` are to be left, by a threshold in `threshold_range`, after at most `budget` scores.
    Cost: L block forwards for the dense model, then 1 + the layers above the window per candidate.
    """
    n_layers = task.handle.n_layers
    engine = ScoringEngine(task, top=start.high)
    if size is not None:
        assert size.layers is not None
        low, high = threshold_range
        best = best_of_size(engine, start, n_layers, size.layers, low, high, commit_open_window, budget)
        threshold = (best.plan.low + best.plan.high) / 2
        size = replace(size, complete=best.complete, threshold=(best.plan.low, best.plan.high),
                       neighbours=tuple(Neighbour(p.low, p.n_layers, p.final_score) for p in best.neighbours),
                       sizes=sizes(task.handle, task.rule, best.met, int(task.tokens.tokens_NT.shape[1])))
        screen_dtype = None  # the path's scores are exact and known
    steps = search(engine, start, threshold, screen_dtype)
    end = steps[-1].next if steps else start
    notes: tuple[str, ...] = ()
    if window := end.open_group:
        about = f"layers {window.start}..{window.stop - 1} had passed when the search reached the bottom"
        if commit_open_window:
            end = end.close()
            notes = (f"{about}: merged; the released code would leave them (method.commit_open_window=false).",)
        else:
            notes = (f"{about}: left as they are, as the released code does.",)
    final = 1.0 if end.model is None else engine.score(end.model)  # known already, unless it was screened
    return MergePlan(
        n_layers=n_layers, groups=end.groups, rule=task.rule.name, similarity=task.similarity.name, threshold=threshold,
        target=size, final_score=final,
        trace=tuple(Trial(s.state.low, s.state.high, s.score, s.accepted) for s in steps),
        evaluations=engine.evaluations, block_forwards=engine.block_forwards, notes=(*notes, *note(task)),
    )
