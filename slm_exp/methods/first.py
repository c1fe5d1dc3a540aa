from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.methods.base import Baseline, Selection
from slm_exp.search.task import PlanTask


@register("method", "first")
@dataclass
class FirstLayers(Baseline):
    """Drop the n lowest layers that are not protected; nothing is. A floor for comparisons."""

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        return Selection(tuple(self.removable(task.handle.n_layers)[:n_remove]))
