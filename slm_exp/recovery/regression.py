"""Ridge regression from moments: the data is seen once, in batches, and only sums over it are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass
class Moments:
    """Sums over tokens of weighted products of inputs x and residuals r, float64.

    C inputs, D outputs, M tokens. Memory: 8 (C^2 + C D) bytes, however many tokens.
    """

    xx_CC: Tensor
    xr_CD: Tensor
    rr: float = 0.0
    tt: float = 0.0
    """Sum of weighted squares of what x is to explain, residual or not."""

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> Moments:
        import torch

        xx_CC = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        return cls(xx_CC, xx_CC.new_zeros(inputs, outputs))

    def add(self, x_MC: Tensor, r_MD: Tensor, weight_M: Tensor) -> None:
        """Count tokens in, each with a weight."""
        root_M1 = weight_M.double().sqrt().unsqueeze(1)
        x, r = x_MC.double() * root_M1, r_MD.double() * root_M1
        self.xx_CC.addmm_(x.T, x)
        self.xr_CD.addmm_(x.T, r)
        self.rr += float(r.square().sum())

    def error(self, change_CD: Tensor) -> float:
        """Sum of weighted squares of r - x change."""
        quadratic = (change_CD * (self.xx_CC @ change_CD)).sum()
        return self.rr + float(quadratic - 2 * (change_CD * self.xr_CD).sum())


def ridge_step(fit: Moments, held: Moments, ridges: list[float]) -> tuple[Tensor, float, float] | None:
    """The change [C, D] of a linear map that takes most of the residual away on tokens it was not fitted on.

    Minimises the squared residual over `fit` plus ridge x the mean diagonal of its xx x the squared change, for every
    ridge; the change is thereby pulled to zero, the map to what it was.

    Returns:
        (change, ridge, squared residual left over `held`), or None where no ridge lowers it.
    Cost: one Cholesky factor of [C, C] and one product with [C, D] for every ridge.
    """
    import torch

    best: tuple[Tensor, float, float] | None = None
    scale = float(fit.xx_CC.diagonal().mean())
    if not scale > 0:
        return None
    for ridge in ridges:
        damped_CC = fit.xx_CC.clone()
        damped_CC.diagonal().add_(ridge * scale)
        factor_CC, failed = torch.linalg.cholesky_ex(damped_CC)
        if int(failed):
            continue  # too small a ridge for inputs that nearly depend on each other
        change_CD = torch.cholesky_solve(fit.xr_CD, factor_CC)
        error = held.error(change_CD)
        if error < (held.rr if best is None else best[2]):
            best = change_CD, ridge, error
    return best
