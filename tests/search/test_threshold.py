"""The screen's bookkeeping: when a cheap score decides, when it is repeated, when the search goes back."""

from __future__ import annotations

import random

import pytest

from slm_exp.search.state import Candidate, SearchState
from slm_exp.search.threshold import SAFETY, search


class TwoScores:
    """Exact scores at random, cheap ones with an error."""

    def __init__(self, seed: int, error: float, spread: float = 0.2) -> None:
        self.seed, self.error, self.spread = seed, error, spread
        self.n_layers = 20
        self.asked: list[tuple[Candidate, str | None]] = []

    def score(self, candidate: Candidate, dtype: str | None = None) -> float:
        assert (candidate, dtype) not in self.asked or dtype is None
        self.asked.append((candidate, dtype))
        draw = random.Random(f"{self.seed}{candidate}")
        exact = 0.5 + self.spread * draw.uniform(-1, 1)
        return exact if dtype is None else exact + self.error * draw.choice((-1, 1)) * draw.uniform(0.5, 1)


@pytest.mark.parametrize("seed", range(40))
def test_an_error_within_the_margin_changes_no_decision(seed: int) -> None:
    """Errors spread by a factor of two, the margin is four times the largest seen."""
    error = 10 ** -random.Random(seed).uniform(1, 4)
    scorer, start = TwoScores(seed, error), SearchState.start(20)
    exact, screened = search(scorer, start, 0.5), search(scorer, start, 0.5, "cheap")
    assert [(s.state, s.accepted) for s in screened] == [(s.state, s.accepted) for s in exact]
    for step in screened:
        if step.screened:
            assert abs(step.score - 0.5) > SAFETY * error * 0.5


def test_what_is_far_from_the_threshold_is_not_repeated() -> None:
    scorer = TwoScores(0, 1e-6, spread=0.09)
    steps = search(scorer, SearchState.start(20), 0.5, "cheap")
    repeated = [c for c, dtype in scorer.asked if dtype is None]
    # only the measurements at every doubling of depth
    assert [c.blocks(20) for c in repeated] == [2, 4, 8, 16][: len(repeated)]
    assert 2 <= len(repeated) < len(steps) / 2


def test_errors_are_measured_only_where_they_could_decide() -> None:
    """Scores far from the threshold have errors of their own, which would only widen the margin."""
    scorer = TwoScores(0, 1e-2)
    steps = search(scorer, SearchState.start(20), 0.9, "cheap")
    assert all(step.screened for step in steps)
    assert all(dtype == "cheap" for _, dtype in scorer.asked)


def test_a_margin_that_widens_repeats_earlier_decisions_and_goes_back() -> None:
    """The second decision is wrong and looks safe; the error that shows at depth 4 sends the search back to it."""

    class Scripted:
        n_layers = 8

        def score(self, candidate: Candidate, dtype: str | None = None) -> float:
            error = 0.0 if candidate.blocks(8) < 3 else 0.02
            exact = 0.53 if (candidate.low, candidate.high) == (4, 5) else 0.3
            # at 4..5 the cheap score is wrong by more than any error measured until then
            cheap = 0.46 if (candidate.low, candidate.high) == (4, 5) else exact + error
            return exact if dtype is None else cheap

    start = SearchState.start(8)
    steps = search(Scripted(), start, 0.5, "cheap")  # type: ignore[arg-type]
    assert steps[1].state.candidate == Candidate(4, 5, ())
    assert steps[1].accepted
    assert not steps[1].screened
    assert steps[-1].next.close().groups[0] == (4, 6)
    assert [s.next for s in steps[:-1]] == [s.state for s in steps[1:]]
