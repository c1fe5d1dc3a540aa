"""Methods that remove whole layers, by position or chance, by what layers do to the states, or by the loss."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from random import Random
from typing import TYPE_CHECKING

from slm_exp.core.cost import Count
from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.core.types import Trial
from slm_exp.engine.progress import ticking
from slm_exp.methods.base import Baseline, Selection, greedy_cost, lowest
from slm_exp.models.base import ModelHandle
from slm_exp.search.greedy import Unit, each_alone, greedy, one_shot, traced
from slm_exp.search.task import PlanTask
from slm_exp.similarity.base import token_cosine

if TYPE_CHECKING:
    from torch import Tensor


@register("method", "first")
@dataclass
class FirstLayers(Baseline):
    """Drop the n lowest layers that are not protected; nothing is. A floor for comparisons."""

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        return Selection(tuple(self.removable(task.handle.n_layers)[:n_remove]))


@register("method", "last")
@dataclass
class LastLayers(Baseline):
    """Drop the n highest layers that are not protected; nothing is. A floor for comparisons."""

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        layers = self.removable(task.handle.n_layers)
        return Selection(tuple(layers[len(layers) - n_remove :]))


@register("method", "random")
@dataclass
class RandomLayers(Baseline):
    """Drop n layers drawn without replacement by the run's `seed`; `contiguous` draws a run. Nothing protected.

    Looks at neither tokens nor weights.
    """

    contiguous: bool = False
    """Draw the start of one run of n layers instead."""

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        draw, layers = Random(task.seed), self.removable(task.handle.n_layers)
        if self.contiguous:
            low = draw.randrange(layers.start, layers.stop - n_remove + 1)
            return Selection(tuple(range(low, low + n_remove)))
        return Selection(tuple(draw.sample(layers, n_remove)))


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


@register("method", "angular")
@dataclass
class AngularRun(Baseline):
    """Drop layers l..l+n-1 for the l whose states in and out have the least angle at the last token. One-shot.

    d(l) = mean over samples of arccos(cos(h_l, h_l+n)) / pi; the lowest l wins a tie. Nothing protected, as
    published. Source: Gromov et al. 2024, arXiv:2403.17887. The widely used PruneMe code discards the embedded tokens
    (so layer 0 cannot go and indices shift by one), drops a last short batch, and takes the run that ends at the top
    after the final norm; here all runs are compared, before it. The trace holds 1 - d. Cost: the dense pass.
    """

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        layers = self.removable(task.handle.n_layers)
        starts = range(layers.start, layers.stop - n_remove + 1)
        if n_remove == 0:
            return Selection()
        last = [states[:, -1] for states in task.engine.dense_states]  # [N, D] for every layer
        distance = {low: angle(last[low], last[low + n_remove]) for low in starts}
        best = min(starts, key=lambda low: distance[low])
        trace = tuple(Trial(low, low + n_remove - 1, 1 - d, low == best) for low, d in distance.items())
        return Selection(tuple(range(best, best + n_remove)), trace=trace)


def angle(x_ND: Tensor, y_ND: Tensor) -> float:
    """Mean over samples of the angle of two states, in half turns: 0 one direction, 1/2 a right angle. In float64."""
    x, y = x_ND.double(), y_ND.to(x_ND.device).double()
    cos_N = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-300)
    return float((cos_N.clamp(-1, 1).arccos() / pi).mean())


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


@register("method", "sleb")
@dataclass
class SLEB(Baseline):
    """Drop one layer at a time: the one without which the loss of the model, as it is by then, is lowest.

    The first and the last layer are protected, as in the released code; the lower layer wins a tie. Source: SLEB,
    arXiv:2402.09025. The released code joins 128 rows of WikiText-2 into a few windows of 2048 tokens; here the loss
    is taken over the run's calibration. The trace holds the loss with the sign turned.
    Cost: for the i-th removal L - 2 - i candidates, each of which runs the layers above the one it lacks, and the
    head: for 5 of 30 layers about 1,850 block forwards (every layer run: 3,550) and 130 passes of the head.
    """

    protect_first: int = 1
    protect_last: int = 1

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        return greedy_cost(n_layers, len(self.removable(n_layers)), removed or 0)

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        units = [Unit(i) for i in self.removable(task.handle.n_layers)]
        gone = greedy(task.engine, units, task.engine.loss, lambda removed, _: len(removed) < n_remove, self.name)
        return Selection(tuple(u.layer for u in gone.units), trace=gone.trace)
