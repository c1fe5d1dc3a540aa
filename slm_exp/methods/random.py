from __future__ import annotations

from dataclasses import dataclass
from random import Random

from slm_exp.core.registry import register
from slm_exp.methods.base import Baseline, Selection
from slm_exp.search.task import PlanTask


@register("method", "random")
@dataclass
class RandomLayers(Baseline):
    """Drop n layers drawn without replacement by the run's `seed`; `contiguous` draws a run. Nothing protected.

    Looks at neither tokens nor weights.
    """

    contiguous: bool = False
    """Draw the start of one run of n layers instead."""

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        draw, layers = Random(task.seed), self.removable(task.handle.n_layers)
        if self.contiguous:
            low = draw.randrange(layers.start, layers.stop - n_remove + 1)
            return Selection(tuple(range(low, low + n_remove)))
        return Selection(tuple(draw.sample(layers, n_remove)))
