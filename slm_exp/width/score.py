"""The final score of a plan that narrows: the compressed model against the dense one."""

from __future__ import annotations

from slm_exp.engine.runner import BlockRunner
from slm_exp.models.base import ModelHandle
from slm_exp.search.task import PlanTask
from slm_exp.width.base import NarrowedScore


def narrowed_score(task: PlanTask, compressed: ModelHandle) -> NarrowedScore:
    """The score of the narrowed model, which the search has not seen. Cost: one pass through both models. `task`: the
    run's, whose handle is the dense model."""
    if int(compressed.config.hidden_size) != int(task.handle.config.hidden_size):
        return NarrowedScore(None)
    against = task.similarity.against(BlockRunner(task.handle, task.tokens.tokens_NT).last_state(), task.kernel)
    return NarrowedScore(against(BlockRunner(compressed, task.tokens.tokens_NT).last_state()))
