"""Runs compared by what their models answered on the same documents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from slm_exp.core.files import digest
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.perplexity import SAMPLES
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


LARGEST = 700.0
"""Of a difference of losses: exp of it is still a number."""
Scored = tuple[str, np.ndarray]
"""(digest of the documents, their scores in an order of theirs)."""


def difference(first: Sequence[Measured], second: Sequence[Measured], tasks: Sequence[str] = tuple(SEVEN),
               interval: bool = True) -> Difference | None:
    """How much better `second` is than `first`, on one task or on the mean of several.

    Args:
        first, second: one run each, or as many runs that differ in their seed, paired in the order given.
        interval: False may leave stderr and interval out, where p does not need them.
    Returns:
        None unless every pair of runs has the same documents in its `samples/`; see `paired_difference`.
    """
    paired = [_paired(first, second, partial(task_scores, task=task)) for task in tasks]
    return paired_difference([at for at in paired if at], interval) if tasks and all(paired) else None


def text_difference(first: Sequence[Measured], second: Sequence[Measured],
                    corpora: Sequence[str]) -> Difference | None:
    """How much higher the logarithm of `second`'s perplexity is, as the mean over texts, by their chunks; or None.

    exp of it is the ratio of the perplexities, over several texts the geometric mean of the ratios.
    """
    paired = [_paired(first, second, partial(text_scores, corpus=corpus)) for corpus in corpora]
    return paired_difference([at for at in paired if at]) if corpora and all(paired) else None


def paired_difference(paired: Sequence[tuple[np.ndarray, np.ndarray]], interval: bool = True) -> Difference:
    """The one estimate of a difference, which pages, tables, `slm compare`, the terminal and the verdict show.
    `paired`: per task or text the scores [S, N] of both sides on the same documents, for S seeds.
    Returns:
        The mean over tasks of the mean over documents of second minus first. One task of zeros and ones and one run
        each: exact McNemar test. Otherwise the paired bootstrap over documents; with several seeds the larger p-value
        of that and of Student's paired test over the seeds, so that both documents and seeds have to agree.
    """
    apart = [b_SN - a_SN for a_SN, b_SN in paired]
    a_SN, b_SN = paired[0]
    if len(paired) == len(a_SN) == 1 and bool((((a_SN == 0) | (a_SN == 1)) & ((b_SN == 0) | (b_SN == 1))).all()):
        found = bootstrap(apart) if interval else Difference(float(apart[0].mean()), None, None, None, 1.0, "")
        p = mcnemar(int((b_SN > a_SN).sum()), int((b_SN < a_SN).sum()))
        return dataclasses.replace(found, p=p, test="mcnemar")
    found = bootstrap(apart)
    if len(a_SN) > 1:
        means_S = sum(at_SN.mean(axis=1) for at_SN in apart) / len(apart)
        return dataclasses.replace(found, p=max(found.p, paired_t([float(m) for m in means_S])), test="bootstrap + t")
    return found


def ratio_of(logarithm: Difference) -> Difference:
    """A difference of mean losses as the ratio of the perplexities, its error by the delta method."""
    value = exp_of(logarithm.value)
    return dataclasses.replace(logarithm, value=value,
                               stderr=None if logarithm.stderr is None else value * logarithm.stderr,
                               low=None if logarithm.low is None else exp_of(logarithm.low),
                               high=None if logarithm.high is None else exp_of(logarithm.high))


def exp_of(loss: float) -> float:
    """exp, of what is too large that of LARGEST."""
    return math.exp(min(loss, LARGEST))


def _paired(first: Sequence[Measured], second: Sequence[Measured],
            read: Callable[[Measured], Scored | None]) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores [S, N] of both sides on the same documents; None where there is no such pairing."""
    if len(first) != len(second) or not first:
        return None
    known = [scores for m in (*first, *second) if (scores := read(m))]
    if len(known) < 2 * len(first) or len({documents for documents, _ in known}) > 1:
        return None
    scores_SN = np.array([scores_N for _, scores_N in known])
    return scores_SN[: len(first)], scores_SN[len(first) :]


def task_scores(m: Measured, task: str) -> Scored | None:
    """By document, in the metric that counts; a group's documents are those of its members."""
    scores = m.scores(task)
    return _documents(_stamped(files(m, task)), metric_of(task, scores), main_score(task, scores))


def text_scores(m: Measured, corpus: str) -> Scored | None:
    """The loss of every chunk of a text, in nats; None where the run is of a version that did not keep them."""
    perplexity = m.evaluation.perplexity.get(corpus)
    stated = None if perplexity is None or not 0 < perplexity < math.inf else math.log(perplexity)
    return _documents(_stamped([m.run.samples(m.which, SAMPLES + corpus)]), "nll", stated)


def files(m: Measured, task: str) -> list[Path]:
    """The answers to a task; to a group (mmlu), those to the tasks named after it."""
    own = m.run.samples(m.which, task)
    return [own] if own.exists() else [path for name in sorted(m.evaluation.tasks) if name.startswith(f"{task}_")
                                       and (path := m.run.samples(m.which, name)).exists()]


Stamped = tuple[Path, int, int]
"""A file by its path, size and time: what was read of another content does not count."""


def _stamped(paths: Iterable[Path]) -> tuple[Stamped, ...]:
    return tuple((path, stat.st_size, stat.st_mtime_ns) for path in paths if path.exists() and (stat := path.stat()))


@lru_cache(maxsize=4096)
def _documents(found: tuple[Stamped, ...], metric: str | None, stated: float | None) -> Scored | None:
    """None unless the mean over the documents is what the record says."""
    if not metric:
        return None
    scores = {(path.name, *document): score
              for path, *_ in found for document, score in by_document(path, metric).items()}
    documents = sorted(scores, key=repr)
    scores_N = np.array([scores[d] for d in documents])
    if not documents or stated is None or abs(float(scores_N.mean()) - stated) > 1e-6:
        return None
    return digest([list(d) for d in documents]), scores_N
