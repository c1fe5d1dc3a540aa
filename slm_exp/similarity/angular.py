"""1 - arccos(cos) / pi of every token's state, averaged over all tokens: 1 one direction, 1/2 a right angle."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.kernels.base import Kernel
from slm_exp.similarity.base import Scorer, Similarity, as_score, wide

if TYPE_CHECKING:
    from torch import Tensor


@register("similarity", "angular")
@dataclass
class Angular(Similarity):
    """1 - arccos(cos) / pi of every token's state, averaged over all tokens: 1 one direction, 1/2 a right angle.

    Falls linearly with the angle, so small changes show where the cosine is still flat: 10 degrees are .985 there
    and .944 here. One minus the angular distance of Gromov et al. 2024, arXiv:2403.17887.
    """

    def against(self, dense_NTD: Tensor, kernel: Kernel) -> Scorer:
        dense, dense_zero_NT = _directions(wide(dense_NTD))

        def score(trial_NTD: Tensor) -> float:
            trial, trial_zero_NT = _directions(wide(trial_NTD))
            # The angle from its chord, 2 sin(angle / 2): arccos of a float32 cosine is off by 4e-4 near 1.
            angle_NT = 2 * (trial.sub_(dense).norm(dim=-1).double() / 2).clamp(max=1).arcsin()
            return as_score((1 - angle_NT.where(dense_zero_NT == trial_zero_NT, pi / 2) / pi).mean())

        return score


def _directions(h_NTD: Tensor) -> tuple[Tensor, Tensor]:
    """Unit states [N, T, D], a new tensor, zeros left as they are; and which ones are zeros [N, T]."""
    norm_NT = h_NTD.norm(dim=-1)
    return h_NTD / norm_NT.where(norm_NT != 0, 1)[..., None], norm_NT == 0
