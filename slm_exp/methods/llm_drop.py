from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar

from slm_exp.core.cost import Count
from slm_exp.core.errors import require, require_one_of
from slm_exp.core.registry import Fields, register
from slm_exp.methods.base import BUDGETS, Baseline, Selection
from slm_exp.methods.sublayers import GreedySublayers
from slm_exp.models.base import ModelHandle
from slm_exp.search.greedy import Removed, Unit, Wanted, one_shot, traced
from slm_exp.search.task import PlanTask
from slm_exp.similarity.base import token_cosine

UNITS = ("layer", "attention", "mlp", "joint")


@register("method", "llm_drop")
@dataclass
class LLMDrop(GreedySublayers):
    """Drop the parts with the highest mean over tokens of cos(state in, state out). One-shot, on dense states.

    A sublayer counts with its norm and residual: cos(x, x + f(norm(x))). `joint` ranks attention and MLP sublayers
    together. Nothing protected; the lower one wins a tie. Source: LLM-Drop, arXiv:2406.15786, discrete mode.
    Deviations: all runs at once over the run's calibration (released: C4 validation, 256 x 2048 tokens); its mode of
    consecutive blocks, whose code scores runs one longer than it drops, is method=angular.
    Cost: the dense pass, and half a layer more for each layer where sublayers are requested.
    """

    targets: ClassVar[tuple[str, ...]] = ("target_layers", "target_sublayers", "target_ratio", *BUDGETS)
    mergeable: ClassVar[bool] = True

    unit: str | None = None
    """layer, attention, mlp, or joint (either sublayer). Null: layer with target_layers, else attention."""

    def check(self) -> None:
        if self.unit is not None:
            require_one_of("method.unit", self.unit, UNITS)
        wrong, instead = "target_layers", "Set method.unit=layer, or method.target_sublayers."
        if self._unit == "layer":
            wrong, instead = "target_sublayers", "Set method.target_layers, or another method.unit."
        else:
            require(not self.merge, "method.merge", self.merge, f"false with method.unit={self._unit}",
                    "Only whole layers can be merged: method.unit=layer.")
        require(getattr(self, wrong) is None, f"method.{wrong}", getattr(self, wrong),
                f"null with method.unit={self._unit}", instead)
        super().check()

    @property
    def _unit(self) -> str:
        return self.unit or ("attention" if self.target_layers is None else "layer")

    def identity(self) -> Fields:
        """With the unit that null comes to."""
        return {**super().identity(), "unit": self._unit}

    @property
    def removes_sublayers(self) -> bool:
        return self._unit != "layer"

    def units(self, n_layers: int) -> list[Unit]:
        if self._unit == "layer":
            return [Unit(i) for i in self.removable(n_layers)]
        return [u for u in super().units(n_layers) if self._unit in (u.kind, "joint")]

    def layers_to_remove(self, handle: ModelHandle) -> int:
        return super().layers_to_remove(handle) if self.removes_sublayers else Baseline.layers_to_remove(self, handle)

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        return Count(2.5 * n_layers - (removed or 0))

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        if self.removes_sublayers:
            return super().choose(task, n_remove)
        gone = self.remove(task, lambda removed, _: len(removed) < n_remove)
        return Selection(tuple(u.layer for u in gone.units), trace=gone.trace)

    def remove(self, task: PlanTask, wanted: Wanted) -> Removed:
        engine = task.engine
        states, units = engine.dense_states, self.units(task.handle.n_layers)
        costs: dict[Unit, float] = {}
        for i, parts in groupby(units, key=lambda unit: unit.layer):
            low, high = states[i], states[i + 1]
            between: Any = None  # the two sublayers of the layer
            if self.removes_sublayers:
                between = engine.block(replace(engine.dense[i], without=frozenset({"mlp"})), low)
            sides = {None: (low, high), "attention": (low, between), "mlp": (between, high)}
            costs |= {unit: -token_cosine(*sides[unit.kind]) for unit in parts}
        taken = one_shot(engine.dense, costs, wanted)
        run_again = len({unit.layer for unit in units}) if self.removes_sublayers else 0  # half a layer each
        return Removed(taken, tuple(traced(costs, taken, engine.dense)), block_forwards=(run_again + 1) // 2)
