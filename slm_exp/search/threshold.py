"""The search at one threshold: score, compare, go on. A low-precision screen gives most scores."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from slm_exp.engine.progress import ticking
from slm_exp.search.scoring import ScoringEngine
from slm_exp.search.state import SearchState

log = logging.getLogger(__name__)

SAFETY = 4.0
"""The margin of a screen in units of the largest error measured."""
NEAR = 0.1
"""Errors are measured on candidates this near the threshold: those much less similar have larger ones, which decide
nothing. No error may reach this; those of bfloat16 are a hundredth of it."""


@dataclass(frozen=True)
class Step:
    """One decision: the state it was made in, the score it was made on, and whether that score was screened."""

    state: SearchState
    score: float
    accepted: bool
    screened: bool = False

    @property
    def next(self) -> SearchState:
        return self.state.accept() if self.accepted else self.state.reject()

    def __str__(self) -> str:
        groups = " ".join(f"{g.start}..{g.stop - 1}" for g in self.next.close().groups) or "none"
        return f"layers {self.state.low}..{self.state.high} score {self.score:.4f}, merged {groups}"


@dataclass
class Screen:
    """What is known about the error of a cheaper dtype: the largest difference where both scores are known."""

    engine: ScoringEngine
    threshold: float
    dtype: str | None
    """None: there is no screen, every score is exact."""
    error: float = 0.0
    depth: int = 0
    """Blocks of the deepest candidate measured."""

    @property
    def margin(self) -> float:
        """A screened score this near the threshold decides nothing."""
        return SAFETY * self.error

    def exact(self, step: Step) -> Step:
        """The same decision on the exact score; the difference is a measurement."""
        assert step.state.candidate is not None
        score = self.engine.score(step.state.candidate)
        self.error = max(self.error, abs(score - step.score))
        return replace(step, score=score, accepted=score > self.threshold, screened=False)

    def decide(self, state: SearchState) -> Step:
        """A decision on the screened score where that is safe, else on the exact one. Rounding errors grow with the
        layers they pass through, so the first candidate NEAR the threshold at every doubling of depth is scored in both
        dtypes, however safe it looks."""
        assert state.candidate is not None
        score = self.engine.score(state.candidate, self.dtype)
        step = Step(state, score, score > self.threshold, screened=self.dtype is not None)
        blocks = state.candidate.blocks(self.engine.n_layers)
        measure = step.screened and blocks >= 2 * self.depth and abs(score - self.threshold) < NEAR
        if measure:
            self.depth = blocks
        return self.exact(step) if measure or self.unsafe(step) else step

    def unsafe(self, step: Step) -> bool:
        return step.screened and not abs(step.score - self.threshold) > self.margin


def search(engine: ScoringEngine, start: SearchState, threshold: float, screen_dtype: str | None = None) -> list[Step]:
    """Every decision of the search from `start`, on scores in the model's own dtype, or a screen's where that is safe.

    A screened score within a margin of the threshold is computed again in the model's own dtype. The margin is
    SAFETY times the largest difference measured so far; when a later measurement widens it, earlier decisions that
    are no longer safe are repeated too, and where one turns out differently the search goes back to it.
    """
    screen = Screen(engine, threshold, screen_dtype)
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
