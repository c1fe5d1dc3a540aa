"""Scores that end as soon as they are certain not to pass a threshold: hardest samples first.

A score that is the mean of N samples' similarities, none above 1, is at most (what some of them sum to + 1 for each of
the others) / N. A candidate that this bound already keeps from passing is rejected there. One that may pass runs on
all samples: its score is the committed model's, and a state that is not finite in the last sample would reject it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from slm_exp.core.types import CalibrationTokens

if TYPE_CHECKING:
    from slm_exp.core.cache.journal import Journal
    from slm_exp.engine.runner import Slot

PARTS = 5
"""In which a candidate's samples run, as equal as may be; the bound is looked at after each."""
SLACK = 1e-5
"""By which rounding may take a similarity above 1: sums are float32 or wider."""

Model = tuple[str | None, tuple["Slot", ...]]
"""The dtype it is scored in (None: the model's own), and its slots."""
Run = Callable[[list[int]], list[float]]
"""The similarities of some samples of one model."""


@dataclass(frozen=True)
class Bounded:
    """What some or all samples say of a candidate's score."""

    n: int
    """Samples there are."""
    values: Mapping[int, float]
    """Similarities of those that ran; not finite as they came."""

    @cached_property
    def score(self) -> float | None:
        """None where samples are left and nothing is certain but the bound."""
        if not all(map(math.isfinite, self.values.values())):
            return -1.0
        return math.fsum(self.values.values()) / self.n if len(self.values) == self.n else None

    @cached_property
    def most(self) -> float:
        """The score, or what it cannot exceed."""
        left = self.n - len(self.values)
        return self.score if self.score is not None else (math.fsum(self.values.values()) + left) / self.n + SLACK

    @property
    def about(self) -> float:
        """The score, or the mean of the samples that ran."""
        return self.score if self.score is not None else math.fsum(self.values.values()) / len(self.values)

    def differs(self, other: Bounded) -> float:
        """How far apart two say the mean of the samples is that both have."""
        both = self.values.keys() & other.values.keys()
        return abs(math.fsum(self.values[i] - other.values[i] for i in both)) / len(both)


class Samples:
    """Similarities of single samples, none computed twice; those of whole candidates are kept in the store.

    What runs and what is counted depends on what was requested alone, never on what the store had.
    """

    def __init__(self, tokens: CalibrationTokens, parts: int = PARTS) -> None:
        self.n = len(tokens.tokens_NT)
        self._size = math.ceil(self.n / parts)
        self.requested: dict[Model, dict[int, float]] = {}
        self._last: dict[int, float] = {}
        """What every sample scored last: hard for one candidate is hard for the next."""

    def bounded(self, model: Model, threshold: float, journal: Journal, key: str, run: Run,
                count: Callable[[float], None]) -> Bounded:
        """The score, or a bound on it that is `threshold` or less.

        Args:
            journal, key: where similarities of all samples are kept.
            count: called with the share of the samples that this takes beyond what was requested before.
        """
        kept = journal.entries.get(key)
        values = self.requested.setdefault(model, {})
        while not values or (len(values) < self.n and Bounded(self.n, values).most > threshold):
            left = sorted(set(range(self.n)) - set(values), key=lambda i: (self._last.get(i, 0.0), i))
            rows = left[: self._size]
            count(len(rows) / self.n)
            found = [kept[i] for i in rows] if kept else run(rows)
            values.update(zip(rows, found, strict=True))
            self._last.update((i, values[i] if math.isfinite(values[i]) else -1.0) for i in rows)
        out = Bounded(self.n, dict(values))
        if not kept and len(values) == self.n and all(map(math.isfinite, values.values())):
            journal.append(key, [values[i] for i in range(self.n)])
        return out
