"""What a run measured, as numbers with standard errors and document by document."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from slm_exp.core.cache.digests import Status, status_of
from slm_exp.core.errors import DataError
from slm_exp.core.text import read_rows
from slm_exp.evaluation.report import metric_of
from slm_exp.runs.schema import Scores

MOST = 10**6
"""Rows of a samples file; one that holds more is no run's."""

Z95 = 1.96
"""Standard errors from a mean to either end of its 95 % interval."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None where one document allows none."""

    value: float
    stderr: float | None

    def times(self, factor: float) -> Estimate:
        """In another unit: 100 for per cent."""
        return Estimate(factor * self.value, None if self.stderr is None else factor * self.stderr)


def estimate(scores: Scores, metric: str) -> Estimate | None:
    """A task's entry in the record as a number; None where it has no such metric."""
    value, n, stderr = (_number(scores.get(name)) for name in (metric, "n", f"{metric}_stderr"))
    if value is None:
        return None
    if stderr is None and n and n > 1 and 0 <= value <= 1:
        stderr = math.sqrt(value * (1 - value) / (n - 1))  # what lm-eval computes for zeros and ones
    return Estimate(value, stderr)


def main_score(task: str, scores: Scores) -> float | None:
    """What a task is quoted by."""
    return _number(scores.get(metric_of(task, scores) or ""))


def _number(value: float | str | None) -> float | None:
    return None if value is None or isinstance(value, str) else value


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def stderr_of_mean(parts: Iterable[Estimate | None]) -> float | None:
    """Standard error of the unweighted mean of independent parts; None where one of them has none."""
    parts = list(parts)
    known = [part.stderr for part in parts if part is not None and part.stderr is not None]
    return math.sqrt(math.fsum(e * e for e in known)) / len(known) if known and len(known) == len(parts) else None


def on_front(costs_and_losses: Sequence[tuple[float, float]]) -> list[bool]:
    """Which pairs no other beats: none costs as little and loses less, or costs less and loses as little."""
    least, good = math.inf, set[tuple[float, float]]()
    for cost, loss in sorted(costs_and_losses):
        if loss < least:
            least = loss
            good.add((cost, loss))
    return [pair in good for pair in costs_and_losses]


def by_document(path: Path, metric: str) -> dict[tuple[object, object], float]:
    """(doc_id, doc_hash) -> score; empty where the file is missing or damaged, or has another metric.

    Args:
        path: `samples/<dense or compressed>/<task>.jsonl.gz` of a run.
        metric: as in the record; `exact_match(remove_whitespace)` is that metric after that filter.
    """
    name, _, chosen = metric.removesuffix(")").partition("(")
    try:
        return {(row.get("doc_id"), row.get("doc_hash")): float(row[name]) for row in samples_of(path)
                if row.get("filter", "") == chosen}
    except (DataError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def chance_of(paths: Iterable[Path]) -> float | None:
    """What guessing scores on documents: the mean of 1 / their number of options, 0 for an answer in words.

    None where the files do not say.
    """
    try:
        each = [1 / len(row["loglikelihoods"]) if "loglikelihoods" in row else 0.0
                for path in paths for row in samples_of(path) if "loglikelihoods" in row or "answers" in row]
    except (DataError, ValueError, TypeError, ZeroDivisionError):
        return None
    return math.fsum(each) / len(each) if each else None


def samples_of(path: Path) -> list[dict[str, Any]]:
    """A file of samples, not to be changed. Raises DataError: missing, damaged, or more than MOST rows."""
    try:
        return _samples(path, status_of(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from None


@lru_cache(maxsize=2)  # what is asked of a task: the scores of both models, then chance on the documents of one
def _samples(path: Path, status: Status) -> list[dict[str, Any]]:
    rows = [row.value for row in itertools.islice(read_rows(path), MOST + 1)]
    if len(rows) > MOST:
        raise DataError(f"{path}: more than {MOST} rows.")
    return rows
