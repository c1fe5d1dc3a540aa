from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.merging.rules.base import MergeRule

if TYPE_CHECKING:
    from torch import Tensor


@register("merge_rule", "keep_low")
@dataclass
class KeepLow(MergeRule):
    """The lowest layer of the window, whole: what the released ablation calls `delete`. A deletion, not a merge."""

    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        return weights[0]
