from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.methods.base import Selection, lowest
from slm_exp.methods.shortened import Shortened
from slm_exp.search.task import PlanTask


@register("method", "shortened_magnitude")
@dataclass
class ShortenedMagnitude(Shortened):
    """Drop the n layers of smallest sum of absolute weights (norm gains too, biases not). One-shot.

    Looks at no tokens. Cost: one pass over the weights.
    """

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        import torch

        layers = task.handle.layers
        size = {i: sum(float(p.abs().sum(dtype=torch.float64))
                       for name, p in layers[i].named_parameters() if name.endswith("weight"))
                for i in self.removable(len(layers))}
        return lowest(size, n_remove)
