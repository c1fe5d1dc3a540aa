"""Block influence: drop the layers that turn the states least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.methods.base import Baseline, Choice, lowest
from slm_exp.search.task import PlanTask

if TYPE_CHECKING:
    from torch import Tensor


@register("method", "shortgpt")
@dataclass
class ShortGPT(Baseline):
    """Drop the n layers of lowest block influence, 1 - mean over tokens of cos(state in, state out). One-shot.

    Nothing protected, as published. Source: ShortGPT, arXiv:2403.03853. The widely used unofficial code takes the
    last layer's output after the final norm, which inflates that layer's influence; here it is taken before.
    The trace holds 1 - influence. Cost: the dense pass.
    """

    def choose(self, task: PlanTask, n_remove: int) -> Choice:
        from slm_exp.search.reduced import ReducedModels

        models = ReducedModels(task)
        states = models.dense_states
        influence = {i: 1 - token_cosine(states[i], states[i + 1]) for i in self.removable(task.handle.n_layers)}
        dropped, trace = lowest(influence, n_remove, shown=lambda x: 1 - x)
        return Choice(dropped, trace=trace, models=models)


def token_cosine(x_NTD: Tensor, y_NTD: Tensor) -> float:
    """Mean over tokens of the cosine of two states; two zero states count as alike, one as a right angle."""
    from slm_exp.similarity.base import as_score, cosines, token_dots, wide

    x, y = wide(x_NTD), wide(y_NTD.to(x_NTD.device))
    return as_score(cosines(token_dots(x, y), token_dots(x, x), token_dots(y, y)).mean())
