from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.calibration.fit import FitSettings, check_ridges
from slm_exp.core.cost import Work, normal_equations
from slm_exp.core.errors import ConfigError
from slm_exp.core.registry import register
from slm_exp.core.types import CalibrationTokens, Group
from slm_exp.merging.rules.base import FitTask, FittingRule
from slm_exp.merging.rules.mean import Mean
from slm_exp.models.base import ModelHandle
from slm_exp.models.sizes import Sizes

if TYPE_CHECKING:
    from torch import Tensor

    from slm_exp.engine.runner import BlockRunner


@register("merge_rule", "regression")
@dataclass
class Regression(FitSettings, FittingRule):
    """A layer fitted to do to the stream what the window does: all projections, alternating; norms of the lowest layer.

    From the dense stream before the window to the dense stream after it, on tokens of its own, of no document that
    candidates are scored on. Starts from the best of the lowest layer's projections, the highest's and their mean. A
    sweep fits the inner projections (q, k, v, gate, up) by L-BFGS on the sum of squares, then `down_proj` and `o_proj`
    by ridge regression; every fifth sequence is held out, and what is best there is kept. Token weights are those of
    `engine.ridge.token_weights`. Experts and routers are the mean.
    The layers lie beside plan.json as fitted.safetensors, named there by their digest; method=from_plan reads them.
    Cost: for a window about 10 + 5 x steps x sweeps forward passes of a layer over the tokens, once for every window
    that is scored.
    """

    n_samples: int = 24
    sweeps: int = 1
    """How often inner and output projections are fitted in turn; 0: the output projections alone."""
    steps: int = 10
    """Of L-BFGS, in each sweep."""
    ridges: list[float] = dataclasses.field(default_factory=lambda: [1e-3, 1e-2, 1e-1, 1.0, 10.0])
    """Ridges to choose from, in units of the mean diagonal of the normal equations."""

    def check(self) -> None:
        super().check()
        self.at_least(0, "sweeps")
        self.at_least(1, "steps")
        check_ridges("merge_rule.ridges", self.ridges)

    def check_data(self, dense: ModelHandle) -> None:
        if dense.layout.no_refit:
            raise ConfigError(f"merge_rule=regression: {dense.layout.family} layers cannot be fitted by regression: "
                              f"{dense.layout.no_refit}. Take another merge_rule.")
        self.fit_source().check(dense)

    def cost(self, sizes: Sizes, windows: float) -> Work:
        total = self.n_samples * self.seq_len
        forwards = windows * (10 + 5 * self.steps * self.sweeps) + sizes.n_layers
        return Work(blocks=forwards * sizes.block_flops(total, self.seq_len),
                    wide=windows * (3 + self.sweeps) * (2 * total + len(self.ridges) * sizes.mlp) * sizes.mlp**2)

    def memory(self, sizes: Sizes) -> float:
        """The dense states of all layers, and what L-BFGS remembers of the inner projections, or a regression."""
        total, outer = self.n_samples * self.seq_len, sizes.hidden * (sizes.mlp + sizes.query)
        remembered = (2 * self.steps + 6) * 4 * (sizes.layer - outer) if self.sweeps else 0
        return (4 * total * (sizes.n_layers + 1) * sizes.hidden + 3 * 4 * sizes.layer
                + max(remembered, normal_equations(sizes.mlp, sizes.hidden, total / 5)))

    def combine(self, weights: Sequence[Tensor]) -> Tensor:
        return Mean().combine(weights)

    def draw(self, task: FitTask) -> CalibrationTokens:
        return self.fit_source().draw(task.handle, task.seed, task.tokens)

    def fit(self, runner: BlockRunner, window: Group, entering_NTD: Tensor, wanted_NTD: Tensor) -> dict[str, Tensor]:
        from slm_exp.merging.regression import fit_window

        return fit_window(runner, window, entering_NTD, wanted_NTD, self)
