"""The final score of a plan that narrows: the compressed model against the dense one."""

from __future__ import annotations

from torch import Tensor

from slm_exp.engine.runner import BlockRunner, Slot
from slm_exp.models.base import ModelHandle
from slm_exp.search.task import PlanTask
from slm_exp.width.base import NarrowedScore


def narrowed_score(task: PlanTask, compressed: ModelHandle) -> NarrowedScore:
    """The score of the narrowed model, which the search has not seen. Cost: one pass through both models. `task`: the
    run's, whose handle is the dense model."""
    if int(compressed.config.hidden_size) != int(task.handle.config.hidden_size):
        return NarrowedScore(None)
    against = task.similarity.against(_last_state(task, task.handle), task.kernel)
    return NarrowedScore(against(_last_state(task, compressed)))


def _last_state(task: PlanTask, handle: ModelHandle) -> Tensor:
    runner = BlockRunner(handle, task.tokens.tokens_NT)
    h_NTD = runner.embed()
    for i in range(handle.n_layers):
        h_NTD = runner.block(Slot(i), h_NTD)
    return runner.finish(h_NTD)
