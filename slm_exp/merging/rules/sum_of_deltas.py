from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.merging.rules.base import MergeRule

if TYPE_CHECKING:
    from torch import Tensor


@register("merge_rule", "sum_of_deltas")
@dataclass
class SumOfDeltas(MergeRule):
    """W_low + sum over the layers k above it of (W_k - W_low), the base frozen.

    Three or more layers leave the scale of any one of them: with n layers the lowest has weight 2 - n.
    Source: LaCo, arXiv:2402.11187, eq. 1; SLM, arXiv:2502.19159. Neither's released code computes it (`top_layer`).
    """

    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        import torch

        wide = torch.promote_types(weights[0].dtype, torch.float32)
        low = weights[0].to(wide)
        total = low.clone()
        for weight in weights[1:]:
            total += weight.to(wide) - low
        return total.to(weights[0].dtype)
