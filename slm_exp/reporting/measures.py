"""What the runs of a sweep are compared by: a quality over the number of parameters, and which runs no other beats."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slm_exp.core.documents import Section, parse
from slm_exp.core.errors import SlmError
from slm_exp.core.files import JsonObject, read_json
from slm_exp.core.format import printable
from slm_exp.reporting.rows import Row
from slm_exp.runs.schema import Calibration, Model
from slm_exp.runs.statistics.scores import Z95, Estimate


@dataclass(frozen=True)
class Point:
    """One model: a run's compressed one, or the dense one, which belongs to no run."""

    row: Row | None
    params: int
    """Those that have an effect: without the ones that removed sublayers leave behind as zeros."""
    value: float
    """In the unit of the measure."""
    stderr: float | None = None
    front: bool = False
    """No other model has as few parameters and is as good."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %."""
        return None if self.stderr is None else (self.value - Z95 * self.stderr, self.value + Z95 * self.stderr)


@dataclass(frozen=True)
class Measure:
    """A quality that several runs have."""

    key: str
    name: str
    unit: str
    digits: int
    higher_is_better: bool
    points: tuple[Point, ...]
    missing: int = 0
    """Finished runs without it."""
    chance: float | None = None
    """What guessing gives, in the measure's unit."""
    criterion: bool = False
    """Whether searches select by it: it is no measure of what came of them, and has no front."""

    def show(self, value: float) -> str:
        return f"{value:.{self.digits}f}" if abs(value) < 1e5 else f"{value:.3g}"

    @property
    def front(self) -> list[Point]:
        """From the smallest model up."""
        return sorted((p for p in self.points if p.front), key=lambda p: p.params)


def measure(rows: Sequence[Row]) -> list[Measure]:
    """Every measure that the finished runs allow: the seven-task average (else each task), perplexities, similarity."""
    done = [row for row in rows if row.finished and row.params]
    tasks = {task: (f"task-{task}", task) for row in done for task in (c.task for c in row.tasks)}
    if any(row.average for row in done):
        tasks = {"average": ("average", "Seven-task average")}
    out = [_measure(key, name, "per cent", 1, True, [
        (row, _percent(c.dense if c else None), _percent(c.compressed if c else None))
        for row in done for c in [row.compared(task)]],
        chance=next((100 * c.chance for row in done if (c := row.compared(task)) and c.chance is not None), None))
        for task, (key, name) in tasks.items()]
    texts = dict.fromkeys(c for row in done for c in row.measured.compressed.perplexity)
    out += [_measure(f"perplexity-{corpus}", f"Perplexity, {corpus}", "lower is better", 2, False, [
        (row, _exact(row.perplexity(corpus, "dense")), _perplexity(row, corpus)) for row in done])
        for corpus in texts]
    for kind in sorted({row.record.plan.similarity for row in done if row.score is not None}):
        out.append(_measure(f"score-{kind}", f"Similarity to dense, {kind}", "1 is identical", 4, True, [
            (row, _exact(1.0), _exact(row.score)) for row in done
            if row.score is not None and row.record.plan.similarity == kind], criterion=True))
    return [m for m in out if m.points]


def _percent(e: Estimate | None) -> Estimate | None:
    return None if e is None else Estimate(100 * e.value, None if e.stderr is None else 100 * e.stderr)


def _exact(value: float | None) -> Estimate | None:
    return None if value is None else Estimate(value, None)


def _perplexity(row: Row, corpus: str) -> Estimate | None:
    """With the standard error of the ratio to the dense model over the same chunks, as a perplexity."""
    value, dense, ratio = row.perplexity(corpus), row.perplexity(corpus, "dense"), row.verdict.texts.get(corpus)
    stderr = ratio.stderr if ratio else None
    return None if value is None else Estimate(value, None if dense is None or stderr is None else dense * stderr)


def _measure(key: str, name: str, unit: str, digits: int, higher: bool,
             found: Sequence[tuple[Row, Estimate | None, Estimate | None]], chance: float | None = None,
             criterion: bool = False) -> Measure:
    """From every run's dense and compressed model."""
    dense = {(row.params.before, side.value, side.stderr) for row, side, _ in found if side and row.params.before}
    runs = [Point(row, row.params.after - row.params.zeroed, side.value, side.stderr) for row, _, side in found
            if side and math.isfinite(side.value) and row.params.after is not None]
    points = [*(Point(None, *values) for values in sorted(dense, key=lambda d: (d[0], d[1], d[2] or 0.0))), *runs]
    shown = tuple(points if runs else ())
    return Measure(key, name, unit, digits, higher, shown if criterion else _with_front(shown, higher),
                   len(found) - len(runs), chance, criterion)


def _with_front(points: Sequence[Point], higher: bool) -> tuple[Point, ...]:
    """Points with their `front`: for every size upwards, those better than all smaller ones."""
    best, sign = -math.inf, 1 if higher else -1
    good: set[tuple[int, float]] = set()
    for params in sorted({p.params for p in points}):
        value = max(sign * p.value for p in points if p.params == params)
        if value > best:
            best = value
            good.add((params, sign * value))
    return tuple(replace(p, front=(p.params, p.value) in good) for p in points)


class PathPlan(Section):
    """What the thresholds of one interval give."""

    threshold_low: float
    threshold_high: float
    n_layers: int
    final_score: float | None = None


class ThresholdPath(Section):
    """A path.json: what every threshold in a range gives."""

    plans: list[PathPlan]
    """Ascending."""
    config: dict[str, JsonObject | int | bool | None]
    model: Model
    calibration: Calibration
    unknown: list[list[float]] = []  # noqa: RUF012 (pydantic copies defaults)
    source: str = ""
    """Where it was read, from the sweep's folder."""

    def member(self, group: str) -> str:
        """The name of a config group's member."""
        settings = self.config.get(group)
        return str(settings.get("name")) if isinstance(settings, dict) else ""


def read_paths(folder: Path, given: Sequence[Path] = ()) -> list[ThresholdPath]:
    """The path.json files that lie in a folder or in its subfolders, and those given. One that lies there and cannot be
    read is named on stderr.

    Raises:
        SlmError: a given one is not there or is no path.
    """
    found = sorted((*folder.glob("path.json"), *folder.glob("*/path.json")))
    wanted = [path / "path.json" if path.is_dir() else path for path in given]
    out = []
    for path in dict.fromkeys([*found, *wanted]):
        try:
            source = path.name if path.parent == folder else f"{path.parent.name}/{path.name}"
            read = parse(ThresholdPath, {**read_json(path), "source": source})
            if not read.plans or any(len(ends) != 2 for ends in read.unknown):
                raise ValueError("it has no plans")
            out.append(read)
        except (OSError, ValueError, TypeError) as error:
            none = (f"{path} is no threshold path ({type(error).__name__}: {error}); expected the path.json that "
                    "`slm path` writes, or its folder.")
            if path in wanted:
                raise SlmError(none) from None
            print(printable(f"left out: {none}"), file=sys.stderr)
    return out
