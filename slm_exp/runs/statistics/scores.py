"""What a run measured, as numbers with standard errors and document by document."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_exp.core.errors import DataError
from slm_exp.core.text import read_rows
from slm_exp.evaluation.report import metric_of
from slm_exp.runs.schema import Scores

MOST = 10**6
"""Rows of a samples file; one that holds more is no run's."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None where one document allows none."""

    value: float
    stderr: float | None


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


def by_document(path: Path, metric: str) -> dict[tuple[object, object], float]:
    """(doc_id, doc_hash) -> score; empty where the file is missing or damaged, or has another metric.

    Args:
        path: `samples/<dense or compressed>/<task>.jsonl.gz` of a run.
        metric: as in the record; `exact_match(remove_whitespace)` is that metric after that filter.
    """
    name, _, chosen = metric.removesuffix(")").partition("(")
    try:
        out = {}
        for n, row in enumerate(read_rows(path)):
            if n == MOST:
                return {}
            if row.value.get("filter", "") == chosen:
                out[row.value.get("doc_id"), row.value.get("doc_hash")] = float(row.value[name])
        return out
    except (DataError, ValueError, KeyError, TypeError, AttributeError):
        return {}
