from __future__ import annotations

from dataclasses import dataclass

from slm_exp.core.cost import Count, activations
from slm_exp.core.errors import require
from slm_exp.core.registry import register
from slm_exp.core.runtime import world
from slm_exp.core.together import Together
from slm_exp.methods.base import Selection
from slm_exp.methods.objectives import PartSets
from slm_exp.models.sizes import Sizes
from slm_exp.search.evolution import Found, plan_without
from slm_exp.search.greedy import refuse_infinite, traced
from slm_exp.search.task import PlanTask

TOGETHER = 4
"""Sequences whose activations are in memory at once, at most."""


@register("method", "gates")
@dataclass
class Gates(PartSets):
    """A gate on every sublayer learns, under the budget, how much the model needs it: the least needed set goes.

    What a sublayer adds to the stream is multiplied by its gate, a hard concrete variable (arXiv:1712.01312): while
    learning it is drawn anew for every batch, and is often exactly 0 or 1. The loss is KL(dense || gated) a token plus
    `pressure` x how much of what has to go is expected to stay; in the first half of the steps the budget tightens from
    nothing to the whole. Weights stay as they are. Then the exact knapsack takes the set of least total probability of
    being open that meets the budget. Sources: learned gates under a budget of LAPP, arXiv:2309.14157, and of W-Gates,
    arXiv:2003.13003 (operations, or latency by a table), read for language models. Deviations: the gate's form, and the
    knapsack in place of a threshold. With `target_layers` (`tied`) a layer has one gate.
    The trace holds the probabilities with the sign turned. Checkpoints of the learning lie in the stage cache: a killed
    one goes on where it was. Cost: `steps` x `batch_share` forward passes of the dense model, and forward and backward
    passes of the gated one; memory of the activations of four sequences.
    """

    steps: int = 200
    batch_share: float = 0.2
    """Of the calibration's sequences, in a step; one at least."""
    lr: float = 0.3
    """Of the gates' log-odds, by Adam; it falls to zero in a straight line."""
    pressure: float = 20.0
    """Nats a token for missing all of what has to go; the more, the sooner gates close."""

    def needs_resident(self) -> str | None:
        return f"method={self.name}, which runs the whole model there and back"

    def check(self) -> None:
        super().check()
        self.at_least(1, "steps")
        require(0 < self.batch_share <= 1, "method.batch_share", self.batch_share, "a share in (0, 1]")
        self.positive("lr", "pressure")

    def refuses(self, others: Together) -> str | None:
        if world() > 1:
            return (f"method = {self.name}; expected another where a launcher started {world()} processes: its gates "
                    "learn in one. Find the plan first, then train with method=from_plan method.path=PLAN.")
        return super().refuses(others)

    def memory(self, sizes: Sizes, seq_len: int) -> float:
        return activations(TOGETHER, seq_len, sizes.n_layers, sizes.hidden, sizes.heads, recomputed=False)

    def search_cost(self, n_layers: int, removed: int | None) -> Count:
        passes = 3 * self.steps * self.batch_share
        return Count(n_layers * (2 + passes) - (removed or 0), passes, note=(
            f"{self.name}: {self.steps} steps of learning (method.steps, method.batch_share)"))

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        from slm_exp.search.gates import Learning, learned

        gains, need = self.gains(task.handle, n_remove)
        if need <= 0:
            return Selection()
        learning = Learning(self.steps, max(1, round(self.batch_share * len(task.tokens.tokens_NT))), TOGETHER,
                            self.lr, self.pressure)
        prices = dict(zip(gains, learned(task, [*gains], [*gains.values()], need, learning), strict=True))
        refuse_infinite(prices)
        parts = self.cheapest(prices, gains, need)
        engine = task.engine
        engine.commit(plan_without(engine.n_layers, parts))
        passes = 3 * self.steps * learning.rows / len(task.tokens.tokens_NT)
        return self.selected(Found(parts, tuple(traced(prices, parts, engine.dense))), round(passes * engine.n_layers))
