from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.cost import Count
from slm_exp.core.registry import register
from slm_exp.methods.base import Baseline, Selection, greedy_cost
from slm_exp.search.greedy import Unit, greedy
from slm_exp.search.task import PlanTask


@register("method", "sleb")
@dataclass
class SLEB(Baseline):
    """Drop one layer at a time: the one without which the loss of the model, as it is by then, is lowest.

    The first and the last layer are protected, as in the released code; the lower layer wins a tie. Source: SLEB,
    arXiv:2402.09025. The released code joins 128 rows of WikiText-2 into a few windows of 2048 tokens; here the loss
    is taken over the run's calibration. The trace holds the loss with the sign turned.
    Cost: for the i-th removal L - 2 - i candidates, each of which runs the layers above the one it lacks, and the
    head: for 5 of 30 layers about 1,850 block forwards (every layer run: 3,550) and 130 passes of the head.
    """

    protect_first: int = 1
    protect_last: int = 1

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        return greedy_cost(n_layers, len(self.removable(n_layers)), removed or 0)

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        units = [Unit(i) for i in self.removable(task.handle.n_layers)]
        gone = greedy(task.engine, units, task.engine.losses, lambda removed, _: len(removed) < n_remove, self.name)
        return Selection(tuple(u.layer for u in gone.units), trace=gone.trace)
