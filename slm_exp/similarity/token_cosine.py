from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.similarity.base import EachSample, MeanSimilarity, cosines, token_dots, wide

if TYPE_CHECKING:
    from torch import Tensor


@register("similarity", "token_cosine")
@dataclass
class TokenCosine(MeanSimilarity):
    """Cosine of every token's state, averaged over all tokens; all tokens weigh the same."""

    def each(self, dense_NTD: Tensor) -> EachSample:
        dense = wide(dense_NTD)
        dense_sq_NT = token_dots(dense, dense)

        def scores(trial_BTD: Tensor, rows: Tensor | slice) -> Tensor:
            trial = wide(trial_BTD)
            return cosines(token_dots(dense[rows], trial), dense_sq_NT[rows], token_dots(trial, trial)).mean(-1)

        return scores
