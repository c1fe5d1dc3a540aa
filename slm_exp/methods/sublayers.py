"""What methods that remove attention or MLP sublayers share: the size asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.errors import ConfigError, require
from slm_exp.methods.base import Baseline, Choice
from slm_exp.search.task import PlanTask

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle
    from slm_exp.search.greedy import Removed, Unit
    from slm_exp.search.reduced import ReducedModels

    Wanted = Callable[[Sequence[Unit], Unit], bool]


@dataclass
class SublayerBaseline(Baseline):
    """A method that removes attention and MLP sublayers, a number of them or a share of the parameters.

    `target_ratio` counts the projections of the sublayers removed, which the checkpoint keeps as long as the layer's
    other half is there: it is what an engine that skips them could leave out. A subclass gives `find`.
    """

    targets: ClassVar[tuple[str, ...]] = ("target_sublayers", "target_ratio")
    mergeable: ClassVar[bool] = False

    target_sublayers: int | None = None
    """Attention and MLP sublayers to be removed."""

    def check(self) -> None:
        if "target_layers" not in self.targets:
            require(self.target_layers is None, "method.target_layers", self.target_layers,
                    f"null: method={self.name} removes halves of layers, and how many layers that leaves is not asked",
                    "Set method.target_sublayers or method.target_ratio instead.")
        if self.target_sublayers is not None:
            require(self.target_sublayers >= 1, "method.target_sublayers", self.target_sublayers,
                    "a whole number >= 1")
        super().check()

    def units(self, n_layers: int) -> list[Unit]:
        """What may be removed, from the bottom up: both halves of every layer that is not protected."""
        from slm_exp.search.greedy import sublayers

        return sublayers(self.removable(n_layers))

    def layers_to_remove(self, handle: ModelHandle) -> int:
        """None is asked for as a whole; checks the size that is."""
        self.wanted(handle)
        return 0

    def wanted(self, handle: ModelHandle) -> Wanted:
        """Whether a part may go, given those removed so far: until the number is met, or while it brings the share
        nearer to the one asked. Loads no weights.

        Raises:
            ConfigError: the size cannot be reached; names the nearest.
        """
        from slm_exp.merging.surgery import half_sizes

        units = self.units(handle.n_layers)
        most = len(units) - (len(units) == 2 * handle.n_layers)  # something has to be left
        if self.target_sublayers is not None:
            n = self.target_sublayers
            require(n <= most, "method.target_sublayers", n, f"1 to {most} for {handle.name}",
                    "Protected layers and one half at least stay.")
            return lambda removed, unit: len(removed) < n
        assert self.target_ratio is not None
        ratio, sizes, total = self.target_ratio, half_sizes(handle), handle.n_params

        def share(removed: Sequence[Unit]) -> float:
            return sum(sizes[str(u.half)] for u in removed) / total

        largest = max(share([u]) for u in units) if units else 0.0
        if share(units) < ratio - largest / 2:
            raise ConfigError(f"method.target_ratio = {ratio}; expected a share of the parameters that removing "
                              f"sublayers can reach: all {len(units)} that may go are {share(units):.3f}.")
        if (least := min(share([u]) for u in units)) > 2 * ratio:
            raise ConfigError(f"method.target_ratio = {ratio}; the smallest sublayer is {least:.4f} of {handle.name}.")
        return lambda removed, unit: abs(share([*removed, unit]) - ratio) < abs(share(removed) - ratio)

    def choose(self, task: PlanTask, n_remove: int) -> Choice:
        from slm_exp.search.reduced import ReducedModels

        models = ReducedModels(task)
        found = self.find(models, self.wanted(task.handle))
        halves = tuple({"layer": unit.layer, "kind": unit.half} for unit in found.units)
        return Choice(sublayers=halves, trace=found.trace, target={"sublayers": len(halves)}, models=models,
                      block_forwards=found.block_forwards)

    @abstractmethod
    def find(self, models: ReducedModels, wanted: Wanted) -> Removed:
        """Which of `units` go."""
