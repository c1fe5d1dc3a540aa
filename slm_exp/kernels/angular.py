"""One minus the angle between two states, in half turns."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

from slm_exp.core.registry import register
from slm_exp.kernels.base import Kernel, Tensor, unit_rows


@register("kernel", "angular")
@dataclass
class Angular(Kernel):
    """1 - arccos(cos(x, y)) / pi: 1 for one direction, 1/2 at right angles (a state of zeros with any), 0 opposite.

    Positive semi-definite: half of one plus the expected product of the signs of x and y on a random axis.
    Separates near directions better than the cosine, whose slope vanishes there.
    """

    def gram(self, x_BND: Tensor) -> Tensor:
        unit = unit_rows(x_BND.double())  # arccos turns float32's rounding at 1 into angles of 4e-4
        cosine = (unit @ unit.mT).clamp(-1, 1)  # beyond +-1 by rounding only
        return (1 - cosine.arccos() / pi).to(x_BND.dtype)
