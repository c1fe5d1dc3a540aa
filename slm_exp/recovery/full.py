"""Continued training of every weight: on text (`recovery=full`), or on the dense model's predictions (`distill`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.cuts import zeroed_modules
from slm_exp.recovery.trained import Trained, next_token_loss

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("recovery", "full")
@dataclass
class Full(Trained):
    """Next-token training of all parameters on packed windows of text. Tied embeddings stay tied, removed sublayers
    zero.

    Beats LoRA where much was removed (README of github.com/Nota-NetsPresso/shortened-llm, windows of 2048 there).
    Memory: 16 bytes a parameter beside the models.
    """

    schedule: str = "cosine"
    batch_size: int = 8
    warmup_steps: int = 20

    def student(self, task: RecoveryTask) -> nn.Module:
        zeroed = zeroed_modules(task.handle, task.plan)
        names = (name for name, _ in task.handle.model.named_parameters())
        return self.trainable_copy(task, [name for name in names if name.rpartition(".")[0] not in zeroed])


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
        require(self.ce >= 0, "recovery.ce", self.ce, "a number >= 0")
        require(self.temperature > 0, "recovery.temperature", self.temperature, "a number > 0")

    def loss(self, task: RecoveryTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return next_token_loss(model, batch, self.ce, task.dense.model, self.temperature)
