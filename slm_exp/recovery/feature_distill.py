from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.cost import ADAM_BYTES
from slm_exp.core.errors import require_one_of
from slm_exp.core.registry import Fields, register
from slm_exp.core.together import Together
from slm_exp.models.sizes import Sizes
from slm_exp.recovery.base import RecoveryTask
from slm_exp.recovery.cuts import beside_cuts, needs_dense_stream
from slm_exp.recovery.trained import Trained

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("recovery", "feature_distill")
@dataclass
class FeatureDistill(Trained):
    """Mean over blocks of |student - dense|^2 / |dense|^2 of the stream after each block of each window.

    A window starts at every layer that trains (`layers`) and takes in the states of the student as it is, without a
    gradient to what lies below; it ends `window` layers on, or where the next one starts, unless windows `overlap`:
    then a layer learns from its own output and from that of the layers above it in every window that it is part of.
    First tokens, whose states are huge, are left out. Source: the normalised features of arXiv:2404.11098 (LAPTOP-Diff)
    and the cross-block windows of arXiv:2312.07950 (CBQ; overlapping by all but one block).
    Cost: a dense and a student forward pass, and a backward pass through the windows alone; with `overlap` also
    `window` forward passes of the layers that train.
    """

    runs_dense: ClassVar[bool] = True
    batch_size: int = 8
    warmup_steps: int = 20
    window: int = 3
    """Layers of a window."""
    layers: str = "cuts"
    """That train: those beside cuts, or all from the first of them up."""
    overlap: bool = False
    """Whether windows run on where the next one starts. With window=1 that changes nothing."""

    def check(self) -> None:
        super().check()
        self.at_least(1, "window")
        require_one_of("recovery.layers", self.layers, ("cuts", "all"))

    def identity(self) -> Fields:
        """Options that are off leave no trace."""
        off = {"layers": "cuts", "overlap": False}
        return {k: v for k, v in super().identity().items() if k not in off or v != off[k]}

    def memory(self, sizes: Sizes, width: float) -> float:
        """Of a quarter of the layers where only those beside cuts train: how many these are, a plan says."""
        trained = sizes.total if self.layers == "all" else sizes.n_layers * sizes.layer / 4
        return trained * ADAM_BYTES + self._activations(sizes)

    def passes(self) -> float:
        return 1 + 3 * self.window if self.overlap else super().passes()

    def refuses(self, others: Together) -> str | None:
        return super().refuses(others) or needs_dense_stream(others)

    def student(self, task: RecoveryTask) -> nn.Module:
        layers = task.handle.layout.layer_list
        names = [f"{layers}.{at}.{name}" for at in beside_cuts(task.plan, self.layers)
                 for name, p in task.handle.layers[at].named_parameters() if p.any()]  # a removed sublayer stays zero
        return self.trainable_copy(task, names)

    def loss(self, task: RecoveryTask, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        from slm_exp.recovery.features import feature_loss

        return feature_loss(task, model, batch, self.window, self.layers, self.overlap)
