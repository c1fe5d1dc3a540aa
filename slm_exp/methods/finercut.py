"""FinerCut: remove the attention or MLP sublayer that moves the predictions least, look again, and so on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_exp.core.errors import require, require_one_of
from slm_exp.core.registry import register
from slm_exp.methods.sublayers import SublayerBaseline

if TYPE_CHECKING:
    from torch import Tensor

    from slm_exp.methods.sublayers import Wanted
    from slm_exp.search.greedy import Removed
    from slm_exp.search.reduced import ReducedModels, Slots

METRICS = ("js", "kl", "angular", "norm", "perplexity")


@register("method", "finercut")
@dataclass
class FinerCut(SublayerBaseline):
    """Remove one sublayer at a time: the one without which the logits stay nearest to the dense model's.

    Attention and MLP sublayers compete; the lower one wins a tie. The first 40 % of them may go only when no other is
    left, as in the released code. Source: FinerCut, arXiv:2405.18218 (its Llama-3-8B config: js; its Llama-2-7B
    config: perplexity). Deviations: js is the Jensen-Shannon divergence itself, where the released code has the
    arguments of both divergences the other way round; angular tells obtuse angles apart, where the released code
    clamps them to a right one. The trace holds the distance with the sign turned.
    Cost: for the i-th removal 1.2 L - i candidates, each of which runs the layers from its own upwards, and the head
    twice: for 5 sublayers of 30 layers about 1,500 block forwards and 340 passes of the head.
    """

    metric: str = "js"
    """js, kl, angular, norm: distance of the logits to the dense model's (search/vocabulary.py); or perplexity."""
    exclude_first: float = 0.4
    """The share of sublayers, from the bottom up, that go last."""

    def check(self) -> None:
        require_one_of("method.metric", self.metric, METRICS)
        require(0 <= self.exclude_first <= 1, "method.exclude_first", self.exclude_first, "a share in [0, 1]")
        super().check()

    def find(self, models: ReducedModels, wanted: Wanted) -> Removed:
        from slm_exp.engine.vocabulary import PredictionDistance
        from slm_exp.search.greedy import greedy

        distance: PredictionDistance | None = None

        def cost(slots: Slots) -> float:
            return models.loss(slots) if self.metric == "perplexity" else models.measure(slots, self.metric, measured)

        def measured(last_NTD: Tensor) -> float:
            nonlocal distance
            if distance is None:
                dense_NTD = models.runner.finish(models.dense_states[-1])
                distance = PredictionDistance(models.runner, dense_NTD, self.metric)
            return distance(last_NTD)

        units = self.units(len(models.dense))
        late = math.floor(self.exclude_first * len(units))
        return greedy(models, units[late:], cost, wanted, self.name, units[:late])
