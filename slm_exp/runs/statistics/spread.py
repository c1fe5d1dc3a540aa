"""Mean and interval over seeds, by Student's distribution in closed form (whole degrees of freedom)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Spread(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Spread(mean, student_quantile(0.975, n - 1) * deviation / math.sqrt(n), deviation, n)


def student_two_sided(t: float, freedom: int) -> float:
    """Probability that Student's t lies further from 0 than `t` >= 0.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    inside = (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
    return max(0.0, 1 - inside)


def student_quantile(share: float, freedom: int) -> float:
    """The value below which `share` of Student's distribution lies, for share in [0.5, 1)."""
    low, high = 0.0, 1.0
    while 1 - student_two_sided(high, freedom) / 2 < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - student_two_sided(middle, freedom) / 2 < share else (low, middle)
    return (low + high) / 2
