from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING

from slm_exp.core.registry import register
from slm_exp.core.types import Trial
from slm_exp.methods.base import Baseline, Selection
from slm_exp.search.task import PlanTask

if TYPE_CHECKING:
    from torch import Tensor


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
