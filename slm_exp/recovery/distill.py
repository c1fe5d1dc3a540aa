from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.registry import register
from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.trained import next_token_loss

if TYPE_CHECKING:
    from torch import Tensor, nn
from slm_exp.recovery.full import Full


@register("recovery", "distill")
@dataclass
class Distill(Full):
    """KL divergence of the student's distribution from the dense model's, per token, plus `ce` x the usual loss.

    Two full logit tensors never exist (see engine/head_loss.py). Source: the recipe of arXiv:2407.14679 (Minitron),
    logits only. Cost: a dense forward pass, and the dense head, more per step than `full`.
    """

    runs_dense: ClassVar[bool] = True
    ce: float = 0.0
    """Weight of the next-token loss."""
    temperature: float = 1.0
    """Both logits are divided by it."""

    def check(self) -> None:
        super().check()
        self.at_least(0, "ce")
        self.positive("temperature")

    def loss(self, task: RecoveryTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return next_token_loss(model, batch, self.ce, task.dense.model, self.temperature)
