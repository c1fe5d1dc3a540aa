"""The Gaussian of the distance between two states."""

from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.kernels.base import DistanceKernel, Tensor, relative_distances


@register("kernel", "rbf")
@dataclass
class RBF(DistanceKernel):
    """exp(-d^2 / (2 s^2)), d the L2 distance and s = bandwidth x the minibatch's median distance.

    Source: Kornblith et al. 2019, arXiv:1905.00414. A large bandwidth gives the linear kernel's picture (Alvarez
    2021, arXiv:2112.09305), a small one looks at near neighbours only and needs many of them: on SmolLM2, minibatches
    of 256 come within .007 of all 1270 tokens at once for bandwidths 0.4 to 1, within .06 at 0.2.
    """

    def gram(self, x_BND: Tensor) -> Tensor:
        return (-0.5 * (relative_distances(x_BND) / self.bandwidth).square()).exp()
