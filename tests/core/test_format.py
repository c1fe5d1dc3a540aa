"""Rounding that follows the error."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_exp.core.format import decimals, duration, rounded, with_error


@pytest.mark.parametrize(("value", "error", "text"), [
    (25.0, 9.68, "25 ± 10"), (40.714, 3.46, "40.7 ± 3.5"), (45.24, 0.52, "45.2 ± 0.5"), (60, 11.2, "60 ± 11"),
    (-5.0, 8.8, "-5 ± 9"), (12340, 355, "12300 ± 400"), (2.1534, 0.0412, "2.15 ± 0.04"), (-0.04, 0.5, "0.0 ± 0.5"),
    (27.0, 0.0, "27.0 ± 0.0"), (1.802, 2e-16, "1.8 ± 0.0"), (57.31, None, "57.3"), (1.0, math.inf, "1.0")])  # fmt: skip
def test_a_value_is_as_precise_as_its_error(value: float, error: float | None, text: str) -> None:
    assert with_error(value, error) == text


def test_signs() -> None:
    assert [with_error(v, 0.5, sign=True) for v in (1.0, -1.0, 0.04)] == ["+1.0 ± 0.5", "-1.0 ± 0.5", "0.0 ± 0.5"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_what_is_dropped_is_a_fraction_of_the_error(value: float, error: float) -> None:
    digits = decimals(error)
    assert abs(float(rounded(value, digits)) - value) <= 0.15 * error * (1 + 1e-9) + 1e-9
    assert abs(float(rounded(error, digits)) - error) <= 0.15 * error * (1 + 1e-9)
    significant = rounded(error, digits).lstrip("0.").rstrip("0").replace(".", "")
    assert len(significant) <= 2


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 8, 59.4, 158.5, 3600, None)] == [
        "0.40 s", "8.0 s", "59 s", "2 min 38 s", "1 h 0 min", "–"]
