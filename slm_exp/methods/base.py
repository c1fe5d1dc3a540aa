"""The `method` group: from a model, tokens and a score to a merge plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.errors import ConfigError, require
from slm_exp.registry import Component

if TYPE_CHECKING:
    from slm_exp.cache.store import StageStore
    from slm_exp.config import RunConfig
    from slm_exp.kernels.base import Kernel
    from slm_exp.merging.rules.base import MergeRule
    from slm_exp.models.base import ModelHandle
    from slm_exp.similarity.base import Similarity
    from slm_exp.types import CalibrationTokens, LayerSimilarity, MergePlan


@dataclass(frozen=True)
class PlanTask:
    """Everything a method may look at."""

    handle: ModelHandle
    tokens: CalibrationTokens
    similarity: Similarity
    kernel: Kernel
    rule: MergeRule
    layer_similarity: LayerSimilarity | None
    store: StageStore
    seed: int = 0


@dataclass
class Method(Component, ABC):
    """How the size is asked for; at most one of the three, none set means the method's own default."""

    uses_layer_similarity: ClassVar[bool] = False
    """Whether the plan depends on the layer similarity matrix (and so on the kernel)."""

    threshold: float | None = None
    """Accept a merge while the score stays above this."""
    target_layers: int | None = None
    """Layers to be left."""
    target_ratio: float | None = None
    """Share of parameters to remove."""

    def check(self) -> None:
        asked = {
            f"method.{name}": value
            for name in ("threshold", "target_layers", "target_ratio")
            if (value := getattr(self, name)) is not None
        }
        if len(asked) > 1:
            raise ConfigError(
                "set at most one of method.threshold, method.target_layers, method.target_ratio; got "
                + ", ".join(f"{k} = {v}" for k, v in asked.items())
                + ". Reset one with, e.g., method.threshold=null."
            )
        if self.threshold is not None:
            require(-1 <= self.threshold <= 1, "method.threshold", self.threshold, "a score in [-1, 1]",
                    "Scores are similarities to the dense model, 1 is identical: try 0.9.")
        if self.target_layers is not None:
            require(self.target_layers >= 1, "method.target_layers", self.target_layers, "a whole number >= 1")
        if self.target_ratio is not None:
            require(0 < self.target_ratio < 1, "method.target_ratio", self.target_ratio,
                    "a share of the parameters in (0, 1)", "0.1 removes a tenth.")

    def refuses(self, cfg: RunConfig) -> str | None:
        """Why this method cannot run with the rest of the config, or None. Checked before anything loads."""
        return None

    def check_model(self, handle: ModelHandle) -> None:
        """Raise ConfigError where this model has no such size. Called before weights load; may not load them."""

    @abstractmethod
    def plan(self, task: PlanTask) -> MergePlan:
        """Decide. Weights are left bit for bit as they were, also on an exception."""
