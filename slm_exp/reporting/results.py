"""Dense against compressed, task by task: what the page's comparison rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slm_exp.core.errors import DataError
from slm_exp.evaluation import free_text
from slm_exp.evaluation.base import SEVEN
from slm_exp.evaluation.protocol import mixed
from slm_exp.evaluation.report import metric_of
from slm_exp.runs.record import Run
from slm_exp.runs.schema import JudgedTask, Measurements
from slm_exp.runs.statistics.paired import Difference
from slm_exp.runs.statistics.runs import Measured, difference
from slm_exp.runs.statistics.scores import Z95, Estimate, estimate, samples_of, stderr_of_mean
from slm_exp.runs.statistics.verdict import verdict_of


@dataclass(frozen=True)
class Comparison:
    """One task, by the metric that counts for it (the contract's for the seven, else `acc`)."""

    task: str
    metric: str
    n: int | None
    dense: Estimate | None
    compressed: Estimate | None
    difference: Difference | None
    """Compressed minus dense."""
    paired: bool = False
    """Whether the difference comes from the same documents under both models."""
    chance: float | None = None
    """What guessing scores; None where that is not known."""
    mute: bool = False
    """Whether the dense model cannot be told from guessing."""


def compare(run: Run) -> list[Comparison]:
    """One row per task that a run measured, in the order of the evaluation.

    Where both models have the same documents in the run's samples/, the difference is taken document by document.
    Models measured by different protocols have no difference.
    """
    dense, compressed = run.record.eval.both
    judged = verdict_of(run).tasks
    rows = [_compare_task(run, task, judged.get(task)) for task in dict.fromkeys([*dense.tasks, *compressed.tasks])]
    apart = protocols_differ(run.record.eval)
    return [replace(row, difference=None, paired=False) for row in rows] if apart else rows


def protocols_differ(measured: Measurements) -> str | None:
    """Why the numbers of a run's two models cannot be compared, or None."""
    return mixed({"dense": measured.dense.protocol, "compressed": measured.compressed.protocol})


def average(run: Run, rows: list[Comparison]) -> Comparison | None:
    """The seven-task mean as one more row; None unless both models have it by one protocol. Tasks are independent."""
    dense, compressed = (side.average for side in run.record.eval.both)
    seven = [row for row in rows if row.task in SEVEN]
    if dense is None or compressed is None or len(seven) != len(SEVEN) or protocols_differ(run.record.eval):
        return None
    before, after = (Estimate(value, stderr_of_mean(row.dense if which == "dense" else row.compressed for row in seven))
                     for which, value in (("dense", dense), ("compressed", compressed)))
    counts = [row.n for row in seven if row.n is not None]
    found, paired = _difference(run, tuple(SEVEN), before, after, [row.difference for row in seven])
    chances = [row.chance for row in seven if row.chance is not None]
    return Comparison("average", "seven-task mean", sum(counts) if len(counts) == len(SEVEN) else None, before, after,
                      found, paired, sum(chances) / len(SEVEN) if len(chances) == len(SEVEN) else None)


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
        return {str(row["prompt"]): str(row["text"]) for row in samples_of(path)}
    except (DataError, KeyError, TypeError):
        return {}


def _compare_task(run: Run, task: str, judged: JudgedTask | None) -> Comparison:
    dense, compressed = (side.scores(task) for side in run.record.eval.both)
    metric = metric_of(task, dense or compressed) or "acc"
    before, after = estimate(dense, metric), estimate(compressed, metric)
    documents = (compressed or dense).get("n")
    n = documents if isinstance(documents, int) else None
    about = (None, False) if judged is None else (judged.chance, judged.mute)
    if not before or not after:
        return Comparison(task, metric, n, before, after, None, False, *about)
    return Comparison(task, metric, n, before, after, *_difference(run, (task,), before, after), *about)


def _difference(run: Run, tasks: tuple[str, ...], before: Estimate, after: Estimate,
                parts: Sequence[Difference | None] = ()) -> tuple[Difference, bool]:
    """The paired estimate; where documents are not at hand or not the same, that of independent ones, and False."""
    value = after.value - before.value
    paired = difference([Measured(run, "dense")], [Measured(run)], tasks)
    if paired and math.isclose(paired.value, value, abs_tol=1e-6):
        return paired, True
    errors = [part.stderr if part else None for part in parts] or [before.stderr, after.stderr]
    known = [e for e in errors if e is not None]
    stderr = math.hypot(*known) / max(1, len(parts)) if len(known) == len(errors) else None
    low, high = (None, None) if stderr is None else (value - Z95 * stderr, value + Z95 * stderr)
    p = math.erfc(abs(value) / stderr / math.sqrt(2)) if stderr else 1.0
    return Difference(value, stderr, low, high, p, "normal"), False
