"""The threshold path against single searches, at every threshold that could differ."""

import hashlib
import itertools
import math

import pytest

from slm_exp.search.path import best_of_size, follow, sizes
from slm_exp.search.path import single as plan_at
from slm_exp.search.state import Candidate, SearchState


class Table:
    """Scores from a hash: any tree of decisions, and a count of how often each was asked for."""

    def __init__(self, seed: int, grain: int = 1000) -> None:
        self.seed, self.grain, self.computed = seed, grain, {}

    def score(self, candidate: Candidate) -> float:
        if candidate not in self.computed:
            word = hashlib.sha256(f"{self.seed}{candidate}".encode()).digest()
            self.computed[candidate] = int.from_bytes(word[:4], "big") % self.grain / self.grain
        return self.computed[candidate]


def single(table: Table, start: SearchState, threshold: float, commit: bool) -> tuple:
    """One search, decision by decision."""
    state = start
    while candidate := state.candidate:
        state = state.accept() if table.score(candidate) > threshold else state.reject()
    return (state.close() if commit else state).groups


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_it_agrees_with_a_single_search_at_every_threshold(seed, commit):
    n_layers = 5 + seed % 6
    table = Table(seed, grain=(7, 40, 1000)[seed % 3])  # coarse grains make ties
    start = SearchState.start(n_layers, protect_first=seed % 2)
    low, high = 0.2, 0.9
    path = follow(table, start, n_layers, low, high, commit)
    assert path.complete
    assert path.evaluations == len(table.computed)

    assert path.plans[0].low == low
    assert path.plans[-1].high == high
    for a, b in zip(path.plans, path.plans[1:], strict=False):
        assert a.high == b.low, "a gap or an overlap"
        assert a.groups != b.groups

    edges = {x for p in path.plans for x in (p.low, p.high)} | set(table.computed.values())
    probes = [low, *(x for e in edges for x in (e, math.nextafter(e, 0), math.nextafter(e, 1))), 0.5]
    for threshold in (x for x in probes if low <= x < high):
        (plan,) = [p for p in path.plans if p.low <= threshold < p.high]
        assert plan.groups == single(table, start, threshold, commit), threshold
        assert plan.n_layers == n_layers - sum(g.stop - g.start - 1 for g in plan.groups)


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_a_size_finds_every_plan_of_that_size_with_fewer_scores(seed, commit):
    start = SearchState.start(9)
    whole_table = Table(seed)
    whole = follow(whole_table, start, 9, 0, 1, commit)
    for size in range(1, 10):
        table = Table(seed)
        some = follow(table, start, 9, 0, 1, commit, wanted=lambda sizes, size=size: size in sizes)
        assert {p for p in some.plans if p.n_layers == size} == {p for p in whole.plans if p.n_layers == size}
        assert len(table.computed) <= len(whole_table.computed)


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_the_plan_of_one_threshold_is_the_paths(seed, commit):
    start, asked = SearchState.start(8), set()
    path = follow(Table(seed, 40), start, 8, 0.2, 0.9, commit)
    for plan in path.plans:
        for threshold in (plan.low, (plan.low + plan.high) / 2, math.nextafter(plan.high, 0)):
            found = plan_at(Table(seed, 40), start, 8, 0.2, 0.9, threshold, commit, None, asked)
            assert (found.groups, found.n_layers, found.final_score) == (plan.groups, plan.n_layers, plan.final_score)
            assert plan.low <= found.low <= threshold < found.high <= plan.high
    assert len(asked) <= path.evaluations
    assert plan_at(Table(seed, 40), start, 8, 0.2, 0.9, 0.5, commit, 3) is None


class Sliding(Table):
    """Scores that fall with the layers that are gone, as those of a real model on the whole do."""

    def score(self, candidate: Candidate) -> float:
        gone = sum(g.stop - g.start - 1 for g in candidate.groups) + candidate.high - candidate.low
        return 0.98 - 0.012 * gone + 0.02 * super().score(candidate)


@pytest.mark.parametrize("layers", [26, 22, 17])
def test_a_size_far_down_is_found_within_the_default_budget(layers):
    """From the highest threshold down, 400 candidates of a 30-layer model end long before 17 layers are left."""
    table = Sliding(0)
    start = SearchState.start(30)
    found = best_of_size(table, start, 30, layers, 0.5, 1.0)
    assert found.plan.n_layers == layers
    assert len(table.computed) <= 400
    assert {p.n_layers for p in found.met} >= {layers}
    assert found.plan.groups == single(table, start, (found.plan.low + found.plan.high) / 2, commit=True)
    assert found.plan.final_score >= found.plan.high


@pytest.mark.parametrize("commit", [True, False])
def test_the_sizes_of_a_state_bound_what_follows(commit):
    table = Table(3)
    for state in (SearchState.start(8), SearchState.start(8).accept().accept(), SearchState.start(8, 2).reject()):
        reached = {p.n_layers for p in follow(table, state, 8, 0, 1, commit).plans}
        bounds = sizes(state, 8, commit)
        assert min(reached) >= bounds.start
        assert max(reached) < bounds.stop


def test_a_budget_says_what_is_unknown_and_nothing_else_is_missing():
    start, table = SearchState.start(9), Table(1)
    whole = follow(Table(1), start, 9, 0, 1)
    part = follow(table, start, 9, 0, 1, max_evaluations=8)
    assert not part.complete
    assert len(table.computed) == part.evaluations == 8
    pieces = sorted([(p.low, p.high) for p in part.plans] + list(part.unknown))
    assert pieces[0][0] == 0
    assert pieces[-1][1] == 1
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    for plan in part.plans:
        middle = (plan.low + plan.high) / 2
        (same,) = [p for p in whole.plans if p.low <= middle < p.high]
        assert same.groups == plan.groups
