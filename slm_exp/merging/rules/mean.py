from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.merging.rules.base import MergeRule

if TYPE_CHECKING:
    from torch import Tensor


@register("merge_rule", "mean")
@dataclass
class Mean(MergeRule):
    """The arithmetic mean of the window's projections (the released ablation's `average` forgets to divide)."""

    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        import torch

        total = weights[0].to(torch.promote_types(weights[0].dtype, torch.float32), copy=True)
        for weight in weights[1:]:
            total += weight
        return total.div_(len(weights)).to(weights[0].dtype)
