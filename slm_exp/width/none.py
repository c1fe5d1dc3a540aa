from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slm_exp.core.errors import require
from slm_exp.core.registry import Fields, register
from slm_exp.width.base import Width, WidthTask


@register("width", "none")
@dataclass
class NoWidth(Width):
    """No width pruning."""

    prunes: ClassVar[bool] = False

    def check(self) -> None:
        require(self.order == "after", "width.order", self.order, "after with width=none", "For example width=flap.")

    def identity(self) -> Fields:
        return {"name": self.name}  # nothing to order

    def decide(self, task: WidthTask) -> None:
        return None
