"""The cosine of two states: linear, with every state given the same weight."""

from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.kernels.base import Kernel, Tensor, unit_rows


@register("kernel", "cosine")
@dataclass
class Cosine(Kernel):
    """x.y / (|x| |y|); a state of zeros has cosine 0 with every state."""

    def gram(self, x_BND: Tensor) -> Tensor:
        unit = unit_rows(x_BND)
        return unit @ unit.mT
