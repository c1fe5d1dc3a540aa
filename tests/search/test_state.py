"""The search as a state machine, without a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from slm_exp.core.types import Group
from slm_exp.search.state import Candidate, SearchState


def follow(state: SearchState, verdicts: str) -> SearchState:
    for verdict in verdicts:
        assert state.candidate is not None
        state = state.accept() if verdict == "+" else state.reject()
    return state


def every_end(state: SearchState) -> Iterator[SearchState]:
    if state.candidate is None:
        yield state
    else:
        yield from every_end(state.accept())
        yield from every_end(state.reject())


def test_a_trace_worked_by_hand() -> None:
    """Eight layers. 5..6 fails; 4..5 passes, 3..5 passes, 2..5 fails: 3..5 merge; 1..2 fails, 0..1 passes."""
    state = SearchState.start(8)
    asked = []
    for verdict in "-++--+":
        candidate = state.candidate
        assert candidate is not None
        asked.append((candidate.low, candidate.high, candidate.groups))
        state = follow(state, verdict)
    merged = (Group(3, 6),)
    assert asked == [(5, 6, ()), (4, 5, ()), (3, 5, ()), (2, 5, ()), (1, 2, merged), (0, 1, merged)]
    assert state.candidate is None
    assert state.groups == merged
    assert state.open_group == Group(0, 2)
    assert state.close().groups == (Group(3, 6), Group(0, 2))
    assert state.close().close() == state.close()
    assert state.model == Candidate(3, 5, ())
    assert state.close().model == Candidate(0, 1, merged)


def test_never_similar_merges_nothing_and_always_similar_merges_one_group() -> None:
    assert follow(SearchState.start(30), "-" * 28).close().groups == ()
    end = follow(SearchState.start(30), "+" * 28)
    assert end.candidate is None
    assert end.groups == ()
    assert end.close().groups == (Group(0, 29),)


def test_protected_layers_are_never_in_a_window() -> None:
    for end in every_end(SearchState.start(9, protect_first=2, protect_last=3)):
        for group in end.close().groups:
            assert group.start >= 2
            assert group.stop <= 6


@pytest.mark.parametrize(("n_layers", "first", "last"), [(1, 0, 1), (2, 0, 1), (2, 0, 2), (5, 3, 1), (4, 0, 9)])
def test_too_few_layers_leave_nothing_to_ask(n_layers: int, first: int, last: int) -> None:
    assert SearchState.start(n_layers, first, last).candidate is None


def test_any_verdicts_give_disjoint_groups_and_no_candidate_twice() -> None:
    ends = list(every_end(SearchState.start(8)))
    assert len(ends) == len(set(ends)) == 2**6  # one verdict for each layer below the window's first top
    for end in ends:
        groups = end.close().groups
        assert all(lower.stop <= upper.start for upper, lower in itertools.pairwise(groups))
        assert all(g.stop - g.start > 1 and g.stop <= 7 for g in groups)


def test_slots_of_a_candidate_and_what_they_cost() -> None:
    candidate = Candidate(2, 3, (Group(8, 11), Group(5, 7)))
    slots = candidate.slots(12)
    assert slots == ((0, 1), (1, 2), (2, 4), (4, 5), (5, 7), (7, 8), (8, 11), (11, 12))
    assert candidate.blocks(12) == len(slots) - candidate.low
    assert Candidate(10, 11, ()).slots(12)[-1] == (10, 12)
    assert candidate.key(12) == "[0, 1, [2, 4], 4, [5, 7], 7, [8, 11], 11]"
