"""Runs compared by what their models answered on the same documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from slm_exp.core.files import digest
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.report import metric_of
from slm_exp.runs.record import Run
from slm_exp.runs.schema import Measurement, Record, Scores
from slm_exp.runs.statistics.paired import Difference, bootstrap, mcnemar, paired_t
from slm_exp.runs.statistics.scores import by_document, main_score


@dataclass(frozen=True)
class Measured:
    """One model that a run measured."""

    run: Run
    which: str = "compressed"
    """Or `dense`."""
    called: str = ""
    """How the user named it, if not by its folder."""

    @property
    def name(self) -> str:
        return self.called or self.run.name

    @property
    def record(self) -> Record:
        return self.run.record

    @property
    def evaluation(self) -> Measurement:
        return self.record.eval.of(self.which)

    def scores(self, task: str) -> Scores:
        """The task's entry in the record; empty where it was not measured."""
        return self.evaluation.scores(task)


def difference(first: Sequence[Measured], second: Sequence[Measured], tasks: Sequence[str] = tuple(SEVEN),
               interval: bool = True) -> Difference | None:
    """How much better `second` is than `first`, on one task or on the mean of several.

    Args:
        first, second: one run each, or as many runs that differ in their seed, paired in the order given.
        interval: False may leave stderr and interval out, where p does not need them.

    Returns:
        None unless every pair of runs has the same documents in its `samples/`. One task of zeros and ones and one
        run each: exact McNemar test. Otherwise the paired bootstrap over documents; with several seeds the larger
        p-value of that and of Student's paired test over the seeds, so that both documents and seeds have to agree.
    """
    paired = [at for task in tasks if (at := _paired(first, second, task)) is not None]
    if not paired or len(paired) < len(tasks):
        return None
    apart = [b_SN - a_SN for a_SN, b_SN in paired]
    a_SN, b_SN = paired[0]
    if len(first) == len(tasks) == 1 and bool((((a_SN == 0) | (a_SN == 1)) & ((b_SN == 0) | (b_SN == 1))).all()):
        found = bootstrap(apart) if interval else Difference(float(apart[0].mean()), None, None, None, 1.0, "")
        p = mcnemar(int((b_SN > a_SN).sum()), int((b_SN < a_SN).sum()))
        return dataclasses.replace(found, p=p, test="mcnemar")
    found = bootstrap(apart)
    if len(first) > 1:
        means_S = sum(at_SN.mean(axis=1) for at_SN in apart) / len(apart)
        return dataclasses.replace(found, p=max(found.p, paired_t([float(m) for m in means_S])), test="bootstrap + t")
    return found


def _paired(first: Sequence[Measured], second: Sequence[Measured],
            task: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores [S, N] of both sides on the same documents; None where there is no such pairing."""
    if len(first) != len(second) or not first:
        return None
    found = [_documents(m.run.samples(m.which, task), metric_of(task, m.scores(task)), main_score(task, m.scores(task)))
             for m in (*first, *second)]
    known = [scores for scores in found if scores]
    if len(known) < len(found) or len({documents for documents, _ in known}) > 1:
        return None
    scores_SN = np.array([scores_N for _, scores_N in known])
    return scores_SN[: len(first)], scores_SN[len(first) :]


@lru_cache(maxsize=4096)
def _documents(path: Path, metric: str | None, stated: float | None) -> tuple[str, np.ndarray] | None:
    """(digest of the documents, their scores in an order of theirs); None unless their mean is what the record says."""
    scores = by_document(path, metric) if metric else {}
    documents = sorted(scores, key=repr)
    scores_N = np.array([scores[d] for d in documents])
    if not documents or stated is None or abs(float(scores_N.mean()) - stated) > 1e-6:
        return None
    return digest([list(d) for d in documents]), scores_N
