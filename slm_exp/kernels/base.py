"""The `kernel` group: a Gram matrix over token states.

What a kernel ignores decides what CKA ignores. All ignore rotations and one common scale of the states; linear, rbf
and laplacian also a shift of all states; cosine and angular also the length of every state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_exp.core.registry import Component

if TYPE_CHECKING:
    from torch import Tensor as Tensor
else:
    Tensor = Any  # torch loads with the first Gram matrix


@dataclass
class Kernel(Component, ABC):
    """k(x, y) over rows of a matrix of token states."""

    @abstractmethod
    def gram(self, x_BND: Tensor) -> Tensor:
        """All pairs of rows: [..., N, D] float32 or wider -> [..., N, N], symmetric. Leading axes are batches.

        Positive semi-definite, finite for finite states (rows of zeros and equal rows included), of the dtype of
        `x_BND`. Needs N >= 2. Cost: O(N^2 D) time, O(N^2) memory.
        """

    def over(self, x_ND: Tensor) -> Kernel:
        """The kernel for minibatches of these rows; override where the whole set fixes something, e.g. a scale."""
        return self


@dataclass
class DistanceKernel(Kernel):
    """A kernel of the L2 distance in units of bandwidth x the minibatch's median distance."""

    bandwidth: float = 1.0
    """In units of the median distance; > 0. 1 is the median heuristic; 0.2 to 0.8 are in use too (rbf)."""

    def check(self) -> None:
        self.positive("bandwidth", remedy="It is in units of the median distance: try 1.")


def relative_distances(x_BND: Tensor) -> Tensor:
    """L2 distance of every pair of rows, in units of the median over the pairs: [..., N, D] -> [..., N, N].

    The median is taken over each minibatch and leaves the diagonal out; for an even number of pairs it is the mean
    of the middle two. Where more than half of the pairs coincide it is zero and the mean distance takes its place,
    so that the unit still follows the scale of the states; where all rows coincide all distances are zero.

    Computed in float64, because |x|^2 + |y|^2 - 2 x.y of two near rows cancels; returned in the dtype of `x_BND`.
    """
    import torch

    x = x_BND.double()
    square = x.square().sum(-1)
    scale = square.unsqueeze(-1) + square.unsqueeze(-2)
    distance_sq = scale - 2 * x @ x.mT
    # Below this a difference is rounding (of float32 states as well): equal rows are at distance zero exactly.
    distance = distance_sq.where(distance_sq > 1e-14 * scale, 0).sqrt()
    i, j = torch.triu_indices(x.shape[-2], x.shape[-2], 1, device=x.device)
    pairs = distance[..., i, j]
    unit = (pairs.median(-1).values - (-pairs).median(-1).values) / 2  # torch's median is the lower of the middle two
    unit = unit.where(unit > 0, pairs.mean(-1))
    unit = unit.where(unit > 0, 1)
    return (distance / unit[..., None, None]).to(x_BND.dtype)


def unit_rows(x_BND: Tensor) -> Tensor:
    """Every row divided by its L2 norm; rows of zeros stay zero. [..., N, D] -> [..., N, D]."""
    norm = x_BND.norm(dim=-1, keepdim=True)
    return x_BND / norm.where(norm > 0, 1)
