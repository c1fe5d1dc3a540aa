"""Cosine of the flattened [T D] last hidden state, averaged over samples; first token included, as released."""

from __future__ import annotations

from dataclasses import dataclass
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
