"""Next-token training of all parameters on packed windows of text. Tied embeddings stay tied, removed sublayers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.cuts import zeroed_modules
from slm_exp.recovery.trained import Trained

if TYPE_CHECKING:
    from torch import nn


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
