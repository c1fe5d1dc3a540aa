from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.cost import Count
from slm_exp.core.registry import register
from slm_exp.methods.base import Selection
from slm_exp.methods.objectives import OBJECTIVES, SetSearch
from slm_exp.search.evolution import Found, plan_without
from slm_exp.search.greedy import each_alone, refuse_infinite, traced
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

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        engine = task.engine
        gains, need = self.gains(task.handle, n_remove)
        if need <= 0:
            return Selection()

        def scores(models: Sequence[Slots]) -> Iterable[float]:
            if self.objective == "loss":
                return engine.losses(models)
            if self.objective != "score":
                return engine.distances(models, self.objective)
            engine.foresee(models)
            return (-engine.score(model) for model in models)

        costs = each_alone(engine.dense, [*gains], scores, self.name)
        refuse_infinite(costs)
        parts = self.cheapest(costs, gains, need)
        engine.commit(plan_without(engine.n_layers, parts))
        return self.selected(Found(parts, tuple(traced(costs, parts, engine.dense))))
