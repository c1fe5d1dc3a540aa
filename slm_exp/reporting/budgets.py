"""What a model may cost, as pictures count it."""

from __future__ import annotations

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
