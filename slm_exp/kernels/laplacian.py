"""The exponential of minus the distance between two states."""

from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.kernels.base import DistanceKernel, Tensor, relative_distances


@register("kernel", "laplacian")
@dataclass
class Laplacian(DistanceKernel):
    """exp(-d / s), d the L2 distance and s = bandwidth x the minibatch's median distance.

    Of the distance itself, not its square: far states keep some weight, so outliers cost less than with rbf.
    """

    def gram(self, x_BND: Tensor) -> Tensor:
        return (-relative_distances(x_BND) / self.bandwidth).exp()
