from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.errors import require_one_of
from slm_exp.core.registry import Fields, register
from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.cuts import zeroed_modules
from slm_exp.recovery.trained import Trained

if TYPE_CHECKING:
    from torch import Tensor, nn

MASKED = ("keep", "decay")


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
    masked: str = "keep"
    """Of a model with N:M masks (width=nm), whose zeros stay zero at the end. keep: pruned weights take no part. decay:
    while training they count a share that falls from 1 to 0 in a straight line, and so do their gradients."""

    def check(self) -> None:
        super().check()
        require_one_of("recovery.masked", self.masked, MASKED)

    def identity(self) -> Fields:
        """An option that is off leaves no trace."""
        return {k: v for k, v in super().identity().items() if k != "masked" or v != "keep"}

    def student(self, task: RecoveryTask) -> nn.Module:
        zeroed = zeroed_modules(task.handle, task.plan)
        names = (name for name, _ in task.handle.model.named_parameters())
        model = self.trainable_copy(task, [name for name in names if name.rpartition(".")[0] not in zeroed])
        if task.plan.width and task.plan.width.mask:
            from slm_exp.recovery.masked import hold

            layout = task.handle.layout
            modules = [f"{layout.layer_list}.{i}.{name}" for i in range(task.handle.n_layers)
                       for name in layout.projections]
            hold(model, [name for name in modules if name not in zeroed])
        return model

    def at(self, model: nn.Module, done: float) -> None:
        for module in model.modules():
            if hasattr(module, "share"):
                module.share = 1 - done if self.masked == "decay" else 0.0  # type: ignore[assignment]

    def result(self, task: RecoveryTask, model: nn.Module) -> dict[str, Tensor]:
        from slm_exp.recovery.masked import zeroed_again

        return zeroed_again(model, super().result(task, model))
