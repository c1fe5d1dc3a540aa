"""Tests of the tests: closed forms, invariances, and that chance is not called a difference."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_exp.runs.statistics.paired import bootstrap, holm, mcnemar, paired_t
from slm_exp.runs.statistics.spread import spread, student_quantile, student_two_sided

COUNTS = st.integers(0, 60)


@settings(deadline=None)
@given(COUNTS, COUNTS)
def test_mcnemar_is_the_binomial_tail(gained: int, lost: int) -> None:
    n = gained + lost
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(min(gained, lost) + 1))
    assert mcnemar(gained, lost) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-15)
    assert mcnemar(gained, lost) == mcnemar(lost, gained)


def test_mcnemar_known_values() -> None:
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1
    assert mcnemar(0, 6) == 2 / 2**6
    assert mcnemar(5100, 4900) == pytest.approx(0.0466, abs=1e-4)  # 10,000 differing documents overflow nothing


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_none_and_bonferroni(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for p, c in zip(p_values, corrected, strict=True):
        assert p <= c <= min(1.0, len(p_values) * p) + 1e-12
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert all(corrected[a] <= corrected[b] for a, b in pairwise(order))
    assert corrected[order[0]] == min(1.0, len(p_values) * p_values[order[0]])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_student_in_closed_forms() -> None:
    for t in (0.0, 0.3, 1.0, 4.0):
        assert student_two_sided(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi)
        assert student_two_sided(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert [round(student_quantile(0.975, f), 3) for f in (1, 4, 9, 30)] == [12.706, 2.776, 2.262, 2.042]  # tables
    assert student_quantile(0.5, 3) == pytest.approx(0, abs=1e-9)


def test_student_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 5, 8, 9, 29, 30):
        for t in (0.0, 0.5, 2.0, 7.0):
            assert student_two_sided(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), abs=1e-12)
    values = [0.3, -0.1, 0.25, 0.4, 0.2]
    assert paired_t(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


@settings(deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=2, max_size=9), st.integers(-50, 50))
def test_spread_moves_with_its_values(values: list[int], shift: int) -> None:
    a, b = spread(values), spread([v + shift for v in values])
    assert a.half is not None
    assert b.half == pytest.approx(a.half, abs=1e-9)
    assert b.mean == pytest.approx(a.mean + shift)
    assert (a.half == 0) == (len(set(values)) == 1)
    assert spread(values[:1]).half is None


TASKS = st.lists(st.lists(st.integers(-1, 1), min_size=2, max_size=30), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(TASKS)
def test_bootstrap_value_error_and_symmetry(tasks: list[list[int]]) -> None:
    """Its standard error is that of a mean of independent task means; turning the sides round turns the sign."""
    arrays = [np.array([task], dtype=float) for task in tasks]
    found, turned = bootstrap(arrays), bootstrap([-a for a in arrays])
    assert found.value == pytest.approx(np.mean([np.mean(t) for t in tasks]))
    expected = math.sqrt(sum(np.var(t) / len(t) for t in tasks)) / len(tasks)
    assert found.stderr == pytest.approx(expected, rel=0.06, abs=1e-12)
    assert turned.value == -found.value
    assert turned.p == pytest.approx(found.p, abs=0.02)
    assert found.p == bootstrap(arrays).p  # the same on every call
    assert found.low is not None
    assert found.high is not None
    assert found.low - 1e-12 <= found.value <= found.high + 1e-12


def test_bootstrap_agrees_with_the_normal_test_where_documents_are_many() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.78, 0.12], size=(1, 800)) for _ in range(7)]
    found = bootstrap(arrays)
    assert found.stderr
    normal = math.erfc(abs(found.value) / found.stderr / math.sqrt(2))
    assert found.p == pytest.approx(normal, abs=0.015)


def test_resampling_documents_one_by_one_gives_the_same_distribution() -> None:
    rng = np.random.default_rng(1)
    at_N = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.6, 0.3], size=40)
    slow = at_N[rng.integers(0, 40, size=(20_000, 40))].mean(axis=1)
    fast = bootstrap([at_N[None]])
    assert fast.stderr == pytest.approx(slow.std(), rel=0.02)
    assert (fast.low, fast.high) == pytest.approx(tuple(np.quantile(slow, (0.025, 0.975))), abs=0.026)  # 1/40 a step


def test_few_documents_are_no_evidence() -> None:
    """Every resample of equal differences is the same; the test may not take that for certainty."""
    assert bootstrap([np.ones((1, 1))]).p == 1
    assert bootstrap([np.ones((1, 1))]).stderr is None
    assert bootstrap([np.ones((1, 3))]).p == 0.25
    assert bootstrap([np.zeros((1, 50))]).p == 1


def test_chance_alone_is_seldom_called_a_difference() -> None:
    rng = np.random.default_rng(2)
    p_values = [bootstrap([rng.choice([-1.0, 0, 1], p=[0.1, 0.8, 0.1], size=(1, 100)) for _ in range(7)], draws=500).p
                for _ in range(200)]
    assert sum(p < 0.05 for p in p_values) <= 20  # 10 expected


def test_seeds_of_one_document_stay_together() -> None:
    """Five equal seeds are no more evidence than one."""
    rng = np.random.default_rng(3)
    one = rng.choice([-1.0, 0.0, 1.0], size=(1, 60))
    assert bootstrap([one]) == bootstrap([np.repeat(one, 5, axis=0)])


def test_numbers_are_those_of_every_machine() -> None:
    """Frozen: numpy promises RandomState's numbers never to change. If these move, tables moved."""
    at_N = np.array([[1.0] * 9 + [0.0] * 28 + [-1.0] * 3])
    found = bootstrap([at_N, at_N[:, ::2]])
    assert (found.value, found.p) == (FROZEN[0], pytest.approx(FROZEN[1], abs=1e-12))
    assert (found.low, found.high) == pytest.approx(FROZEN[2:], abs=1e-12)


FROZEN = (0.175, 0.018098190180981903, 0.0375, 0.3125)
