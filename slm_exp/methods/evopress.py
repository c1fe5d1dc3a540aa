from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from slm_exp.core.cost import Count
from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.core.types import SUBLAYERS
from slm_exp.methods.base import Selection
from slm_exp.methods.objectives import OBJECTIVES, SetSearch
from slm_exp.models.base import ModelHandle
from slm_exp.search.evolution import Evolution, Parts, plan_without
from slm_exp.search.greedy import Unit
from slm_exp.search.task import PlanTask


@register("method", "evopress")
@dataclass
class EvoPress(SetSearch):
    """Evolve the set of removed parts: swap a few, look quickly at many, closely at few, keep the best.

    A state takes away as many attention as MLP sublayers (`tied`: whole layers). The best of `starts` random states is
    the parent. In a generation each child is the parent with up to `swaps` parts swapped for others of their kind; the
    `survivors` best on a part of the tokens are scored on all, and the best of them and the parent goes on.
    Source: EvoPress, arXiv:2410.14649, github.com/IST-DASLab/EvoPress (its depth pruning: 32 children, 2 of them looked
    at closely, k(L - k)/1.5 generations, KL). Deviations: the quick look is at the first `quick_share` of the
    calibration's sequences, the same in all generations (released: 2,048 tokens drawn anew each time, of 131,072), so
    that values are kept and a killed search goes on; `objective` may be another. The trace holds the scores on all
    tokens with the sign turned; `low` and `high` are the layers, in original numbers, between which a child differs.
    Cost: for a generation about `children` x `quick_share` + `survivors` models, from their lowest change upwards.
    """

    objective: str = "kl"
    starts: int = 64
    """Random states to start from the best of."""
    children: int = 32
    survivors: int = 2
    """Children of a generation that are scored on all tokens."""
    swaps: int = 3
    """Of a child at most; the smaller of two draws is taken."""
    generations: int | None = None
    """Null: k(L - k)/1.5 for k of L layers' parts removed, as published."""
    max_evaluations: int | None = None
    """States that may be scored, quick looks included; null: as many as the generations take."""
    quick_share: float = 0.2
    """Of the calibration's sequences, for the quick look; one at least."""

    def check(self) -> None:
        self.at_least(1, "starts", "children", "survivors", "swaps", "generations", "max_evaluations")
        require(0 < self.quick_share <= 1, "method.quick_share", self.quick_share, "a share in (0, 1]")
        require(self.target_sublayers is None or self.target_sublayers % 2 == 0, "method.target_sublayers",
                self.target_sublayers, "an even number: as many attention as MLP sublayers go")
        super().check()

    def pairs(self, handle: ModelHandle) -> int:
        """How many attention, and how many MLP sublayers go, of a search that is not tied. Loads no weights. Raises
        ConfigError: the size cannot be reached."""
        self.wanted(handle)
        most = len(self.removable(handle.n_layers)) - (len(self.removable(handle.n_layers)) == handle.n_layers)
        if (budget := self.budget(handle)) is not None:
            n = handle.n_layers - budget.layers(handle.n_layers - most)
        elif self.target_sublayers is not None:
            n = self.target_sublayers // 2
        else:
            assert self.target_ratio is not None
            n = max(1, round(self.target_ratio * handle.n_params / sum(handle.sublayer_params[0].values())))
        require(n <= most, "method.target_sublayers", 2 * n, f"at most {2 * most} for {handle.name}")
        return n

    def layers_to_remove(self, handle: ModelHandle) -> int:
        if self.removes_sublayers and not self.unmeasured:
            self.pairs(handle)
        return super().layers_to_remove(handle)

    def _generations(self, n_layers: int, k: int) -> int:
        return self.generations if self.generations is not None else max(1, round(k * (n_layers - k) / 1.5))

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        k = removed or (self.target_sublayers or 0) // 2 or max(1, round(self.share_removed * n_layers * 1.2))
        generations, per = self._generations(n_layers, k), self.children * self.quick_share + self.survivors
        models = self.starts * self.quick_share + generations * per
        if self.max_evaluations is not None:
            models = min(models, self.max_evaluations * max(self.quick_share, per / (self.children + self.survivors)))
        heads = models * OBJECTIVES[self.objective]
        return Count(n_layers * (2 + self.quick_share) + models * (n_layers - k) * 0.75, heads, scores=models,
                     note=f"evopress: {generations} generations (method.generations, method.max_evaluations)")

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        n, free = task.handle.n_layers, self.removable(task.handle.n_layers)
        if self.removes_sublayers:
            k = self.pairs(task.handle)
            pools, counts = [[Unit(i, kind) for i in free] for kind in SUBLAYERS], [k, k]
        else:
            k, pools, counts = n_remove, [[Unit(i) for i in free]], [n_remove]
        ids_NT = task.tokens.tokens_NT
        few = max(1, round(self.quick_share * len(ids_NT)))
        quick = replace(task, tokens=replace(task.tokens, tokens_NT=ids_NT[:few])).engine
        close = task.engine

        def settle(parts: Parts) -> None:
            for engine in (quick, close):
                engine.commit(plan_without(n, parts))

        evolution = Evolution(self.starts, self.children, self.survivors, self.swaps, self._generations(n, k),
                              self.max_evaluations)
        found = evolution.run(pools, counts, self.cost_of(quick), self.cost_of(close), settle, Random(task.seed))
        return self.selected(found, round(quick.block_forwards * few / len(ids_NT)))
