"""Dense against compressed, task by task: what the page's comparison rests on."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from slm_exp.evaluation import free_text
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.protocol import mixed
from slm_exp.evaluation.report import metric_of
from slm_exp.runs.record import Run
from slm_exp.runs.schema import Measurements
from slm_exp.runs.statistics.scores import Estimate, by_document, estimate, standard_error, stderr_of_mean


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


def compare(run: Run) -> list[Comparison]:
    """One row per task that a run measured, in the order of the evaluation.

    Where both models have the same documents in the run's samples/, the difference is taken document by document.
    Models measured by different protocols have no difference.
    """
    dense, compressed = run.record.eval.both
    rows = [_compare_task(run, task) for task in dict.fromkeys([*dense.tasks, *compressed.tasks])]
    apart = protocols_differ(run.record.eval)
    return [replace(row, difference=None, paired=False) for row in rows] if apart else rows


def protocols_differ(measured: Measurements) -> str | None:
    """Why the numbers of a run's two models cannot be compared, or None."""
    return mixed({"dense": measured.dense.protocol, "compressed": measured.compressed.protocol})


def average(measured: Measurements, rows: list[Comparison]) -> Comparison | None:
    """The seven-task mean as one more row; None unless both models have it by one protocol. Tasks are independent."""
    dense, compressed = measured.dense.average, measured.compressed.average
    seven = [row for row in rows if row.task in SEVEN]
    if dense is None or compressed is None or len(seven) != len(SEVEN) or protocols_differ(measured):
        return None
    return Comparison("average", "seven-task mean", None, Estimate(dense, stderr_of_mean(row.dense for row in seven)),
                      Estimate(compressed, stderr_of_mean(row.compressed for row in seven)),
                      Estimate(compressed - dense, stderr_of_mean(row.difference for row in seven)),
                      all(row.paired for row in seven))


def other_metrics(measured: Measurements) -> list[Comparison]:
    """Every metric besides acc and acc_norm, of every task that has one: GSM8K's strict and flexible match."""
    scores = {task: (measured.dense.scores(task), measured.compressed.scores(task))
              for task in dict.fromkeys([*measured.dense.tasks, *measured.compressed.tasks])}
    return [Comparison(task, metric, None, estimate(dense, metric), estimate(compressed, metric), None)
            for task, (dense, compressed) in scores.items() for metric in dict.fromkeys([*dense, *compressed])
            if metric not in ("acc", "acc_norm", "n") and "_stderr" not in metric]


@dataclass(frozen=True)
class Written:
    """What both models wrote after one opening; empty where one wrote nothing."""

    prompt: str
    dense: str
    compressed: str


def free_texts(run: Run) -> list[Written]:
    """The texts of `evaluation.text`, in the order of the openings; empty where there are none or a file is damaged."""
    sides = [_texts(run.samples(which, free_text.NAME)) for which in ("dense", "compressed")]
    prompts = dict.fromkeys([*sides[0], *sides[1]])
    return [Written(prompt, *(side.get(prompt, "") for side in sides)) for prompt in prompts]


def _texts(path: Path) -> dict[str, str]:
    """Opening -> text."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as f:
            return {str(row["prompt"]): str(row["text"]) for row in map(json.loads, f)}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error):
        return {}


def _compare_task(run: Run, task: str) -> Comparison:
    dense, compressed = (side.scores(task) for side in run.record.eval.both)
    metric = metric_of(task, dense or compressed) or "acc"
    before, after = estimate(dense, metric), estimate(compressed, metric)
    documents = (compressed or dense).get("n")
    n = documents if isinstance(documents, int) else None
    if not before or not after:
        return Comparison(task, metric, n, before, after, None)
    paired = _paired(run, task, metric)
    if paired and math.isclose(paired.value, after.value - before.value, abs_tol=1e-6):
        return Comparison(task, metric, n, before, after, paired, paired=True)
    known = before.stderr is not None and after.stderr is not None
    stderr = math.hypot(before.stderr or 0, after.stderr or 0) if known else None
    return Comparison(task, metric, n, before, after, Estimate(after.value - before.value, stderr))


def _paired(run: Run, task: str, metric: str) -> Estimate | None:
    """Mean and standard error of the per-document difference; None unless both models saw the same documents."""
    dense, compressed = (by_document(run.samples(which, task), metric) for which in ("dense", "compressed"))
    if not dense or dense.keys() != compressed.keys():
        return None
    differences = [compressed[document] - dense[document] for document in dense]
    return Estimate(math.fsum(differences) / len(differences), standard_error(differences))
