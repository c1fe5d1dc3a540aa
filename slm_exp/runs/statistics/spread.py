"""Mean and interval over seeds, by Student's distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from slm_exp.runs.statistics.scores import standard_error


class Spread(NamedTuple):
    """Values of runs that differ in their seed alone."""

    mean: float
    half: float | None
    """Half the width of the 95 % interval of the mean; None for one value."""


def spread(values: Sequence[float]) -> Spread:
    """Mean and 95 % interval of at least one value."""
    stderr = standard_error(values)
    half = None if stderr is None else student_quantile(0.975, len(values) - 1) * stderr
    return Spread(math.fsum(values) / len(values), half)


def student_two_sided(t: float, freedom: int) -> float:
    """Probability that Student's t lies further from 0 than `t` >= 0."""
    from scipy.special import stdtr  # a fifth of a second, which tables without seeds do not need

    return float(2 * stdtr(freedom, -t))


def student_quantile(share: float, freedom: int) -> float:
    """The value below which `share` of Student's distribution lies."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))
