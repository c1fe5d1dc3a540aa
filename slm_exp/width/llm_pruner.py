from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.errors import ConfigError, require_one_of
from slm_exp.core.registry import register
from slm_exp.core.together import DepthMethod
from slm_exp.engine.progress import ticking
from slm_exp.merging.sizes import LayerScores
from slm_exp.models.base import ModelHandle
from slm_exp.width.base import WidthTask
from slm_exp.width.pruner import Choose, Pruner, Scored

if TYPE_CHECKING:
    from torch import Tensor
from slm_exp.width.magnitude import coupled_sums

SALIENCE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "param_first": lambda w, g, h: (w * g).abs(),
    "param_second": lambda w, g, h: (w * w * h).abs(),
    "param_mix": lambda w, g, h: (w * g - 0.5 * w * w * h).abs(),
    "vectorize": lambda w, g, h: w * g,
}

FIRST, LAST = 4, 2
"""Layers at the bottom and the top that the published runs leave as they are."""


@register("width", "llm_pruner")
@dataclass
class LLMPruner(Pruner):
    """First- or second-order estimate of the loss change, summed over a unit's rows and columns.

    With w a weight, g the gradient of the mean loss and h the mean over samples of squared gradients:
    param_first sums |w g|, param_second |w^2 h|, param_mix |w g - w^2 h / 2| over elements; vectorize sums w g with
    signs along each row or column and takes absolute values of those sums. With uniform=false the first 4 and last
    2 layers are left as they are unless `layers` says otherwise. Source: arXiv:2305.11627 and its released code.

    Cost: a forward pass, then a forward and a backward pass of one layer after the other (`engine.gradients`): memory
    for one layer four times over and the states before every layer. Float32 whatever the model's dtype.
    """

    compare: ClassVar[str] = "per_parameter"
    passes: ClassVar[int] = 6
    taylor: str = "param_mix"
    """param_first, param_second, param_mix or vectorize."""

    def check(self) -> None:
        super().check()
        require_one_of("width.taylor", self.taylor, SALIENCE)

    def check_model(self, handle: ModelHandle, method: DepthMethod) -> None:
        if getattr(handle.config, "quantization_config", None) is not None:
            raise ConfigError(f"width=llm_pruner needs gradients, and {handle.name} is quantised. Take the original "
                              "checkpoint, or width=magnitude, wanda_sp or flap.")
        super().check_model(handle, method)

    def protected_range(self, n_layers: int) -> tuple[int, int]:
        return (FIRST, n_layers - LAST) if n_layers > FIRST + LAST else (0, n_layers)

    def scores(self, task: WidthTask, choose: Choose) -> Scored:
        from slm_exp.engine.gradients import model_gradients

        handle, layout, n = task.handle, task.handle.layout, task.handle.n_layers
        squares = self.taylor in ("param_second", "param_mix")
        out: dict[int, LayerScores] = {}
        with ticking("gradients", n, "layer") as tick:
            for i, found in model_gradients(handle, task.tokens.tokens_NT, squares):
                salience = {name: SALIENCE[self.taylor](*found[f"{name}.weight"]) for name in layout.projections}
                out[i] = coupled_sums(salience, layout, handle.config, signed_rows=self.taylor == "vectorize")
                tick(f"layer {i}")
        return Scored([out[i] for i in range(n)])
