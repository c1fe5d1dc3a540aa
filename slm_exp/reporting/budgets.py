"""What a model may cost, as pictures count it, and which models no other beats by that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Something of which less is better."""

    name: str
    unit: str
    one: float
    """Of that unit."""

    @property
    def label(self) -> str:
        return f"{self.name}, {self.unit}"


BUDGETS = {"params": Budget("parameters", "M", 1e6), "flops_per_token": Budget("operations", "GFLOP a token", 1e9),
           "latency_s": Budget("latency", "ms", 1e-3), "bytes": Budget("weights file", "MB", 1e6)}
"""By their names in path.json."""


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, quality) no other beats: none costs as little and is better, or less and is as good."""
    best = -math.inf
    good: set[tuple[float, float]] = set()
    for cost in sorted({cost for cost, _ in points}):
        quality = max(q for c, q in points if c == cost)
        if quality > best:
            best = quality
            good.add((cost, quality))
    return [point in good for point in points]
