"""What config groups must know of each other to refuse a combination, without importing each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from slm_exp.core.types import MergePlan


class DepthMethod(Protocol):
    """What a width pruner must know of the method that removes layers."""

    @property
    def target_ratio(self) -> float | None:
        """Share of the model's parameters requested to be removed."""

    def with_ratio(self, ratio: float) -> Any:
        """The same method for another `target_ratio`."""

    def check_model(self, handle: Any) -> None:
        """Raise ConfigError where the model has no such size."""


@dataclass(frozen=True)
class Together:
    """Facts of one config that more than one group looks at; made by `pipeline.config` from the groups' members."""

    method: str
    """The method's name."""
    recovery: str
    """The recovery's name."""
    target_ratio: float | None
    """Share of the model's parameters requested by the method; None where it asks otherwise."""
    budget: str
    """The method's setting that limits operations or time; empty where none is set."""
    removes_sublayers: bool
    """Whether the method counts sublayers, not whole layers."""
    narrows: bool
    """Whether the method narrows layers by itself."""
    plan: MergePlan | None
    """The plan that is replayed (method=from_plan); None where one is searched."""
    plan_path: str
    """Where that plan came from; empty where one is searched."""
    new_hidden_size: int | None
    """What the width pruner shrinks the residual stream to; None leaves it."""
    model_dtype: str
    """As the model group says: auto, float32, bfloat16, float16."""


class SectionLog(Protocol):
    """Takes parts of the record while they come to be known."""

    def log(self, section: dict[str, Any]) -> None:
        """A part of the record, by the names of its sections."""
