"""`recovery=full`: continued pre-training of every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.recovery.base import HealTask
from slm_exp.recovery.streams import silenced
from slm_exp.recovery.trained import Trained, trainable_copy, trained_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("recovery", "full")
@dataclass
class Full(Trained):
    """Next-token training of all parameters on packed windows of text. Tied embeddings stay tied, removed halves zero.

    Beats LoRA where much was removed (README of github.com/Nota-NetsPresso/shortened-llm, windows of 2048 there).
    Memory: 16 bytes a parameter beside the models.
    """

    schedule: str = "cosine"
    batch_size: int = 8
    warmup_steps: int = 20

    def student(self, task: HealTask) -> nn.Module:
        model = task.handle.model
        gone = silenced(task.handle, task.plan)
        return trainable_copy(model, [n for n, _ in model.named_parameters() if n.rpartition(".")[0] not in gone])

    def result(self, task: HealTask, model: nn.Module) -> dict[str, Tensor]:
        return trained_tensors(task, model)
