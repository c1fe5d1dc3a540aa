"""Methods that remove attention or MLP sublayers: BlockPruner, FinerCut, LLM-Drop, and what they share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from slm_exp.core.cost import Count
from slm_exp.core.errors import ConfigError, require, require_one_of
from slm_exp.core.registry import register
from slm_exp.core.types import SUBLAYERS, Sublayer
from slm_exp.merging.surgery import sublayer_sizes
from slm_exp.methods.base import Baseline, Selection, greedy_cost
from slm_exp.models.base import ModelHandle
from slm_exp.search.greedy import Removed, Unit, Wanted, greedy, one_shot, traced
from slm_exp.search.task import PlanTask
from slm_exp.similarity.base import token_cosine

if TYPE_CHECKING:
    from slm_exp.search.scoring import Slots


@dataclass
class SublayerBaseline(Baseline):
    """A method that removes attention and MLP sublayers, a number of them or a share of the parameters.

    `target_ratio` counts the projections of the sublayers removed, which the checkpoint keeps as long as the layer's
    other sublayer is there: it is what an engine that skips them could leave out. A subclass gives `remove`.
    """

    targets: ClassVar[tuple[str, ...]] = ("target_sublayers", "target_ratio")
    mergeable: ClassVar[bool] = False

    target_sublayers: int | None = None
    """Attention and MLP sublayers to be removed."""

    @property
    def removes_sublayers(self) -> bool:
        return True

    def check(self) -> None:
        if self.target_sublayers is not None:
            require(self.target_sublayers >= 1, "method.target_sublayers", self.target_sublayers,
                    "a whole number >= 1")
        super().check()

    def no_target(self, name: str) -> tuple[str, str]:
        if name != "target_layers":
            return super().no_target(name)
        return (f"null: method={self.name} removes sublayers, and how many layers that leaves nobody requests",
                "Set method.target_sublayers or method.target_ratio instead.")

    def units(self, n_layers: int) -> list[Unit]:
        """What may be removed, from the bottom up: both sublayers of every layer that is not protected."""
        return [Unit(i, kind) for i in self.removable(n_layers) for kind in SUBLAYERS]

    def layers_to_remove(self, handle: ModelHandle) -> int:
        """No whole layer is requested; checks the size that is."""
        self.wanted(handle)
        return 0

    def layers_left(self, handle: ModelHandle) -> int | None:
        left = super().layers_left(handle)
        return None if self.removes_sublayers else left

    def bounds(self, n_layers: int) -> tuple[int, int] | None:
        return (1, n_layers) if self.removes_sublayers else super().bounds(n_layers)

    def greedy_cost(self, n_layers: int, share: float = 1.0, heads: int = 1) -> Count:
        """Of removing one sublayer after the other; how many a share of the parameters takes is a guess."""
        removals = self.target_sublayers or max(1, round((self.target_ratio or 0) * n_layers * 1.5))
        return greedy_cost(n_layers, 2 * len(self.removable(n_layers)), removals, 2, share, heads)

    def wanted(self, handle: ModelHandle) -> Wanted:
        """Whether a sublayer may go, given those removed so far: until the number is met, or while it brings the share
        nearer to the requested one. Loads no weights. Raises ConfigError: the size cannot be reached; names the
        nearest."""
        units = self.units(handle.n_layers)
        most = len(units) - (len(units) == 2 * handle.n_layers)  # something has to be left
        if self.target_sublayers is not None:
            n = self.target_sublayers
            require(n <= most, "method.target_sublayers", n, f"1 to {most} for {handle.name}",
                    "Protected layers and one sublayer at least stay.")
            return lambda removed, unit: len(removed) < n
        assert self.target_ratio is not None
        ratio, sizes, total = self.target_ratio, sublayer_sizes(handle), handle.n_params

        def share(removed: Sequence[Unit]) -> float:
            return sum(sizes[str(u.kind)] for u in removed) / total

        largest = max(share([u]) for u in units) if units else 0.0
        if share(units) < ratio - largest / 2:
            raise ConfigError(f"method.target_ratio = {ratio}; expected a share of the parameters that removing "
                              f"sublayers can reach: all {len(units)} that may go are {share(units):.3f}.")
        if (least := min(share([u]) for u in units)) > 2 * ratio:
            raise ConfigError(f"method.target_ratio = {ratio}; the smallest sublayer is {least:.4f} of {handle.name}.")
        return lambda removed, unit: abs(share([*removed, unit]) - ratio) < abs(share(removed) - ratio)

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        gone = self.remove(task, self.wanted(task.handle))
        return Selection(sublayers=tuple(Sublayer(u.layer, u.kind) for u in gone.units if u.kind), trace=gone.trace,
                         block_forwards=gone.block_forwards)

    @abstractmethod
    def remove(self, task: PlanTask, wanted: Wanted) -> Removed:
        """Which of `units` go."""


@register("method", "blockpruner")
@dataclass
class BlockPruner(SublayerBaseline):
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
        return greedy(task.engine, self.units(task.handle.n_layers), task.engine.loss, wanted, self.name)


METRICS = ("js", "kl", "angular", "norm", "perplexity")


@register("method", "finercut")
@dataclass
class FinerCut(SublayerBaseline):
    """Remove one sublayer at a time: the one without which the logits stay nearest to the dense model's.

    Attention and MLP sublayers compete; the lower one wins a tie. The first 40 % of them may go only when no other is
    left, as in the released code. Source: FinerCut, arXiv:2405.18218 (its Llama-3-8B config: js; its Llama-2-7B
    config: perplexity). Deviations: js is the Jensen-Shannon divergence itself, where the released code has the
    arguments of both divergences the other way round; angular tells obtuse angles apart, where the released code
    clamps them to a right one. The trace holds the distance with the sign turned.
    Cost: for the i-th removal 1.2 L - i candidates, each of which runs the layers from its own upwards, and the head
    twice: for 5 sublayers of 30 layers about 1,500 block forwards and 340 passes of the head.
    """

    metric: str = "js"
    """js, kl, angular, norm: distance of the logits to the dense model's (engine/vocabulary.py); or perplexity."""
    exclude_first: float = 0.4
    """The share of sublayers, from the bottom up, that go last."""

    def check(self) -> None:
        require_one_of("method.metric", self.metric, METRICS)
        require(0 <= self.exclude_first <= 1, "method.exclude_first", self.exclude_first, "a share in [0, 1]")
        super().check()

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        return self.greedy_cost(n_layers, share=1 - self.exclude_first, heads=1 if self.metric == "perplexity" else 2)

    def remove(self, task: PlanTask, wanted: Wanted) -> Removed:
        engine = task.engine

        def cost(slots: Slots) -> float:
            return engine.loss(slots) if self.metric == "perplexity" else engine.distance(slots, self.metric)

        units = self.units(task.handle.n_layers)
        late = math.floor(self.exclude_first * len(units))
        return greedy(engine, units[late:], cost, wanted, self.name, units[:late])


UNITS = ("layer", "attention", "mlp", "joint")


@register("method", "llm_drop")
@dataclass
class LLMDrop(SublayerBaseline):
    """Drop the parts with the highest mean over tokens of cos(state in, state out). One-shot, on dense states.

    A sublayer counts with its norm and residual: cos(x, x + f(norm(x))). `joint` ranks attention and MLP sublayers
    together. Nothing protected; the lower one wins a tie. Source: LLM-Drop, arXiv:2406.15786, discrete mode.
    Deviations: all runs at once over the run's calibration (released: C4 validation, 256 x 2048 tokens); its mode of
    consecutive blocks, whose code scores runs one longer than it drops, is method=angular.
    Cost: the dense pass, and half a layer more for each layer where sublayers are requested.
    """

    targets: ClassVar[tuple[str, ...]] = ("target_layers", "target_sublayers", "target_ratio")
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

    def identity(self) -> dict[str, Any]:
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
