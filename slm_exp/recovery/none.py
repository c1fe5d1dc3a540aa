from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slm_exp.core.cost import Work
from slm_exp.core.registry import register
from slm_exp.models.sizes import Sizes
from slm_exp.recovery.base import Recovery, RecoveryResult, RecoveryTask


@register("recovery", "none")
@dataclass
class NoRecovery(Recovery):
    """No recovery."""

    changes_weights: ClassVar[bool] = False
    streams: ClassVar[bool] = True

    def stored(self) -> bool:
        return False

    def cost(self, sizes: Sizes, layers: float) -> tuple[Work, list[str]]:
        return Work(), []

    def recover(self, task: RecoveryTask) -> RecoveryResult:
        return RecoveryResult()
