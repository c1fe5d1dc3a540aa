"""Weight magnitude: drop the layers of smallest weights."""

from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.methods.base import Baseline, Selection, lowest
from slm_exp.search.task import PlanTask


@register("method", "shortened_magnitude")
@dataclass
class ShortenedMagnitude(Baseline):
    """Drop the n layers of smallest sum of absolute weights (norm gains too, biases not). One-shot.

    The first 4 and the last 2 layers are protected, as in the released code's "+" rule; protect_first=0 protect_last=0
    is without it. Source: Shortened LLaMA, arXiv:2402.02834. Looks at no tokens. Cost: one pass over the weights.
    """

    protect_first: int = 4
    protect_last: int = 2

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        import torch

        layers = task.handle.layers
        size = {
            i: sum(float(p.abs().sum(dtype=torch.float64))
                   for name, p in layers[i].named_parameters() if name.endswith("weight"))
            for i in self.removable(len(layers))
        }
        dropped, trace = lowest(size, n_remove)
        return Selection(dropped, trace=trace)
