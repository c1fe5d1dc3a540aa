"""Dense against compressed, task by task: what the page's comparison rests on."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.protocol import mixed


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None where one document allows none."""

    value: float
    stderr: float | None


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


def metric_of(task: str, scores: dict[str, Any]) -> str | None:
    """The metric that counts for a task: the seven-task average's, else acc, acc_norm, or the first number there."""
    wanted = [SEVEN[task]] if task in SEVEN else ["acc", "acc_norm"]
    numbers = [k for k, v in scores.items() if isinstance(v, float) and not k.endswith("_stderr")]
    return next((name for name in [*wanted, *numbers] if scores.get(name) is not None), None)


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
        Estimate(dense, _stderr_of_mean([row.dense for row in seven])),
        Estimate(compressed, _stderr_of_mean([row.compressed for row in seven])),
        Estimate(compressed - dense, _stderr_of_mean([row.difference for row in seven])),
        all(row.paired for row in seven),
    )


def _compare_task(task: str, dense: dict[str, Any], compressed: dict[str, Any], samples: Path) -> Comparison:
    metric = metric_of(task, dense or compressed) or "acc"
    before, after = _estimate(dense, metric), _estimate(compressed, metric)
    n = (compressed or dense).get("n")
    difference = None
    if before and after:
        difference = _paired(samples, task, metric)
        if difference is None or not math.isclose(difference.value, after.value - before.value, abs_tol=1e-6):
            known = before.stderr is not None and after.stderr is not None
            stderr = math.hypot(before.stderr or 0, after.stderr or 0) if known else None
            return Comparison(task, metric, n, before, after, Estimate(after.value - before.value, stderr))
    return Comparison(task, metric, n, before, after, difference, paired=difference is not None)


def _estimate(scores: dict[str, Any], metric: str) -> Estimate | None:
    value, n = scores.get(metric), scores.get("n")
    if value is None:
        return None
    stderr = scores.get(f"{metric}_stderr")
    if stderr is None and n and n > 1 and 0 <= value <= 1:
        stderr = math.sqrt(value * (1 - value) / (n - 1))  # what lm-eval computes for zeros and ones
    return Estimate(value, stderr)


def _paired(samples: Path, task: str, metric: str) -> Estimate | None:
    """Mean and standard error of the per-document difference; None unless both models saw the same documents."""
    dense, compressed = (_by_document(samples / which / f"{task}.jsonl.gz", metric)
                         for which in ("dense", "compressed"))
    if not dense or dense.keys() != compressed.keys():
        return None
    differences = [compressed[document] - dense[document] for document in dense]
    n = len(differences)
    mean = math.fsum(differences) / n
    if n == 1:
        return Estimate(mean, None)
    return Estimate(mean, math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n))


def _by_document(path: Path, metric: str) -> dict[tuple[Any, Any], float]:
    """Document -> score; empty where the file is missing or damaged, or has another metric."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        return {(row.get("doc_id"), row.get("doc_hash")): float(row[metric]) for row in rows}
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return {}


def _stderr_of_mean(parts: list[Estimate | None]) -> float | None:
    errors = [part.stderr for part in parts if part is not None and part.stderr is not None]
    if len(errors) < len(parts):
        return None
    return math.sqrt(math.fsum(e * e for e in errors)) / len(parts)
