"""A power of the inner product of two states."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.kernels.base import Kernel, Tensor


@register("kernel", "polynomial")
@dataclass
class Polynomial(Kernel):
    """(gamma x.y / m + coef)^degree, m the mean squared norm of all rows.

    Dividing by m keeps the power in range and makes gamma and coef mean the same in every layer, so one common
    scale of the states changes nothing. A shift does: unlike the linear kernel, this one sees the mean state.
    m is that of the whole set, not of a minibatch: on SmolLM2, where the first layers have a few tokens of 12 times
    the median norm, one m per minibatch of 256 is up to .052 off all 1270 tokens at once, one m for all .015.
    """

    _mean_sq = None  # type: Tensor | None

    degree: int = 2
    """Power; a whole number >= 1. 1 is the linear kernel."""
    gamma: float = 1.0
    """Weight of the inner product; > 0."""
    coef: float = 1.0
    """Constant; >= 0. At 0 only the highest power counts."""

    def check(self) -> None:
        self.at_least(1, "degree")
        self.positive("gamma")
        self.at_least(0, "coef", remedy="A negative constant makes the kernel indefinite.")

    def over(self, x_ND: Tensor) -> Polynomial:
        fixed = copy(self)
        fixed._mean_sq = x_ND.double().square().sum(-1).mean()
        return fixed

    def gram(self, x_BND: Tensor) -> Tensor:
        dot = x_BND @ x_BND.mT
        m = self._mean_sq
        if m is None:
            m = dot.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        return (self.gamma * dot / m.where(m > 0, 1).to(dot.dtype) + self.coef) ** self.degree
