"""Shortened LLaMA by perplexity: drop the layers that the model misses least, each judged alone."""

from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.registry import register
from slm_exp.methods.base import Baseline, Choice
from slm_exp.search.task import PlanTask


@register("method", "shortened_ppl")
@dataclass
class ShortenedPPL(Baseline):
    """Drop the n layers without which, one alone at a time, perplexity over the calibration is lowest. One-shot.

    The first 4 and the last 2 layers are protected: the released code applies its "+" rule to every order unless it
    is told not to; protect_first=0 protect_last=0 is without it. Source: Shortened LLaMA, arXiv:2402.02834. The loss
    is ranked, whose order is that of its exponential, perplexity; protected layers are not scored, which decides
    nothing. The trace holds the loss with the sign turned.
    Cost: the dense pass, and for every layer not protected the layers above it and the head.
    """

    protect_first: int = 4
    protect_last: int = 2

    def choose(self, task: PlanTask, n_remove: int) -> Choice:
        from slm_exp.search.greedy import Unit, each_alone, one_shot, traced
        from slm_exp.search.reduced import ReducedModels

        models = ReducedModels(task)
        units = [Unit(i) for i in self.removable(task.handle.n_layers)]
        if n_remove == 0:
            return Choice(models=models)
        costs = each_alone(models.dense, units, models.loss, self.name)
        taken = one_shot(models.dense, costs, lambda removed, _: len(removed) < n_remove)
        return Choice(tuple(u.layer for u in taken), trace=tuple(traced(costs, taken, models.dense)), models=models)
