from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.registry import register
from slm_exp.similarity.base import EachSample, MeanSimilarity, cosines, token_dots, wide

if TYPE_CHECKING:
    from torch import Tensor


@register("similarity", "flat_cosine")
@dataclass
class FlatCosine(MeanSimilarity):
    """Cosine of the flattened [T D] last hidden state, averaged over samples; first token included, as released.

    Tokens of large norm weigh most; `token_cosine` gives every token the same weight.
    Source: SLM.py of the released code; Ding et al. 2025, arXiv:2502.19159.
    """

    saturates: ClassVar[bool] = True

    def each(self, dense_NTD: Tensor) -> EachSample:
        dense = wide(dense_NTD)
        dense_sq_N = token_dots(dense, dense).sum(-1)

        def scores(trial_BTD: Tensor, rows: Tensor | slice) -> Tensor:
            trial = wide(trial_BTD)
            dot_B, trial_sq_B = token_dots(dense[rows], trial).sum(-1), token_dots(trial, trial).sum(-1)
            return cosines(dot_B, dense_sq_N[rows], trial_sq_B)

        return scores
