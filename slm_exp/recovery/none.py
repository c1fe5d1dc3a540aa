"""Leave the compressed model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.recovery.base import Recovery
from slm_exp.registry import register

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle
    from slm_exp.types import CalibrationTokens


@register("recovery", "none")
@dataclass
class NoRecovery(Recovery):
    """No recovery."""

    def heal(self, handle: ModelHandle, dense: ModelHandle, tokens: CalibrationTokens) -> ModelHandle:
        return handle
