"""Cosine of every token's state, averaged over all tokens; all tokens weigh the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.kernels.base import Kernel
from slm_exp.similarity.base import Scorer, Similarity, as_score, cosines, token_dots, wide

if TYPE_CHECKING:
    from torch import Tensor


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
