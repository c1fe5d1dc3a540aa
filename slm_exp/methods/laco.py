"""Layer collapse: windows of a fixed size merged from the top downwards."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from slm_exp.core.cost import Count
from slm_exp.core.errors import PlanError, require
from slm_exp.core.registry import register
from slm_exp.core.types import Group, MergePlan, Trial
from slm_exp.engine.progress import ticking
from slm_exp.methods.base import Baseline, Selection
from slm_exp.search.task import PlanTask

log = logging.getLogger(__name__)

Groups = tuple[Group, ...]


@register("method", "laco")
@dataclass
class LaCo(Baseline):
    """Collapse windows of `window` layers into their lowest, from the top downwards, while the state stays similar.

    The released loop, stopped at the requested size, under the highest threshold that reaches it: after a merge the
    window moves down by `interval` (so it takes in the merged layer again), otherwise by one; at the top it is cut
    short. Nothing protected. Source: LaCo, arXiv:2402.11187; the defaults are those of its Llama-2-13B notebook.
    Deviations: the last windows are smaller where a whole one would remove too much, and a layer merged again is
    merged from the dense layers (which is the same for every rule that selects, top_layer above all: what the
    released code computes). The score is the run's `similarity`; flat_cosine is the released one.
    Cost: up to L candidates for every threshold tried, shared work done once.
    """

    keeps_one: ClassVar[bool] = True

    window: int = 7
    """Layers in a window, the one they collapse into included."""
    interval: int = 1
    """How far the window moves down after a merge."""
    merge: bool = True

    def check(self) -> None:
        super().check()
        self.at_least(2, "window")
        self.at_least(1, "interval")
        require(self.merge, "method.merge", self.merge, "true: method=laco merges",
                "merge_rule=keep_low keeps a window's lowest layer and removes the others.")

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        return Count(n_layers**2 / 2 + 2 * n_layers - (removed or 0), scores=n_layers,
                     note="laco tries thresholds until the size is met")

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        n, threshold = task.handle.n_layers, math.inf
        with ticking("laco", None, "candidate") as tick:

            def score(groups: Groups) -> float:
                tick(f"threshold {threshold:.4f}")
                return task.engine.score(MergePlan(n, _merged(groups)))

            while True:
                groups, trace = self.collapse(score, n, n_remove, threshold)
                if len(groups) == n - n_remove:
                    break
                rejected = [t.most for t in trace if not t.accepted]
                if not rejected:
                    raise PlanError(f"windows of {self.window} layers every {self.interval} leave {len(groups)} of {n} "
                                    f"layers at least, not {n - n_remove}. Set method.interval=1.")
                threshold = math.nextafter(max(rejected), -math.inf)
                log.info("%d layers left; next threshold %.6f (%d models scored)", len(groups), threshold,
                         task.engine.evaluations)
        return Selection(groups=_merged(groups), trace=trace, threshold=threshold if n_remove else None)

    def collapse(self, score: Callable[[Groups], float], n_layers: int, n_remove: int,
                 threshold: float) -> tuple[Groups, tuple[Trial, ...]]:
        """The released loop at one threshold: the layers left, as groups of original ones, and every candidate."""
        groups = MergePlan(n_layers).slots
        trace: list[Trial] = []
        low = max(n_layers - 1 - self.protect_last - min(self.window, n_remove + 1), self.protect_first)
        while low >= self.protect_first and (left := n_remove - (n_layers - len(groups))):
            stop = min(low + min(self.window, left + 1), len(groups) - self.protect_last)
            accepted = False
            if stop - low > 1:
                merged = Group(groups[low].start, groups[stop - 1].stop)
                candidate = (*groups[:low], merged, *groups[stop:])
                value = score(candidate)
                accepted = value > threshold
                trace.append(Trial(low, stop - 1, value, accepted))
                groups = candidate if accepted else groups
            low -= self.interval if accepted else 1
        return groups, tuple(trace)


def _merged(groups: Groups) -> Groups:
    return tuple(g for g in groups if g.stop - g.start > 1)
