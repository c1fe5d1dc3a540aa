"""Sliding layer merging: the released search, decision for decision, and plans of a size asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import require, require_one_of
from slm_exp.core.registry import register
from slm_exp.core.types import MergePlan, Trial
from slm_exp.methods.base import Method, scored
from slm_exp.search.task import PlanTask

if TYPE_CHECKING:
    from slm_exp.models.base import ModelHandle
    from slm_exp.search.state import SearchState

THRESHOLD = 0.9
"""Where no size is asked for."""


@register("method", "slm")
@dataclass
class SLM(Method):
    """Merge layers from the top downwards while the model's last hidden state stays like the dense one's.

    A window grows downwards while the trial model scores above the threshold; what passed becomes one layer, and the
    search goes on below. Source: SLM.py of the released code of Ding et al. 2025, arXiv:2502.19159. Same candidates,
    scores and groups with `commit_open_window=false`, but no candidate is scored twice (the released loop scores
    every committed model again) and each one runs only the layers it changes the input of.
    """

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
    """bfloat16: score in it, and again in the model's own dtype wherever the difference could decide."""

    def check(self) -> None:
        super().check()
        wanted = "two scores in [-1, 1], the lower one first"
        ok = len(self.threshold_range) == 2 and -1 <= self.threshold_range[0] < self.threshold_range[1] <= 1
        require(ok, "method.threshold_range", self.threshold_range, wanted, "For example [0.5,1.0].")
        ok = self.max_evaluations is None or self.max_evaluations >= 1
        require(ok, "method.max_evaluations", self.max_evaluations, "null or a whole number >= 1")
        for name in ("protect_first", "protect_last"):
            require(getattr(self, name) >= 0, f"method.{name}", getattr(self, name), "a whole number >= 0")
        if self.screen_dtype is not None:
            require_one_of("method.screen_dtype", self.screen_dtype, ("bfloat16",))

    def identity(self) -> dict[str, Any]:
        """The settings that decide: where a threshold does, how target sizes are searched does not."""
        out = super().identity()
        if self.target_layers is None and self.target_ratio is None:
            out = {k: v for k, v in out.items() if k not in ("threshold_range", "max_evaluations")}
            out["threshold"] = self._threshold
        return out

    @property
    def _threshold(self) -> float:
        return THRESHOLD if self.threshold is None else self.threshold

    def check_model(self, handle: ModelHandle) -> None:
        self._layers_asked(handle)

    def _layers_asked(self, handle: ModelHandle) -> int | None:
        """Layers to be left, or None where a threshold decides.

        Raises:
            ConfigError: the size cannot be reached; names the nearest.
        """
        from slm_exp.search.target import layers_for_ratio

        start = self.start(handle.n_layers)
        fewest = max(1, handle.n_layers - max(0, start.high - start.floor))
        if self.target_ratio is not None:
            return layers_for_ratio(handle, self.target_ratio, fewest)
        if self.target_layers is not None:
            require(fewest <= self.target_layers <= handle.n_layers, "method.target_layers", self.target_layers,
                    f"{fewest} to {handle.n_layers} for {handle.name}",
                    "method.protect_first and protect_last keep layers.")
        return self.target_layers

    def start(self, n_layers: int) -> SearchState:
        """Where the search begins: the two layers below the protected top."""
        from slm_exp.search.state import SearchState

        return SearchState.start(n_layers, self.protect_first, self.protect_last)

    def plan(self, task: PlanTask) -> MergePlan:
        """Decide. Cost: L block forwards for the dense model, then 1 + the layers above the window per candidate."""
        from slm_exp.search.cost import sizes
        from slm_exp.search.reduced import ReducedModels
        from slm_exp.search.refit import note
        from slm_exp.search.scoring import CandidateScorer
        from slm_exp.search.target import best_of_size
        from slm_exp.search.threshold import screened_search, search

        threshold, target = self._threshold, None
        n_layers = task.handle.n_layers
        start = self.start(n_layers)
        scorer = CandidateScorer(task, top=start.high)
        layers = self._layers_asked(task.handle)
        if layers is not None:
            low, high = self.threshold_range
            found = best_of_size(scorer, start, n_layers, layers, low, high, self.commit_open_window,
                                 self.max_evaluations)
            threshold = (found.plan.low + found.plan.high) / 2
            target = {
                "asked": self.target_layers if self.target_ratio is None else self.target_ratio,
                "complete": found.complete,
                "layers": layers,
                "threshold": [found.plan.low, found.plan.high],
                "neighbours": [
                    {"threshold": p.low, "n_layers": p.n_layers, "final_score": p.final_score} for p in found.neighbours
                ],
                "sizes": sizes(task.handle, task.rule, found.met, int(task.tokens.tokens_NT.shape[1])),
            }
        if self.screen_dtype is None or layers is not None:  # the path's scores are exact and known
            steps = search(scorer, start, threshold)
        else:
            steps = screened_search(scorer, start, threshold, self.screen_dtype)
        end = steps[-1].next if steps else start
        notes: tuple[str, ...] = ()
        if window := end.open_group:
            about = f"layers {window.start}..{window.stop - 1} had passed when the search reached the bottom"
            if self.commit_open_window:
                end = end.close()
                notes = (f"{about}: merged; the released code would leave them (method.commit_open_window=false).",)
            else:
                notes = (f"{about}: left as they are, as the released code does.",)
        final = 1.0 if end.model is None else scorer.score(end.model)  # known already, unless it was screened
        plan = MergePlan(
            n_layers=n_layers,
            groups=end.groups,
            method=self.name,
            rule=task.rule.name,
            similarity=task.similarity.name,
            threshold=threshold,
            target=target,
            final_score=final,
            trace=tuple(Trial(s.state.low, s.state.high, s.score, s.accepted) for s in steps),
            evaluations=len(scorer.asked),
            block_forwards=scorer.block_forwards,
            notes=(*notes, *note(task)),
        )
        return scored(task, plan, ReducedModels(task), self.compensate) if self.compensate and end.groups else plan
