from __future__ import annotations

from dataclasses import dataclass, replace

from slm_exp.core.cost import Count
from slm_exp.core.registry import register
from slm_exp.methods.base import Selection, greedy_cost
from slm_exp.methods.objectives import OBJECTIVES, SetSearch
from slm_exp.search.evolution import beam, plan_without
from slm_exp.search.task import PlanTask


@register("method", "beam")
@dataclass
class Beam(SetSearch):
    """Grow several sets of removed parts at once, by one part at a time, and keep the best.

    Of all that the `width` best sets can become by losing one part more, the `width` best go on. `width=1` is the
    greedy removal of sleb (layers, `objective=loss`) or blockpruner (`tied=false`). With similarity.after=reconstruct
    every set is scored as it is after the refit. The trace holds the objective with the sign turned; its `low` and
    `high` are the layer taken last, in original numbers.
    Cost: `width` times that of sleb or blockpruner, less for sets that are reached in several ways.
    """

    width: int = 4
    """Sets that are kept at a time."""

    def check(self) -> None:
        self.at_least(1, "width")
        super().check()

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        heads, removals = OBJECTIVES[self.objective], removed or self.target_sublayers or n_layers // 4
        one = (self.greedy_cost(n_layers, heads=heads) if self.removes_sublayers else
               greedy_cost(n_layers, len(self.removable(n_layers)), removed or 0, heads=heads))
        note = "" if self.width == 1 else "a beam takes less than is estimated: sets reached in several ways count once"
        scores = self.width * removals * len(self.units(n_layers))
        return replace(one, blocks=self.width * one.blocks, heads=self.width * one.heads, note=note,
                       scores=1 + (scores if self.objective == "score" else 0))

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        n, engine = task.handle.n_layers, task.engine
        wanted = self.wanted(task.handle) if self.removes_sublayers else lambda removed, _: len(removed) < n_remove
        return self.selected(beam(self.units(n), self.width, self.cost_of(engine), wanted,
                                  lambda parts: engine.commit(plan_without(n, parts))))
