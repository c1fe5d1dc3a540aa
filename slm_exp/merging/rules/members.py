"""The merge rules of LaCo and sliding layer merging, what their code computes, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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


@register("merge_rule", "keep_low")
@dataclass
class KeepLow(MergeRule):
    """The lowest layer of the window, whole: what the released ablation calls `delete`. A deletion, not a merge."""

    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        return weights[0]


@register("merge_rule", "keep_top")
@dataclass
class KeepTop(MergeRule):
    """The highest layer of the window, whole: `top_layer` with its own norms and biases. A deletion, not a merge."""

    attention_from: ClassVar[str] = "top"
    whole_layer: ClassVar[bool] = True

    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        return weights[-1]


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
