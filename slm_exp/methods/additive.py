from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.cost import Count
from slm_exp.core.registry import register
from slm_exp.methods.base import Selection
from slm_exp.methods.objectives import OBJECTIVES, SetSearch
from slm_exp.models.base import ModelHandle
from slm_exp.search.evolution import Found, plan_without
from slm_exp.search.greedy import Unit, each_alone, refuse_infinite, traced
from slm_exp.search.task import PlanTask

if TYPE_CHECKING:
    from slm_exp.search.scoring import Slots


@register("method", "additive")
@dataclass
class Additive(SetSearch):
    """The set of parts whose removal, one part at a time, moves the output least in sum: an exact knapsack.

    A part's score is the squared distance of the last hidden state (after the final norm) from the dense model's when
    it alone is removed, relative to the square of that; a set's score is taken to be the sum. The set of least sum that
    takes enough away is found exactly, by parameters, operations or milliseconds, so that parts of unlike size compete
    fairly: two attentions against one MLP. Source: the criterion of LAPTOP-Diff, arXiv:2404.11098, whose blocks of a
    diffusion model are attention and MLP sublayers here, or with `target_layers` (`tied`) whole layers. Deviations: the
    last hidden state in place of an image's noise; `objective` may be another, e.g. kl.
    The trace holds the scores with the sign turned. Cost: the dense pass, and for every part the layers above it.
    """

    objective: str = "squared"
    tied: bool | None = None
    """Whether a layer's attention and MLP go together; null: with target_layers."""

    @property
    def _tied(self) -> bool:
        return self.target_layers is not None if self.tied is None else self.tied

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        units = self.units(n_layers)
        above = sum(n_layers - u.layer - (0 if u.kind == "attention" else 0.5) for u in units)
        return Count(above + 2 * n_layers - (removed or 0), OBJECTIVES[self.objective] * len(units), reads=3 * n_layers)

    def _gains(self, handle: ModelHandle, units: list[Unit], n_remove: int) -> tuple[list[float], float]:
        """What each part takes away, and how much has to go: layers, sublayers, parameters, operations or seconds."""
        if (budget := self.budget(handle)) is not None:
            costs = budget.costs
            gains = [costs.part(u.layer, u.kind) if u.kind else costs.layer(u.layer) for u in units]
            return gains, costs.dense - budget.limit
        if self.target_ratio is not None and not self._tied:
            sizes = handle.sublayer_params
            return [float(sizes[u.layer][str(u.kind)]) for u in units], self.target_ratio * handle.n_params
        return [1.0] * len(units), float(self.target_sublayers or n_remove)

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        from slm_exp.search.knapsack import Option, cheapest

        engine, units = task.engine, self.units(task.handle.n_layers)
        gains, need = self._gains(task.handle, units, n_remove)
        if need <= 0:
            return Selection()

        def scores(models: Sequence[Slots]) -> Iterable[float]:
            if self.objective == "loss":
                return engine.losses(models)
            if self.objective != "score":
                return engine.distances(models, self.objective)
            engine.foresee(models)
            return (-engine.score(model) for model in models)

        costs = each_alone(engine.dense, units, scores, self.name)
        refuse_infinite(costs)
        options = [[Option(0.0, 0.0), Option(costs[u], gain)] for u, gain in zip(units, gains, strict=True)]
        taken = cheapest(options, min(need, sum(gains)))
        parts = frozenset(u for u, goes in zip(units, taken, strict=True) if goes)
        engine.commit(plan_without(engine.n_layers, parts))
        return self.selected(Found(parts, tuple(traced(costs, parts, engine.dense))))
