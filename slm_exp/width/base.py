"""The `width` group: narrower layers. Deciding (what is kept, a small JSON) is separate from doing (`apply_width`)."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from slm_exp.core.files import write_json
from slm_exp.core.registry import Component

if TYPE_CHECKING:
    from slm_exp.core.types import CalibrationTokens, Group, Target
    from slm_exp.methods.base import Method
    from slm_exp.models.base import ModelHandle
    from slm_exp.pipeline.config import RunConfig


@dataclass(frozen=True)
class WidthTask:
    """Everything a width pruner may look at."""

    handle: ModelHandle
    """The model to narrow: the merged one, or with order=before the dense one."""
    tokens: CalibrationTokens
    slots: tuple[Group, ...]
    """For every layer of `handle`, the dense model's layers it stands for."""
    ratio: float
    """Share of the parameters of `handle`'s decoder layers to remove."""
    seed: int = 0
    n_dense: int = field(kw_only=True)
    """Layers of the dense model: more than `slots` reach where top layers were removed."""


@dataclass(frozen=True)
class WidthDecision:
    """What to keep of each layer; `width` of plan.json. Empty where nothing is pruned."""

    data: dict[str, Any] | None = None

    def save(self, folder: Path) -> None:
        write_json(folder / "width.json", self.data)

    @classmethod
    def load(cls, folder: Path) -> WidthDecision:
        return cls(json.loads((folder / "width.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class NarrowedScore:
    """Similarity of a narrowed model to the dense one; null where states of different size have none."""

    score: float | None

    def save(self, folder: Path) -> None:
        write_json(folder / "narrowed_score.json", {"score": self.score})

    @classmethod
    def load(cls, folder: Path) -> NarrowedScore:
        return cls(json.loads((folder / "narrowed_score.json").read_text(encoding="utf-8"))["score"])


@dataclass
class Width(Component, ABC):
    """A width pruner."""

    prunes: ClassVar[bool] = True
    order: str = "after"
    """after: the merged model is narrowed. before: the dense model is narrowed, then the depth plan is searched on
    the narrower model, scores being against its own last hidden state; `final_score` is against the dense model."""

    def refuses(self, cfg: RunConfig) -> str | None:
        """Why this pruner cannot run with the rest of the config, or None. Checked before anything loads."""
        return None

    def check_model(self, handle: ModelHandle, method: Method) -> None:
        """Raise ConfigError where the dense model cannot be narrowed so. Called before weights load."""

    def check_depth(self, method: Method, dense: ModelHandle) -> None:
        """Raise ConfigError where the depth method has no such size on the model it will work on. Loads no weights."""
        method.check_model(dense)

    def depth_method(self, method: Method, dense: ModelHandle, start: ModelHandle) -> Method:
        """The depth method with its part of a shared target; `start` is the model it works on."""
        return method

    def target_of(self, method: Method, target: Target | None) -> Target | None:
        """A plan's `target`, given the depth method as the user set it and what the depth plan says."""
        return target

    def ratio_for(self, method: Method, dense: ModelHandle, handle: ModelHandle) -> float:
        """The share of `handle`'s decoder layers to remove."""
        return 0.0

    @abstractmethod
    def decide(self, task: WidthTask) -> WidthDecision:
        """Which units stay. Weights are left bit for bit as they were, also on an exception."""
