"""Sliding layer merging: the released search, decision for decision, and plans of a requested size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from slm_exp.core.cost import Count
from slm_exp.core.errors import require, require_one_of
from slm_exp.core.registry import Fields, register
from slm_exp.core.together import Together
from slm_exp.core.types import MergePlan, Target
from slm_exp.methods.base import SIZES, Method
from slm_exp.models.base import ModelHandle
from slm_exp.search.path import BUDGET
from slm_exp.search.state import SearchState
from slm_exp.search.task import PlanTask

THRESHOLD = 0.9
"""Where no size is requested."""


@register("method", "slm")
@dataclass
class SLM(Method):
    """Merge layers from the top downwards while the model's last hidden state stays similar to the dense one's.

    A window grows downwards while the trial model scores above the threshold; what passed becomes one layer, and the
    search goes on below. Source: SLM.py of the released code of Ding et al. 2025, arXiv:2502.19159. Same candidates,
    scores and groups with `commit_open_window=false`, but no candidate is scored twice (the released loop scores
    every committed model again) and each one runs only the layers it changes the input of.
    """

    targets: ClassVar[tuple[str, ...]] = SIZES

    threshold_range: list[float] = field(default_factory=lambda: [0.5, 1.0])
    """Thresholds in which a target size is searched."""
    max_evaluations: int | None = None
    """Candidates that the search for a target size may score; null is 400."""
    protect_first: int = 0
    """Layers at the bottom that are never merged."""
    protect_last: int = 1
    """Layers at the top that are never merged; the released code protects one."""
    commit_open_window: bool = True
    """Merge a window that is still open when the search reaches the bottom; the released code forgets it."""
    screen_dtype: str | None = None
    """bfloat16: score in it, and again in the model's own dtype wherever the difference could decide. Left out on a
    machine whose processor has no instructions for it."""

    early_stop: bool = False
    """End a candidate as soon as it is certain to be rejected, whatever its remaining samples would say (hardest first;
    search/early.py). Decisions stay, the trace has a bound in place of the score."""

    def check(self) -> None:
        super().check()
        ok = len(self.threshold_range) == 2 and -1 <= self.threshold_range[0] < self.threshold_range[1] <= 1
        require(ok, "method.threshold_range", self.threshold_range, "two scores in [-1, 1], the lower one first",
                "For example [0.5,1.0].")
        self.at_least(1, "max_evaluations")
        self.at_least(0, "protect_first", "protect_last")
        if self.screen_dtype is not None:
            require_one_of("method.screen_dtype", self.screen_dtype, ("bfloat16",))

    def refuses(self, others: Together) -> str | None:
        if self.early_stop and not others.by_sample:
            return (f"method.early_stop = true with similarity={others.similarity}, which is no mean of one score per "
                    "sample, so some samples bound nothing; expected early_stop=false, or e.g. similarity=flat_cosine.")
        return None

    def in_force(self) -> list[str]:
        return [] if self.requested is not None else [f"method: no size is set, so threshold {THRESHOLD}"]

    def identity(self) -> Fields:
        """The settings that decide: where a threshold does, how target sizes are searched does not."""
        out = {k: v for k, v in super().identity().items() if k != "early_stop" or v}
        if not self._sized:
            out = {k: v for k, v in out.items() if k not in ("threshold_range", "max_evaluations")}
            out["threshold"] = self._threshold
        return out

    @property
    def _sized(self) -> bool:
        """Whether a size is requested, not a threshold."""
        return self.threshold is None and self.requested is not None

    @property
    def _threshold(self) -> float:
        return THRESHOLD if self.threshold is None else self.threshold

    def layers_left(self, handle: ModelHandle) -> int | None:
        return self.requested_layers(handle, self._fewest(handle.n_layers),
                                     "method.protect_first and protect_last keep layers.")

    def bounds(self, n_layers: int) -> tuple[int, int] | None:
        return self._fewest(n_layers), n_layers

    def start(self, n_layers: int) -> SearchState:
        """Where the search begins: the two layers below the protected top."""
        return SearchState.start(n_layers, self.protect_first, self.protect_last)

    def _fewest(self, n_layers: int) -> int:
        """Layers left when every candidate passes: every layer below the window is in question once."""
        start = self.start(n_layers)
        return max(1, n_layers - max(0, start.high - start.floor))

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        n, start = n_layers, self.start(n_layers)
        candidates = max(0, start.high - start.floor)
        if not self._sized:
            least, most = start.block_forwards(n)
            return Count(n + most, scores=candidates,
                         note=f"the search takes {n + least} to {n + most} block forwards, fewer the more it merges"
                              + ("; early_stop takes off what rejected candidates leave out" * self.early_stop))
        budget = min(self.max_evaluations or BUDGET, 2**candidates)
        blocks = n + budget * (0.57 * n)  # 6,450 block forwards for 379 candidates of 30 layers
        return Count(blocks, scores=budget,
                     note=f"up to {budget} candidates are scored for a size (method.max_evaluations)")

    def plan_from_scores(self, n_layers: int, scores: Mapping[str, float], rule_name: str) -> MergePlan | None:
        if self._sized or self.compensate:
            return None
        end = self.start(n_layers).replay(n_layers, self._threshold, scores)
        if end is None:
            return None
        groups = (end.close() if self.commit_open_window else end).groups
        return MergePlan(n_layers, groups, method=self.name, rule=rule_name, threshold=self._threshold)

    def plan(self, task: PlanTask) -> MergePlan:
        """Decide. Cost: L block forwards for the dense model, then 1 + the layers above the window per candidate."""
        from slm_exp.search.threshold import slide

        layers, size = self.layers_left(task.handle), None
        if layers is not None:
            size = Target(self.requested, False, layers)
        low, high = self.threshold_range
        plan = slide(task, self.start(task.handle.n_layers), self._threshold, size, (low, high),
                     self.max_evaluations or BUDGET, self.commit_open_window, self.screen_dtype, self.early_stop)
        if plan.target is not None:
            plan = replace(plan, target=replace(plan.target, budget=self.reached(task.handle, plan)))
        plan = replace(plan, method=self.name)
        return replace(task).scored(plan, self.compensate) if self.compensate and plan.groups else plan
