"""Leave every layer as wide as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.registry import register
from slm_exp.width.base import Width

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle
    from slm_exp.types import CalibrationTokens


@register("width", "none")
@dataclass
class NoWidth(Width):
    """No width pruning."""

    def prune(self, handle: ModelHandle, tokens: CalibrationTokens) -> ModelHandle:
        return handle
