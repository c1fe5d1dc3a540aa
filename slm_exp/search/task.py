"""What a method is given to decide on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from slm_exp.core.types import MergePlan
from slm_exp.models.base import ModelHandle
from slm_exp.search.inputs import SearchInputs
from slm_exp.similarity.layers import layer_similarity

if TYPE_CHECKING:
    from slm_exp.search.scoring import ScoringEngine


@dataclass(frozen=True)
class PlanTask(SearchInputs):
    """Everything a method may look at. A copy (`dataclasses.replace`) has an engine, and so a cost, of its own."""

    @cached_property
    def engine(self) -> ScoringEngine:
        """States of the dense model; scores, losses and distances of trial models. Nothing runs before it is needed."""
        from slm_exp.search.scoring import ScoringEngine

        return ScoringEngine(self)

    def scored(self, plan: MergePlan, compensate: str | None) -> MergePlan:
        """A plan with its compensation, its final score, what its sublayers leave behind, and the engine's cost added.
        Cost: what the engine has spent so far, one model, and for a compensation one pass over the dense layers."""
        from slm_exp.search.compensation import scored

        return scored(self.engine, self.with_fitted(plan), compensate)

    def with_fitted(self, plan: MergePlan) -> MergePlan:
        """A plan with the file of its merged layers, where the rule fits them. Cost: none for windows that were
        scored."""
        if not (plan.groups and self.rule.fits):
            return plan
        from slm_exp.search.fitting import Windows

        return replace(plan, fitted=Windows(self).file(plan))

    def on(self, handle: ModelHandle, with_matrix: bool) -> PlanTask:
        """The task for the model to be cut, which is not the dense one where width comes before depth. `with_matrix`:
        whether the layer similarity matrix is needed: a narrower model has its own. Cost: that of the matrix."""
        if handle is self.handle:
            return self
        matrix = layer_similarity(handle, self.tokens, self.kernel, self.similarity) if with_matrix else None
        return replace(self, handle=handle, layer_similarity=matrix)
