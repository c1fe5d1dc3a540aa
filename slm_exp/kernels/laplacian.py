"""The exponential of minus the distance between two states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.kernels.base import Kernel, relative_distances

if TYPE_CHECKING:
    from torch import Tensor


@register("kernel", "laplacian")
@dataclass
class Laplacian(Kernel):
    """exp(-d / s), d the L2 distance and s = bandwidth x the minibatch's median distance.

    Of the distance itself, not its square: far states keep some weight, so outliers cost less than with rbf.
    """

    bandwidth: float = 1.0
    """In units of the median distance; > 0. 1 is the median heuristic."""

    def check(self) -> None:
        require(self.bandwidth > 0, "kernel.bandwidth", self.bandwidth, "a number > 0",
                "It is in units of the median distance: try 1.")

    def gram(self, x_BND: Tensor) -> Tensor:
        return (-relative_distances(x_BND) / self.bandwidth).exp()
