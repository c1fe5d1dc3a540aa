from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.cost import Work
from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.core.runtime import world
from slm_exp.core.together import Together
from slm_exp.models.sizes import Sizes
from slm_exp.recovery.base import RecoveryResult, RecoveryTask, Relative
from slm_exp.recovery.lora import Lora

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("recovery", "family")
@dataclass
class Family(Lora):
    """One LoRA that recovers every plan of a threshold path at once: `slm path ... recovery=family`.

    Every dense layer has an adapter, and a layer of any of the models takes the one of the layer that its module comes
    from. A step trains the largest model, the smallest and `middle` others, sampled anew, each to the dense model's
    predictions: the sandwich rule of Once-for-all (arXiv:1908.09791), read for depth. Afterwards every size is read off
    without a training of its own. In a run there is one plan, and that one is trained alone.
    Deviation: the dense model teaches all, where there the largest does. Cost: a dense forward pass, and `middle` + 2
    times a step of `lora`, whose activations are in memory at once (lower micro_batch_size). One process trains.
    """

    runs_dense: ClassVar[bool] = True
    data: str = "bundled"
    middle: int = 1
    """Models between the largest and the smallest that a step trains."""
    ce: float = 0.0
    """Weight of the next-token loss beside the divergence from the dense model."""
    temperature: float = 1.0
    """Both logits are divided by it."""

    def check(self) -> None:
        super().check()
        self.at_least(0, "middle", "ce")
        self.positive("temperature")
        require(self.processes == 1, "recovery.processes", self.processes, "1 with recovery=family")

    def refuses(self, others: Together) -> str | None:
        if world() > 1:
            return f"recovery = family; expected another where a launcher started {world()} processes: one trains."
        return super().refuses(others)

    def cost(self, sizes: Sizes, layers: float) -> tuple[Work, list[str]]:
        """Of one plan's training."""
        work, notes = super().cost(sizes, layers)
        return work + Work(head=work.head / self.passes()), notes

    def recover(self, task: RecoveryTask) -> RecoveryResult:
        one = Relative(task, tuple(range(task.handle.n_layers)))
        adapters = self.adapters([one])
        return RecoveryResult(self.recovered(one, adapters), adapters.report)

    def at(self, model: nn.Module, done: float) -> None:
        model.at(done)  # type: ignore[operator]

    def adapters(self, family: Sequence[Relative]) -> RecoveryResult:
        """The trained adapters by the dense layer they belong to, and the report. `family`: the largest first. Cost: as
        the class says; estimated and logged before the first step."""
        from slm_exp.recovery.families import Students, family_loss

        task = family[0].task
        return self.train(
            task, lambda: Students(self, self.middle, family, task.seed),
            partial(family_loss, task.dense.model, self.ce, self.temperature),
            lambda model: model.named_adapters(),  # type: ignore[operator]
            [one.task.handle.digest for one in family])

    def recovered(self, one: Relative, adapters: RecoveryResult) -> dict[str, Tensor]:
        """New tensors for one plan's model: its weights with their adapters merged in."""
        from slm_exp.recovery.families import Students

        if not adapters.tensors:
            return {}
        students = Students(self, 0, [one], one.task.seed)
        students.take(adapters.tensors)
        return self.merged(one.task, students.models[0])
