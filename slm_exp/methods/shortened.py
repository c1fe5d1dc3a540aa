"""Shortened LLaMA: drop the layers of least weight magnitude, Taylor importance, or effect on perplexity."""

from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.cost import Count
from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.engine.progress import ticking
from slm_exp.methods.base import Baseline, Selection, lowest
from slm_exp.models.base import ModelHandle
from slm_exp.search.greedy import Unit, each_alone, one_shot, traced
from slm_exp.search.task import PlanTask


@dataclass
class Shortened(Baseline):
    """The first 4 and the last 2 layers are protected: the released code applies its "+" rule to every order unless it
    is told not to; protect_first=0 protect_last=0 is without it. Source: Shortened LLaMA, arXiv:2402.02834."""

    protect_first: int = 4
    protect_last: int = 2


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
                                  for name, (w, g) in weights.items() if name.endswith("weight"))
                tick(f"{salience[i]:.3g} of layer {i}")
        return lowest({i: salience[i] for i in self.removable(n)}, n_remove, block_forwards=n)


@register("method", "shortened_ppl")
@dataclass
class ShortenedPPL(Shortened):
    """Drop the n layers without which, one alone at a time, perplexity over the calibration is lowest. One-shot.

    The loss is ranked, whose order is that of its exponential, perplexity; protected layers are not scored, which
    decides nothing. The trace holds the loss with the sign turned.
    Cost: the dense pass, and for every layer not protected the layers above it and the head.
    """

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        above = [n_layers - 1 - i for i in self.removable(n_layers)]
        return Count(sum(above) + 2 * n_layers - (removed or 0), len(above))

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        if n_remove == 0:
            return Selection()
        dense, units = task.engine.dense, [Unit(i) for i in self.removable(task.handle.n_layers)]
        costs = each_alone(dense, units, task.engine.loss, self.name)
        taken = one_shot(dense, costs, lambda removed, _: len(removed) < n_remove)
        return Selection(tuple(u.layer for u in taken), trace=tuple(traced(costs, taken, dense)))
