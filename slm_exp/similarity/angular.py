from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.similarity.base import EachSample, MeanSimilarity, wide

if TYPE_CHECKING:
    from torch import Tensor


@register("similarity", "angular")
@dataclass
class Angular(MeanSimilarity):
    """1 - arccos(cos) / pi of every token's state, averaged over all tokens: 1 one direction, 1/2 a right angle.

    Falls linearly with the angle, so small changes show where the cosine is still flat: 10 degrees are .985 there
    and .944 here. One minus the angular distance of Gromov et al. 2024, arXiv:2403.17887.
    """

    def each(self, dense_NTD: Tensor) -> EachSample:
        dense, dense_zero_NT = _directions(wide(dense_NTD))

        def scores(trial_BTD: Tensor, rows: Tensor | slice) -> Tensor:
            trial, trial_zero_BT = _directions(wide(trial_BTD))
            # The angle from its chord, 2 sin(angle / 2): arccos of a float32 cosine is off by 4e-4 near 1.
            angle_BT = 2 * (trial.sub_(dense[rows]).norm(dim=-1).double() / 2).clamp(max=1).arcsin()
            return (1 - angle_BT.where(dense_zero_NT[rows] == trial_zero_BT, pi / 2) / pi).mean(-1)

        return scores


def _directions(h_NTD: Tensor) -> tuple[Tensor, Tensor]:
    """Unit states [N, T, D], a new tensor, zeros left as they are; and which ones are zeros [N, T]."""
    norm_NT = h_NTD.norm(dim=-1)
    return h_NTD / norm_NT.where(norm_NT != 0, 1)[..., None], norm_NT == 0
