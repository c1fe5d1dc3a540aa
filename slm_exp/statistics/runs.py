"""Runs compared by what their models answered on the same documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.evaluation.base import SEVEN
from slm_exp.statistics.paired import Difference, bootstrap, mcnemar, paired_t
from slm_exp.statistics.scores import by_document, metric_of

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Measured:
    """One model that a run measured."""

    name: str
    folder: Path
    """The run's folder."""
    record: dict[str, Any] = dataclasses.field(repr=False, compare=False)
    which: str = "compressed"
    """Or `dense`."""

    @property
    def evaluation(self) -> dict[str, Any]:
        return (self.record.get("eval") or {}).get(self.which) or {}

    @property
    def protocol(self) -> dict[str, Any] | None:
        return self.evaluation.get("protocol")

    def scores(self, task: str) -> dict[str, Any]:
        """The task's entry in the record: {acc, acc_stderr, n, ...}; empty where it was not asked."""
        return (self.evaluation.get("tasks") or {}).get(task) or {}


def difference(first: Sequence[Measured], second: Sequence[Measured], tasks: Sequence[str] = tuple(SEVEN)) -> (
        Difference | None):
    """How much better `second` is than `first`, on one task or on the mean of several.

    Args:
        first, second: one run each, or as many runs that differ in their seed, paired in the order given.

    Returns:
        None unless every pair of runs has the same documents in its `samples/`. One task of zeros and ones and one
        run each: exact McNemar test. Otherwise the paired bootstrap over documents; with several seeds the larger
        p-value of that and of Student's paired test over the seeds, so that both documents and seeds have to agree.
    """
    at_task = [_paired(first, second, task) for task in tasks]
    paired = [at for at in at_task if at is not None]
    if not paired or len(paired) < len(at_task):
        return None
    found = bootstrap([second_SN - first_SN for first_SN, second_SN in paired])
    if len(first) > 1:
        means_S = sum((b - a).mean(axis=1) for a, b in paired) / len(paired)
        return dataclasses.replace(found, p=max(found.p, paired_t([float(m) for m in means_S])), test="bootstrap + t")
    (a_SN, b_SN), *more = paired
    if not more and bool((((a_SN == 0) | (a_SN == 1)) & ((b_SN == 0) | (b_SN == 1))).all()):
        p = mcnemar(int((b_SN > a_SN).sum()), int((b_SN < a_SN).sum()))
        return dataclasses.replace(found, p=p, test="mcnemar")
    return found


def _paired(first: Sequence[Measured], second: Sequence[Measured], task: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores [S, N] of both sides on the same documents; None where there is no such pairing."""
    import numpy as np

    sides = [[_documents(m.folder, m.which, task, metric_of(task, m.scores(task))) for m in side]
             for side in (first, second)]
    if len(first) != len(second) or not first:
        return None
    documents = sides[0][0].keys()
    if not documents or any(scores.keys() != documents for side in sides for scores in side):
        return None
    for side, measured in zip(sides, (first, second), strict=True):
        for scores, m in zip(side, measured, strict=True):
            told = m.scores(task)[metric_of(task, m.scores(task)) or ""]
            if abs(sum(scores.values()) / len(scores) - told) > 1e-6:  # samples of another evaluation
                return None
    a_SN, b_SN = (np.array([[scores[d] for d in documents] for scores in side]) for side in sides)
    return a_SN, b_SN


@lru_cache(maxsize=4096)
def _documents(folder: Path, which: str, task: str, metric: str | None) -> dict[tuple[Any, Any], float]:
    return by_document(folder / "samples" / which / f"{task}.jsonl.gz", metric) if metric else {}
