"""The `width` group: narrower layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.registry import Component

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle
    from slm_exp.types import CalibrationTokens


@dataclass
class Width(Component, ABC):
    """A width pruner."""

    @abstractmethod
    def prune(self, handle: ModelHandle, tokens: CalibrationTokens) -> ModelHandle:
        """Return a narrower model; `handle` keeps its weights."""
