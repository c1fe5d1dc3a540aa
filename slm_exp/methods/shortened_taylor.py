from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.cost import Count
from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.engine.progress import ticking
from slm_exp.methods.base import Selection, lowest
from slm_exp.methods.shortened import Shortened
from slm_exp.models.base import ModelHandle
from slm_exp.search.task import PlanTask


@register("method", "shortened_taylor")
@dataclass
class ShortenedTaylor(Shortened):
    """Drop the n layers of smallest sum over weights of |w dL/dw|, L the mean next-token loss of all samples. One-shot.

    Norm gains count, biases do not. The released code gives the same sum with all samples in one batch, its default.
    Gradients are float32 whatever the model's dtype. Cost: the dense pass, then every layer forward and backward.
    """

    def check_model(self, handle: ModelHandle) -> None:
        super().check_model(handle)
        quantised = getattr(handle.config, "quantization_config", None)
        require(quantised is None, "method", self.name, f"a method without gradients: {handle.name} is quantised",
                "Take the original checkpoint, or method=shortgpt.")

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        return Count(5 * n_layers - (removed or 0), 2)

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        import torch

        n, salience = task.handle.n_layers, {}
        with ticking("gradients", n, "layer") as tick:
            for i, weights in task.engine.gradients():
                salience[i] = sum(float((w * g).abs().sum(dtype=torch.float64))
                                  for name, (w, g, _) in weights.items() if name.endswith("weight"))
                tick(f"{salience[i]:.3g} of layer {i}")
        return lowest({i: salience[i] for i in self.removable(n)}, n_remove, block_forwards=n)
