from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.registry import register
from slm_exp.merging.rules.base import MergeRule

if TYPE_CHECKING:
    from torch import Tensor


@register("merge_rule", "keep_top")
@dataclass
class KeepTop(MergeRule):
    """The highest layer of the window, whole: `top_layer` with its own norms and biases. A deletion, not a merge."""

    attention_from: ClassVar[str] = "top"
    whole_layer: ClassVar[bool] = True

    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        return weights[-1]
