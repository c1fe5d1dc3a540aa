"""Methods that choose sets of parts: the exact cheapest one, and what they may judge sets by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.errors import require, require_one_of
from slm_exp.core.registry import Fields
from slm_exp.core.types import Sublayer
from slm_exp.methods.base import BUDGETS, Baseline, Selection
from slm_exp.methods.sublayers import SublayerBaseline
from slm_exp.models.base import ModelHandle
from slm_exp.search.evolution import Cost, Found, Parts, plan_without
from slm_exp.search.greedy import Unit

if TYPE_CHECKING:
    from slm_exp.search.scoring import ScoringEngine

OBJECTIVES = {"loss": 1, "kl": 2, "js": 2, "squared": 0, "score": 0}
"""And how many passes of the head each takes."""


@dataclass
class PartSets(SublayerBaseline):
    """A method that chooses sets of layers, or of attention and MLP sublayers."""

    targets: ClassVar[tuple[str, ...]] = ("target_layers", "target_sublayers", "target_ratio", *BUDGETS)
    mergeable: ClassVar[bool] = True

    tied: bool | None = None
    """Whether a layer's attention and MLP go together; null: with target_layers."""

    def check(self) -> None:
        wrong = "target_sublayers" if self._tied else "target_layers"
        require(getattr(self, wrong) is None, f"method.{wrong}", getattr(self, wrong),
                f"null with method.tied={str(self._tied).lower()}",
                f"Set method.tied={str(not self._tied).lower()}, or another target.")
        require(self._tied or not self.merge, "method.merge", self.merge, "false with method.tied=false",
                "Only whole layers can be merged.")
        super().check()

    @property
    def _tied(self) -> bool:
        return self.target_layers is not None if self.tied is None else self.tied

    def identity(self) -> Fields:
        """With what null comes to."""
        return {**super().identity(), "tied": self._tied}

    @property
    def removes_sublayers(self) -> bool:
        return not self._tied

    def units(self, n_layers: int) -> list[Unit]:
        return [Unit(i) for i in self.removable(n_layers)] if self._tied else super().units(n_layers)

    def layers_to_remove(self, handle: ModelHandle) -> int:
        return Baseline.layers_to_remove(self, handle) if self._tied else super().layers_to_remove(handle)

    def gains(self, handle: ModelHandle, n_remove: int) -> tuple[dict[Unit, float], float]:
        """What each part takes away, and how much has to go: layers, sublayers, parameters, operations or seconds."""
        units = self.units(handle.n_layers)
        if (budget := self.budget(handle)) is not None:
            costs = budget.costs
            of = {u: costs.part(u.layer, u.kind) if u.kind else costs.layer(u.layer) for u in units}
            return of, costs.dense - budget.limit
        if self.target_ratio is not None and not self._tied:
            sizes = handle.sublayer_params
            return {u: float(sizes[u.layer][str(u.kind)]) for u in units}, self.target_ratio * handle.n_params
        return dict.fromkeys(units, 1.0), float(self.target_sublayers or n_remove)

    def cheapest(self, prices: Mapping[Unit, float], gains: Mapping[Unit, float], need: float) -> Parts:
        """The parts of least price together whose gains sum to `need`, exactly."""
        from slm_exp.search.knapsack import Option, cheapest

        options = [[Option(0.0, 0.0), Option(prices[u], gain)] for u, gain in gains.items()]
        taken = cheapest(options, min(need, sum(gains.values())))
        return frozenset(u for u, goes in zip(gains, taken, strict=True) if goes)

    def selected(self, found: Found, block_forwards: int = 0) -> Selection:
        parts = sorted(found.parts)
        return Selection(tuple(u.layer for u in parts if u.kind is None), trace=found.trace,
                         sublayers=tuple(Sublayer(u.layer, u.kind) for u in parts if u.kind),
                         block_forwards=block_forwards)


@dataclass
class SetSearch(PartSets):
    """One that judges sets by the models they leave."""

    objective: str = "loss"
    """loss: of the next token. kl, js: divergence of the predictions from the dense model's. squared: distance of the
    last hidden states from the dense model's. score: the run's similarity. With similarity.after all are those of the
    refitted model."""
    tied: bool | None = None
    """Whether a layer's attention and MLP go together; null: as the target says, tied with target_layers."""

    def check(self) -> None:
        require_one_of("method.objective", self.objective, OBJECTIVES)
        super().check()

    @property
    def _tied(self) -> bool:
        return self.target_sublayers is None if self.tied is None else self.tied

    def cost_of(self, engine: ScoringEngine) -> Cost:
        """A set's cost by the objective."""

        def cost(parts: Parts) -> float:
            plan = plan_without(engine.n_layers, parts)
            if self.objective == "loss":
                return engine.loss(plan)
            return -engine.score(plan) if self.objective == "score" else engine.distance(plan, self.objective)

        return cost
