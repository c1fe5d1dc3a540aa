"""Dense against compressed, task by task: what the page's comparison rests on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.protocol import mixed
from slm_exp.runs.statistics.scores import Estimate, by_document, estimate, metric_of, stderr_of_mean


@dataclass(frozen=True)
class Comparison:
    """One task, by the metric that counts for it (the contract's for the seven, else `acc`)."""

    task: str
    metric: str
    n: int | None
    dense: Estimate | None
    compressed: Estimate | None
    difference: Estimate | None
    """Compressed minus dense."""
    paired: bool = False
    """Whether the difference's standard error comes from the same documents under both models."""


def compare(evaluation: dict[str, Any], samples: Path) -> list[Comparison]:
    """One row per task of record.json's `eval`, in the order they were asked.

    Args:
        samples: the run's `samples/`, holding `dense/<task>.jsonl.gz` and `compressed/<task>.jsonl.gz`; where both
            have the same documents, the difference is taken document by document. Models measured by different
            protocols have no difference.
    """
    dense, compressed = ((evaluation.get(which) or {}).get("tasks") or {} for which in ("dense", "compressed"))
    rows = [_compare_task(task, dense.get(task) or {}, compressed.get(task) or {}, samples)
            for task in dict.fromkeys([*dense, *compressed])]
    return [replace(row, difference=None, paired=False) for row in rows] if protocols_differ(evaluation) else rows


def protocols_differ(evaluation: dict[str, Any]) -> str | None:
    """Why the numbers of a run's two models cannot be compared, or None."""
    return mixed({which: (evaluation.get(which) or {}).get("protocol") for which in ("dense", "compressed")})


def average(evaluation: dict[str, Any], rows: list[Comparison]) -> Comparison | None:
    """The seven-task mean as one more row; None unless both models have it by one protocol. Tasks are independent."""
    dense, compressed = ((evaluation.get(which) or {}).get("average") for which in ("dense", "compressed"))
    seven = [row for row in rows if row.task in SEVEN]
    if dense is None or compressed is None or len(seven) != len(SEVEN) or protocols_differ(evaluation):
        return None
    return Comparison(
        "average", "seven-task mean", None,
        Estimate(dense, stderr_of_mean([row.dense for row in seven])),
        Estimate(compressed, stderr_of_mean([row.compressed for row in seven])),
        Estimate(compressed - dense, stderr_of_mean([row.difference for row in seven])),
        all(row.paired for row in seven),
    )


def _compare_task(task: str, dense: dict[str, Any], compressed: dict[str, Any], samples: Path) -> Comparison:
    metric = metric_of(task, dense or compressed) or "acc"
    before, after = estimate(dense, metric), estimate(compressed, metric)
    n = (compressed or dense).get("n")
    difference = None
    if before and after:
        difference = _paired(samples, task, metric)
        if difference is None or not math.isclose(difference.value, after.value - before.value, abs_tol=1e-6):
            known = before.stderr is not None and after.stderr is not None
            stderr = math.hypot(before.stderr or 0, after.stderr or 0) if known else None
            return Comparison(task, metric, n, before, after, Estimate(after.value - before.value, stderr))
    return Comparison(task, metric, n, before, after, difference, paired=difference is not None)


def _paired(samples: Path, task: str, metric: str) -> Estimate | None:
    """Mean and standard error of the per-document difference; None unless both models saw the same documents."""
    dense, compressed = (by_document(samples / which / f"{task}.jsonl.gz", metric)
                         for which in ("dense", "compressed"))
    if not dense or dense.keys() != compressed.keys():
        return None
    differences = [compressed[document] - dense[document] for document in dense]
    n = len(differences)
    mean = math.fsum(differences) / n
    if n == 1:
        return Estimate(mean, None)
    return Estimate(mean, math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n))
