"""Leave the compressed model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slm_exp.core.registry import register
from slm_exp.recovery.base import Healed, HealTask, Recovery


@register("recovery", "none")
@dataclass
class NoRecovery(Recovery):
    """No recovery."""

    changes_weights: ClassVar[bool] = False

    def stored(self) -> bool:
        return False

    def heal(self, task: HealTask) -> Healed:
        return Healed()
