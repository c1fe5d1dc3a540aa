from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.cost import Count
from slm_exp.core.registry import register
from slm_exp.methods.sublayers import GreedySublayers
from slm_exp.search.greedy import Removed, Wanted, greedy
from slm_exp.search.task import PlanTask


@register("method", "blockpruner")
@dataclass
class BlockPruner(GreedySublayers):
    """Remove one sublayer at a time: the one without which perplexity of the model, as it is by then, is lowest.

    Attention and MLP sublayers compete; nothing is protected; the lower one wins a tie. Source: BlockPruner,
    arXiv:2406.10594. The released code takes exp of the mean loss per sample over packed Alpaca rows; here it is the
    mean loss over the run's calibration, whose rows are of one length, so the order is the same. The trace holds the
    loss with the sign turned.
    Cost: for the i-th removal 2 L - i candidates, each of which runs the layers from its own upwards, and the head:
    for 5 sublayers of 30 layers about 4,300 block forwards and 290 passes of the head.
    """

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        return self.greedy_cost(n_layers)

    def remove(self, task: PlanTask, wanted: Wanted) -> Removed:
        return greedy(task.engine, self.units(task.handle.n_layers), task.engine.losses, wanted, self.name)
