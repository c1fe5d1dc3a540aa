"""The `recovery` group: heal what compression broke."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.registry import Component

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle
    from slm_exp.types import CalibrationTokens


@dataclass
class Recovery(Component, ABC):
    """A recovery recipe."""

    @abstractmethod
    def heal(self, handle: ModelHandle, dense: ModelHandle, tokens: CalibrationTokens) -> ModelHandle:
        """Return a healed model; `handle` keeps its weights."""
