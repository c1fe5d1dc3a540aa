from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.methods.base import Baseline, Selection
from slm_exp.search.task import PlanTask


@register("method", "last")
@dataclass
class LastLayers(Baseline):
    """Drop the n highest layers that are not protected; nothing is. A floor for comparisons."""

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        layers = self.removable(task.handle.n_layers)
        return Selection(tuple(layers[len(layers) - n_remove :]))
