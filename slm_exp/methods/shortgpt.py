from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.methods.base import Baseline, Selection, lowest
from slm_exp.search.task import PlanTask
from slm_exp.similarity.base import token_cosine


@register("method", "shortgpt")
@dataclass
class ShortGPT(Baseline):
    """Drop the n layers of lowest block influence, 1 - mean over tokens of cos(state in, state out). One-shot.

    Nothing protected, as published. Source: ShortGPT, arXiv:2403.03853. The widely used unofficial code takes the
    last layer's output after the final norm, which inflates that layer's influence; here it is taken before.
    The trace holds 1 - influence. Cost: the dense pass.
    """

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        states = task.engine.dense_states
        influence = {i: 1 - token_cosine(states[i], states[i + 1]) for i in self.removable(task.handle.n_layers)}
        return lowest(influence, n_remove, shown=lambda x: 1 - x)
