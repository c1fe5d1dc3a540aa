"""Mean over blocks of |student - dense|^2 / |dense|^2 of the stream after each block of each window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.core.together import Together
from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.cuts import beside_cuts, needs_dense_stream
from slm_exp.recovery.trained import Trained

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("recovery", "feature_distill")
@dataclass
class FeatureDistill(Trained):
    """Mean over blocks of |student - dense|^2 / |dense|^2 of the stream after each block of each window.

    A window starts at a layer beside a cut and takes in the states of the student as it is, without a gradient to what
    lies below; it ends `window` layers on, or where the next one starts. First tokens, whose states are huge, are left
    out. Source: the normalised features of arXiv:2404.11098 (LAPTOP-Diff) and the windows of arXiv:2312.07950 (CBQ).
    Cost: a dense and a student forward pass, and a backward pass through the windows alone.
    """

    runs_dense: ClassVar[bool] = True
    batch_size: int = 8
    warmup_steps: int = 20
    window: int = 3
    """Layers of a window."""

    def check(self) -> None:
        super().check()
        require(self.window >= 1, "recovery.window", self.window, "a whole number >= 1")

    def refuses(self, others: Together) -> str | None:
        return super().refuses(others) or needs_dense_stream(others)

    def student(self, task: RecoveryTask) -> nn.Module:
        layers = task.handle.layout.layer_list
        names = [f"{layers}.{at}.{name}" for at in beside_cuts(task.plan)
                 for name, p in task.handle.layers[at].named_parameters() if p.any()]  # a removed sublayer stays zero
        return self.trainable_copy(task, names)

    def loss(self, task: RecoveryTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        from slm_exp.recovery.features import feature_loss

        return feature_loss(task, model, batch, self.window)
