"""The final score of a plan that narrows: the compressed model against the dense one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from slm_exp.width.base import WidthDecision

if TYPE_CHECKING:
    from torch import Tensor

    from slm_exp.core.types import MergePlan
    from slm_exp.models.base import ModelHandle
    from slm_exp.search.task import PlanTask


def rescored(task: PlanTask, compressed: ModelHandle, plan: MergePlan) -> MergePlan:
    """The plan with the score of the narrowed model, which the search has not seen. Kept in the task's store.

    Args:
        task: the run's, whose handle is the dense model.
    Cost: one pass through both models.
    """

    def last_state(handle: ModelHandle) -> Tensor:
        from slm_exp.engine.runner import BlockRunner, Slot

        runner = BlockRunner(handle, task.tokens.tokens_NT)
        h_NTD = runner.embed()
        for i in range(handle.n_layers):
            h_NTD = runner.block(Slot(i), h_NTD)
        return runner.finish(h_NTD)

    def score() -> WidthDecision:
        if int(compressed.config.hidden_size) != int(task.handle.config.hidden_size):
            return WidthDecision({"final_score": None})  # states of another size have no cosine
        against = task.similarity.against(last_state(task.handle), task.kernel)
        return WidthDecision({"final_score": against(last_state(compressed))})

    inputs = {
        "model": task.handle.digest,
        "compressed": compressed.digest,
        "device": task.handle.device.type,
        "tokens": task.tokens.digest,
        "similarity": task.similarity.identity(),
        "kernel": task.kernel.identity(),
    }
    found, _ = task.store.cached("width", inputs, WidthDecision, score)
    return dataclasses.replace(plan, final_score=(found.data or {})["final_score"])
