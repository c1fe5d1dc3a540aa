"""The search at one threshold (score, compare, go on; a low-precision screen gives most scores), and sliding layer
merging carried through: that search, or the one for a size, and the plan it ends in."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

from slm_exp.core.runtime import has_bfloat16
from slm_exp.core.types import MergePlan, Neighbour, Target, Trial
from slm_exp.engine.progress import ticking
from slm_exp.search.cost import sizes
from slm_exp.search.early import Bounded
from slm_exp.search.path import best_of_size
from slm_exp.search.refit import note
from slm_exp.search.scoring import ScoringEngine
from slm_exp.search.state import SearchState
from slm_exp.search.task import PlanTask

log = logging.getLogger(__name__)

SAFETY = 4.0
"""The margin of a screen in units of the largest error measured."""
TIE = 1e-4
"""A score put together from parts of the samples that is this near the threshold is computed in one piece: batches of
other shapes round otherwise."""
NEAR = 0.1
"""Errors are measured on candidates this near the threshold: those much less similar have larger ones, which decide
nothing. No error may reach this; those of bfloat16 are a hundredth of it."""


@dataclass(frozen=True)
class Step:
    """One decision: the state it was made in, the score it was made on, and whether that score was screened."""

    state: SearchState
    score: float
    """Where it ended early, what the score cannot exceed."""
    accepted: bool
    screened: bool = False
    samples: Bounded | None = None
    """What the decision was made on, where it may end early."""

    @property
    def ended_early(self) -> bool:
        return self.samples is not None and self.samples.score is None

    @property
    def trial(self) -> Trial:
        if self.ended_early:
            return Trial(self.state.low, self.state.high, None, self.accepted, self.score)
        return Trial(self.state.low, self.state.high, self.score, self.accepted)

    @property
    def next(self) -> SearchState:
        return self.state.accept() if self.accepted else self.state.reject()

    def __str__(self) -> str:
        groups = " ".join(f"{g.start}..{g.stop - 1}" for g in self.next.close().groups) or "none"
        score = f"at most {self.score:.4f}" if self.ended_early else f"{self.score:.4f}"
        return f"layers {self.state.low}..{self.state.high} score {score}, merged {groups}"


@dataclass
class Screen:
    """What is known about the error of a cheaper dtype: the largest difference where both scores are known."""

    engine: ScoringEngine
    threshold: float
    dtype: str | None
    """None: there is no screen, every score is exact."""
    early_stop: bool = False
    error: float = 0.0
    depth: int = 0
    """Blocks of the deepest candidate measured."""

    @property
    def margin(self) -> float:
        """A screened score this near the threshold decides nothing."""
        return SAFETY * self.error

    def exact(self, step: Step) -> Step:
        """The same decision on the exact score; the difference is a measurement."""
        exact = self._scored(step.state, None)
        error = abs(exact.score - step.score)
        if step.samples and exact.samples:
            error = step.samples.differs(exact.samples)
        self.error = max(self.error, error)
        return exact

    def decide(self, state: SearchState) -> Step:
        """A decision on the screened score where that is safe, else on the exact one. Rounding errors grow with the
        layers they pass through, so the first candidate NEAR the threshold at every doubling of depth is scored in both
        dtypes, however safe it looks."""
        step = self._scored(state, self.dtype)
        assert state.candidate is not None
        blocks = state.candidate.blocks(self.engine.n_layers)
        about = step.samples.about if step.samples else step.score
        measure = step.screened and blocks >= 2 * self.depth and abs(about - self.threshold) < NEAR
        if measure:
            self.depth = blocks
        return self.exact(step) if measure or self.unsafe(step) else step

    def _scored(self, state: SearchState, dtype: str | None) -> Step:
        assert state.candidate is not None
        samples = None
        if self.early_stop:
            limit = self.threshold if dtype is None else math.nextafter(self.threshold - self.margin, -math.inf)
            samples = self.engine.bounded(state.candidate, limit, dtype)
        tie = samples and dtype is None and samples.score is not None and abs(samples.score - self.threshold) < TIE
        score = samples.most if samples and not tie else self.engine.score(state.candidate, dtype)
        return Step(state, score, score > self.threshold, dtype is not None, samples)

    def unsafe(self, step: Step) -> bool:
        return step.screened and not abs(step.score - self.threshold) > self.margin


def search(engine: ScoringEngine, start: SearchState, threshold: float, screen_dtype: str | None = None,
           early_stop: bool = False) -> list[Step]:
    """Every decision of the search from `start`, on scores in the model's own dtype, or a screen's where that is safe;
    with `early_stop` on bounds where those are enough (search/early.py).

    A screened score within a margin of the threshold is computed again in the model's own dtype. The margin is
    SAFETY times the largest difference measured so far; when a later measurement widens it, earlier decisions that
    are no longer safe are repeated too, and where one turns out differently the search goes back to it.
    """
    screen = Screen(engine, threshold, screen_dtype, early_stop)
    steps: list[Step] = []
    what = f"search at {threshold:g}" + (f", screened in {screen_dtype}" if screen_dtype else "")
    with ticking(what, max(0, start.low - start.floor + 1), "layer") as tick:
        state = start
        while state.candidate:
            steps.append(screen.decide(state))
            for i, step in enumerate(steps):
                if screen.unsafe(step):
                    steps[i] = screen.exact(step)
                    if steps[i].accepted != step.accepted:
                        del steps[i + 1 :]
                        break
            state = steps[-1].next
            tick(str(steps[-1]), start.low - state.low)
    if screen_dtype:
        log.info("%s scores differed by at most %.1e from exact ones; those within %.1e of the threshold were "
                 "repeated.", screen_dtype, screen.error, screen.margin)
    return steps


def slide(task: PlanTask, start: SearchState, threshold: float, size: Target | None,
          threshold_range: tuple[float, float], budget: int, commit_open_window: bool,
          screen_dtype: str | None, early_stop: bool = False) -> MergePlan:
    """The plan that the search from a state ends in.

    Args:
        threshold: decides where no size is requested.
        early_stop: a candidate ends as soon as it is certain to be rejected.
        size: requested; `layers` are to be left, by a threshold in `threshold_range`, after at most `budget` scores.
    Cost: L block forwards for the dense model, then 1 + the layers above the window per candidate.
    """
    n_layers = task.handle.n_layers
    engine = ScoringEngine(task, top=start.high)
    if size is not None:
        assert size.layers is not None
        low, high = threshold_range
        best = best_of_size(engine, start, n_layers, size.layers, low, high, commit_open_window, budget,
                            engine.foresee, early_stop)
        threshold = (best.plan.low + best.plan.high) / 2
        size = replace(size, complete=best.complete, threshold=(best.plan.low, best.plan.high),
                       neighbours=tuple(Neighbour(p.low, p.n_layers, p.final_score) for p in best.neighbours),
                       sizes=sizes(task.handle, task.rule, best.met, int(task.tokens.tokens_NT.shape[1])))
        screen_dtype = None  # the path's scores are exact and known
    if screen_dtype and not has_bfloat16(task.handle.device):
        log.warning("method.screen_dtype = %s: the %s has no instructions for it, so it would be slower; every score "
                    "is in the model's own dtype.", screen_dtype, task.handle.device.type)
        screen_dtype = None
    steps = search(engine, start, threshold, screen_dtype, early_stop)
    end = steps[-1].next if steps else start
    notes: tuple[str, ...] = ()
    if window := end.open_group:
        about = f"layers {window.start}..{window.stop - 1} had passed when the search reached the bottom"
        if commit_open_window:
            end = end.close()
            notes = (f"{about}: merged; the released code would leave them (method.commit_open_window=false).",)
        else:
            notes = (f"{about}: left as they are, as the released code does.",)
    final = 1.0
    if end.model is not None:  # known already, unless it was screened
        final = engine.bounded(end.model, -math.inf).most if early_stop else engine.score(end.model)
    return task.with_fitted(MergePlan(
        n_layers, end.groups, rule=task.rule.name, similarity=task.similarity.name, threshold=threshold, target=size,
        final_score=final, trace=tuple(step.trial for step in steps), evaluations=engine.evaluations,
        block_forwards=engine.block_forwards, notes=(*notes, *note(task))))
