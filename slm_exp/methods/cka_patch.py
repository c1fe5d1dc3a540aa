"""Patches of the layer similarity matrix: the observation behind sliding layer merging, used directly."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from slm_exp.core.registry import register
from slm_exp.core.types import Group, Trial
from slm_exp.methods.base import Baseline, Selection
from slm_exp.search.task import PlanTask

if TYPE_CHECKING:
    import numpy as np


@register("method", "cka_patch")
@dataclass
class CKAPatch(Baseline):
    """Cut the stack into L - n runs of layers that are most similar within, by CKA, and merge every run into one layer.

    The cut with the least total scatter: sum over runs of (1 / size) x sum over its pairs of 1 - CKA, which is the
    squared distance to the run's mean in the space whose cosine CKA is. Found exactly (Fisher 1958's segmentation).
    The matrix is the run's own, so `kernel` and `similarity.estimator` decide. The top layer is protected, as in slm;
    merge=false keeps each run's lowest layer instead. One-shot. Source: the patches that Ding et al. 2025,
    arXiv:2502.19159, show and take their windows from; their code selects without the matrix. The trace holds a run's
    mean CKA over pairs. Cost: none beyond the matrix.
    """

    uses_layer_similarity: ClassVar[bool] = True
    keeps_one: ClassVar[bool] = True

    protect_last: int = 1
    merge: bool = True

    def choose(self, task: PlanTask, n_remove: int) -> Selection:
        assert task.layer_similarity is not None
        layers = self.removable(task.handle.n_layers)
        matrix_LL = task.layer_similarity.matrix_LL
        free_KK = matrix_LL[layers.start : layers.stop, layers.start : layers.stop]
        runs = [Group(layers.start + a, layers.start + b) for a, b in segments(free_KK, len(layers) - n_remove)]
        runs = [run for run in runs if run.stop - run.start > 1]
        trace = tuple(Trial(a, b - 1, _mean_pair(matrix_LL[a:b, a:b]), True) for a, b in runs)
        return Selection(tuple(i for a, b in runs for i in range(a + 1, b)), trace=trace)


def segments(similarity_KK: np.ndarray, n: int) -> list[tuple[int, int]]:
    """Items 0..K-1 in n runs [start, stop) of least total scatter; at a tie the lower items run together.
    `similarity_KK` is 1 on the diagonal. Cost: K^2 n steps of arithmetic."""
    import numpy as np

    k = len(similarity_KK)
    far = np.triu(1 - similarity_KK.astype(np.float64), 1)
    total = np.zeros((k + 1, k + 1))
    total[1:, 1:] = far.cumsum(0).cumsum(1)  # sums of rectangles

    def scatter(a: int, b: int) -> float:
        return float(total[b, b] - total[a, b] - total[b, a] + total[a, a]) / (b - a)

    best = {(0, 0): (0.0, 0)}  # (runs, items) -> least scatter, and where the last run starts
    for runs in range(1, n + 1):
        for stop in range(runs, k - (n - runs) + 1):
            starts = (a for a in range(runs - 1, stop) if (runs - 1, a) in best)
            best[runs, stop] = min(((best[runs - 1, a][0] + scatter(a, stop), a) for a in starts),
                                   key=lambda cut: (round(cut[0], 12), -cut[1]))
    ends = [k]
    for runs in range(n, 0, -1):
        ends.append(best[runs, ends[-1]][1])
    return [*pairwise(reversed(ends))]


def _mean_pair(similarity_KK: np.ndarray) -> float:
    import numpy as np

    return float(similarity_KK[np.triu_indices(len(similarity_KK), 1)].mean())
