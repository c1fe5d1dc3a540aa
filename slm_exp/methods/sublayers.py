"""Methods that remove attention or MLP sublayers: BlockPruner, FinerCut, LLM-Drop, and what they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slm_exp.core.cost import Count
from slm_exp.core.errors import ConfigError, require
from slm_exp.core.types import SUBLAYERS, Sublayer
from slm_exp.methods.base import BUDGETS, Baseline, Selection, greedy_cost
from slm_exp.models.base import ModelHandle
from slm_exp.search.greedy import Removed, Unit, Wanted
from slm_exp.search.task import PlanTask


@dataclass
class SublayerBaseline(Baseline):
    """A method that removes attention and MLP sublayers, a number of them or a share of the parameters.

    `target_ratio` counts the projections of the sublayers removed, which the checkpoint keeps as long as the layer's
    other sublayer is there: it is what an engine that skips them could leave out. A subclass gives `remove`.
    """

    targets: ClassVar[tuple[str, ...]] = ("target_sublayers", "target_ratio", *BUDGETS)
    mergeable: ClassVar[bool] = False

    target_sublayers: int | None = None
    """Attention and MLP sublayers to be removed."""

    @property
    def removes_sublayers(self) -> bool:
        return True

    def check(self) -> None:
        self.at_least(1, "target_sublayers")
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
        if not self.unmeasured:
            self.wanted(handle)
        return 0

    def layers_left(self, handle: ModelHandle) -> int | None:
        left = super().layers_left(handle)
        return None if self.removes_sublayers else left

    def bounds(self, n_layers: int) -> tuple[int, int] | None:
        return (1, n_layers) if self.removes_sublayers else super().bounds(n_layers)

    def greedy_cost(self, n_layers: int, share: float = 1.0, heads: int = 1) -> Count:
        """Of removing one sublayer after the other; how many a share of the parameters takes is a guess."""
        removals = self.target_sublayers or max(1, round(self.share_removed * n_layers * 1.5))
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
        if (budget := self.budget(handle)) is not None:
            budget.check([(u.layer, kind) for u in units if (kind := u.kind)])
            costs = budget.costs
            return lambda removed, unit: not budget.fits(costs.without((u.layer, u.kind) for u in removed if u.kind))
        assert self.target_ratio is not None
        ratio, sizes, total = self.target_ratio, handle.sublayer_params, handle.n_params

        def share(removed: Sequence[Unit]) -> float:
            return sum(sizes[u.layer][str(u.kind)] for u in removed) / total

        largest = max(share([u]) for u in units) if units else 0.0
        if share(units) < ratio - largest / 2:
            raise ConfigError(f"method.target_ratio = {ratio}; expected a share of the parameters that removing "
                              f"sublayers can reach: all {len(units)} that may go are {share(units):.3f}.")
        if (least := min(share([u]) for u in units)) > 2 * ratio:
            raise ConfigError(f"method.target_ratio = {ratio}; the smallest sublayer is {least:.4f} of {handle.name}.")
        return lambda removed, unit: abs(share([*removed, unit]) - ratio) < abs(share(removed) - ratio)


@dataclass
class GreedySublayers(SublayerBaseline):
    """A method that takes one sublayer after the other."""

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        gone = self.remove(task, self.wanted(task.handle))
        return Selection(sublayers=tuple(Sublayer(u.layer, u.kind) for u in gone.units if u.kind), trace=gone.trace,
                         block_forwards=gone.block_forwards)

    @abstractmethod
    def remove(self, task: PlanTask, wanted: Wanted) -> Removed:
        """Which of `units` go."""
