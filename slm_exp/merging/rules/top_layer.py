from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.registry import register
from slm_exp.merging.rules.base import MergeRule

if TYPE_CHECKING:
    from torch import Tensor


@register("merge_rule", "top_layer")
@dataclass
class TopLayer(MergeRule):
    """Projections of the highest layer of the window, norms and biases of the lowest.

    The released loop adds W_k - W_low to W_low in place, layer after layer; each step overwrites the one before, and
    the highest layer remains (up to a rounding in the last bit, which this rule does not repeat).
    Source: SLM.py of the released code of Ding et al. 2025, arXiv:2502.19159, which states `sum_of_deltas`.
    """

    attention_from: ClassVar[str] = "top"

    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        return weights[-1]
