"""`recovery=distill`: every weight trained to give the dense model's next-token distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.recovery.base import HealTask
from slm_exp.recovery.full import Full
from slm_exp.recovery.head import counted_states, head_loss

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("recovery", "distill")
@dataclass
class Distill(Full):
    """KL divergence of the student's distribution from the dense model's, per token, plus `ce` x the usual loss.

    Two full logit tensors never exist (see recovery/head.py). Source: the recipe of arXiv:2407.14679 (Minitron),
    logits only. Cost: a dense forward pass, and the dense head, more per step than `full`.
    """

    ce: float = 0.0
    """Weight of the next-token loss."""
    temperature: float = 1.0
    """Both logits are divided by it."""

    def check(self) -> None:
        super().check()
        require(self.ce >= 0, "recovery.ce", self.ce, "a number >= 0")
        require(self.temperature > 0, "recovery.temperature", self.temperature, "a number > 0")

    def loss(self, task: HealTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        import torch

        student: Any = model
        dense: Any = task.dense.model
        with torch.no_grad():
            wanted_MD, _ = counted_states(dense, batch)
        given_MD, labels_M = counted_states(student, batch)
        return head_loss(given_MD, student.get_output_embeddings().weight, labels_M, self.ce,
                         (wanted_MD, dense.get_output_embeddings().weight), self.temperature)
