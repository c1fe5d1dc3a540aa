"""The cosine of two states: linear, with every state given the same weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.kernels.base import Kernel, unit_rows

if TYPE_CHECKING:
    from torch import Tensor


@register("kernel", "cosine")
@dataclass
class Cosine(Kernel):
    """x.y / (|x| |y|); a state of zeros has cosine 0 with every state."""

    def gram(self, x_BND: Tensor) -> Tensor:
        unit = unit_rows(x_BND)
        return unit @ unit.mT
