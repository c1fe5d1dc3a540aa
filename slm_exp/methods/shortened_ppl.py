from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.cost import Count
from slm_exp.core.registry import register
from slm_exp.methods.base import Selection
from slm_exp.methods.shortened import Shortened
from slm_exp.search.greedy import Unit, each_alone, one_shot, traced
from slm_exp.search.task import PlanTask


@register("method", "shortened_ppl")
@dataclass
class ShortenedPPL(Shortened):
    """Drop the n layers without which, one alone at a time, perplexity over the calibration is lowest. One-shot.

    The loss is ranked, whose order is that of its exponential, perplexity; protected layers are not scored, which
    decides nothing. The trace holds the loss with the sign turned.
    Cost: the dense pass, and for every layer not protected the layers above it and the head.
    """

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        above = [n_layers - 1 - i for i in self.removable(n_layers)]
        return Count(sum(above) + 2 * n_layers - (removed or 0), len(above), reads=3 * n_layers)

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        if n_remove == 0:
            return Selection()
        dense, units = task.engine.dense, [Unit(i) for i in self.removable(task.handle.n_layers)]
        costs = each_alone(dense, units, task.engine.losses, self.name)
        taken = one_shot(dense, costs, lambda removed, _: len(removed) < n_remove)
        return Selection(tuple(u.layer for u in taken), trace=tuple(traced(costs, taken, dense)))
