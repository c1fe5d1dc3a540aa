"""Acceptance scores by the direction of states: cosines and angles."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.registry import register
from slm_exp.kernels.base import Kernel
from slm_exp.similarity.base import Scorer, Similarity, as_score, cosines, token_dots, wide

if TYPE_CHECKING:
    from torch import Tensor


@register("similarity", "flat_cosine")
@dataclass
class FlatCosine(Similarity):
    """Cosine of the flattened [T D] last hidden state, averaged over samples; first token included, as released.

    Tokens of large norm weigh most; `token_cosine` gives every token the same weight.
    Source: SLM.py of the released code; Ding et al. 2025, arXiv:2502.19159.
    """

    saturates: ClassVar[bool] = True

    def against(self, dense_NTD: Tensor, kernel: Kernel) -> Scorer:
        dense = wide(dense_NTD)
        dense_sq_N = token_dots(dense, dense).sum(-1)

        def score(trial_NTD: Tensor) -> float:
            trial = wide(trial_NTD)
            dot_N, trial_sq_N = token_dots(dense, trial).sum(-1), token_dots(trial, trial).sum(-1)
            return as_score(cosines(dot_N, dense_sq_N, trial_sq_N).mean())

        return score


@register("similarity", "token_cosine")
@dataclass
class TokenCosine(Similarity):
    """Cosine of every token's state, averaged over all tokens; all tokens weigh the same."""

    def against(self, dense_NTD: Tensor, kernel: Kernel) -> Scorer:
        dense = wide(dense_NTD)
        dense_sq_NT = token_dots(dense, dense)

        def score(trial_NTD: Tensor) -> float:
            trial = wide(trial_NTD)
            return as_score(cosines(token_dots(dense, trial), dense_sq_NT, token_dots(trial, trial)).mean())

        return score


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
