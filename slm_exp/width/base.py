"""The `width` group: narrower layers. Deciding (what is kept, a small JSON) is separate from doing (`apply_width`)."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

from slm_exp.core.cost import Tokens, Work
from slm_exp.core.files import write_json
from slm_exp.core.registry import Component
from slm_exp.core.together import DepthMethod, Together
from slm_exp.core.types import CalibrationTokens, Group, Target
from slm_exp.core.widths import WidthDecision
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes

M = TypeVar("M", bound=DepthMethod)


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

    @property
    def share(self) -> float | None:
        """The part of the depth method's target_ratio that is taken from width; None where no target is shared."""
        return None

    @property
    def new_hidden_size(self) -> int | None:
        """What the residual stream is narrowed to; None leaves it."""
        return None

    def refuses(self, others: Together) -> str | None:
        """Why this pruner cannot run with the rest of the config, or None. Checked before anything loads."""
        if self.prunes and others.plan is not None and others.plan.width:
            return (f"width = {self.name}: the plan in method.path has width pruning already. Leave it as it is with "
                    "width=none, or take a plan without.")
        if self.prunes and others.narrows:
            return f"width = {self.name}; expected none with method={others.method}, which narrows layers by itself."
        return None

    def needs_resident(self) -> str | None:
        return f"width={self.name} looks at and cuts whole models" if self.prunes else None

    def check_model(self, handle: ModelHandle, method: DepthMethod) -> None:
        """Raise ConfigError where the dense model cannot be narrowed so. Called before weights load."""

    def check_depth(self, method: DepthMethod, dense: ModelHandle) -> None:
        """Raise ConfigError where the depth method has no such size on the model it will work on. Loads no weights."""
        method.check_model(dense)

    def depth_method(self, method: M, dense: ModelHandle, start: ModelHandle) -> M:
        """The depth method with its part of a shared target; `start` is the model it works on."""
        return method

    def target_of(self, method: DepthMethod, target: Target | None) -> Target | None:
        """A plan's `target`, given the depth method as the user set it and what the depth plan says."""
        return target

    def ratio_for(self, method: DepthMethod, dense: ModelHandle, handle: ModelHandle) -> float:
        """The share of `handle`'s decoder layers to remove."""
        return 0.0

    def cost(self, sizes: Sizes, layers: float, tokens: Tokens) -> Work:
        """Of deciding for a model of so many layers, and of the narrowed model's score; `sizes` are the dense one's."""
        return Work()

    def layers_left(self, sizes: Sizes, target_ratio: float | None) -> int | None:
        """Layers that depth leaves of a target it shares with width; None where none is shared."""
        return None

    def params_removed(self, sizes: Sizes, layers: int, target_ratio: float | None) -> int:
        """Parameters that are removed from a model of so many layers, to within a snap to legal sizes."""
        return 0

    @abstractmethod
    def decide(self, task: WidthTask) -> WidthDecision | None:
        """Which units stay; None where nothing is pruned. Weights are left bit for bit as they were, also on an
        exception."""
