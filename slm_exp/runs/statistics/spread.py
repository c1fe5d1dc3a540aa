"""Mean and interval over seeds, by Student's distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slm_exp.runs.statistics.scores import standard_error


@dataclass(frozen=True)
class Spread:
    """Values of runs that differ in their seed alone."""

    mean: float
    half: float | None
    """Half the width of the 95 % interval of the mean; None for one value."""
    deviation: float | None
    """Standard deviation between seeds; None for one value."""
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean, 95 % interval and standard deviation of at least one value."""
    n, mean, stderr = len(values), math.fsum(values) / len(values), standard_error(values)
    if stderr is None:
        return Spread(mean, None, None, n)
    return Spread(mean, student_quantile(0.975, n - 1) * stderr, stderr * math.sqrt(n), n)


def student_two_sided(t: float, freedom: int) -> float:
    """Probability that Student's t lies further from 0 than `t` >= 0."""
    from scipy.special import stdtr  # a fifth of a second, which tables without seeds do not need

    return float(2 * stdtr(freedom, -t))


def student_quantile(share: float, freedom: int) -> float:
    """The value below which `share` of Student's distribution lies."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))
