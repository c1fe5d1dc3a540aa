"""What the runs of a sweep are compared by: a quality over what models cost, and which runs no other beats."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import NonNegativeFloat

from slm_exp.core.documents import Section, parse
from slm_exp.core.errors import SlmError
from slm_exp.core.files import JsonObject, read_json
from slm_exp.core.format import printable
from slm_exp.reporting.budgets import BUDGETS, Budget
from slm_exp.reporting.page import size_change
from slm_exp.reporting.rows import Row
from slm_exp.runs.schema import Calibration, Model
from slm_exp.runs.statistics.scores import Z95, Estimate, on_front

OVER = {**BUDGETS, "latency_s": Budget("latency, both models in turns", "% of dense", 0.01)}
"""What qualities are drawn over. Latencies of runs are of other hours, so only their ratios compare."""


@dataclass(frozen=True)
class Point:
    """One model: a run's compressed one, or the dense one, which belongs to no run."""

    row: Row | None
    cost: float
    """By the measure's budget. Parameters: those that have an effect, without the ones that removed sublayers leave
    behind as zeros."""
    value: float
    """In the unit of the measure."""
    stderr: float | None = None
    front: bool = False
    """No other model costs as little and is as good."""

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
    budget: Budget = OVER["params"]

    def show(self, value: float) -> str:
        return f"{value:.{self.digits}f}" if abs(value) < 1e5 else f"{value:.3g}"

    @property
    def of_params(self) -> bool:
        return self.budget is OVER["params"]

    def show_cost(self, point: Point) -> str:
        """`123.9 M parameters`, `0.21 GFLOP a token`."""
        if self.of_params:
            return f"{size_change(int(point.cost), int(point.cost))[1]} parameters"
        return f"{point.cost / self.budget.one:.3g} {self.budget.unit}"

    @property
    def front(self) -> list[Point]:
        """From the smallest model up."""
        return sorted((p for p in self.points if p.front), key=lambda p: p.cost)


def over_budgets(rows: Sequence[Row]) -> dict[str, list[Measure]]:
    """Every measure over every budget that runs have, parameters first; what searches select by over those alone."""
    found = {name: [m for m in measure(rows, name) if name == "params" or not m.criterion] for name in OVER}
    return {name: some for name, some in found.items() if any(p.row for m in some for p in m.points)}


def costs(row: Row, budget: str) -> tuple[float | None, float | None]:
    """Of the dense model and of a run's, by a budget."""
    if budget == "params":
        before, after = row.params.before, row.params.after
        return before, None if after is None else after - row.params.zeroed
    if budget == "latency_s":
        for cell in row.record.speed.cells:
            if cell.dense.latency_s and cell.compressed.latency_s:
                return 1.0, cell.compressed.latency_s.median / cell.dense.latency_s.median
        return None, None
    both = row.record.costs.dense, row.record.costs.compressed
    dense, compressed = (side.bytes if budget == "bytes" else side.flops_per_token for side in both)
    return dense, compressed


def measure(rows: Sequence[Row], budget: str = "params") -> list[Measure]:
    """Every measure that the finished runs allow: the seven-task average (else each task), perplexities, similarity."""
    done = [row for row in rows if row.finished and row.params]
    tasks = {task: (f"task-{task}", task) for row in done for task in (c.task for c in row.tasks)}
    if any(row.average for row in done):
        tasks = {"average": ("average", "Seven-task average")}
    out = [_measure(key, name, "per cent", 1, True, [
        (row, c.dense.times(100) if c and c.dense else None, c.compressed.times(100) if c and c.compressed else None)
        for row in done for c in [row.compared(task)]],
        budget,
        chance=next((100 * c.chance for row in done if (c := row.compared(task)) and c.chance is not None), None))
        for task, (key, name) in tasks.items()]
    texts = dict.fromkeys(c for row in done for c in row.measured.compressed.perplexity)
    out += [_measure(f"perplexity-{corpus}", f"Perplexity, {corpus}", "lower is better", 2, False, [
        (row, _exact(row.perplexity(corpus, "dense")), _perplexity(row, corpus)) for row in done], budget)
        for corpus in texts]
    for kind in sorted({row.record.plan.similarity for row in done if row.score is not None}):
        out.append(_measure(f"score-{kind}", f"Similarity to dense, {kind}", "1 is identical", 4, True, [
            (row, _exact(1.0), _exact(row.score)) for row in done
            if row.score is not None and row.record.plan.similarity == kind], budget, criterion=True))
    return [m for m in out if m.points]


def _exact(value: float | None) -> Estimate | None:
    return None if value is None else Estimate(value, None)


def _perplexity(row: Row, corpus: str) -> Estimate | None:
    """With the standard error of the ratio to the dense model over the same chunks, as a perplexity."""
    value, dense, ratio = row.perplexity(corpus), row.perplexity(corpus, "dense"), row.verdict.texts.get(corpus)
    stderr = ratio.stderr if ratio else None
    return None if value is None else Estimate(value, None if dense is None or stderr is None else dense * stderr)


def _measure(key: str, name: str, unit: str, digits: int, higher: bool,
             found: Sequence[tuple[Row, Estimate | None, Estimate | None]], budget: str, chance: float | None = None,
             criterion: bool = False) -> Measure:
    """From every run's dense and compressed model."""
    dense = {(cost, side.value, side.stderr) for row, side, _ in found if side and (cost := costs(row, budget)[0])}
    runs = [Point(row, cost, side.value, side.stderr) for row, _, side in found
            if side and math.isfinite(side.value) and (cost := costs(row, budget)[1]) is not None]
    points = [*(Point(None, *values) for values in sorted(dense, key=lambda d: (d[0], d[1], d[2] or 0.0))), *runs]
    shown = tuple(points if runs else ())
    return Measure(key, name, unit, digits, higher, shown if criterion else with_front(shown, higher),
                   len(found) - len(runs), chance, criterion, OVER[budget])


def with_front(points: Sequence[Point], higher: bool) -> tuple[Point, ...]:
    """Points with their `front`."""
    front = on_front([(p.cost, -p.value if higher else p.value) for p in points])
    return tuple(replace(p, front=on) for p, on in zip(points, front, strict=True))


class PathPlan(Section):
    """What the thresholds of one interval give."""

    threshold_low: float
    threshold_high: float
    n_layers: int
    final_score: float | None = None


class PathSize(Section):
    """What a size of the path costs to run, by its best plan."""

    n_layers: int
    params: float | None = None
    flops_per_token: float | None = None
    latency_s: float | None = None
    bytes: float | None = None


class Losses(Section):
    """Of a size of the path, in nats a token of passages that nothing was fitted on."""

    before: NonNegativeFloat | None = None
    after: NonNegativeFloat | None = None
    """The training of all sizes."""
    kept: bool = True

    @property
    def recovered(self) -> float | None:
        return self.after if self.kept else self.before


class PathRecovery(Section):
    """The one training that recovered all sizes of a path."""

    name: str
    dense: NonNegativeFloat | None = None
    """Loss of the dense model."""
    sizes: dict[str, Losses]
    """By layers left."""


class ThresholdPath(Section):
    """A path.json: what every threshold in a range gives."""

    plans: list[PathPlan]
    """Ascending."""
    config: dict[str, JsonObject | int | bool | None]
    model: Model
    calibration: Calibration
    sizes: list[PathSize] = []  # noqa: RUF012
    recovery: PathRecovery | None = None
    unknown: list[list[float]] = []  # noqa: RUF012 (pydantic copies defaults)
    source: str = ""
    """Where it was read, from the sweep's folder."""

    def curve(self, budget: str) -> list[tuple[PathSize, float, Losses]]:
        """(size, what it costs, its losses) of every size that one training recovered, the cheapest first; empty where
        the path was read without that cost."""
        losses = self.recovery.sizes if self.recovery else {}
        found = [(size, cost, losses[str(size.n_layers)]) for size in self.sizes
                 if str(size.n_layers) in losses and (cost := getattr(size, budget)) is not None]
        return sorted(found, key=lambda point: point[1])

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
    if gone := next((path for path in wanted if not path.exists()), None):
        raise SlmError(f"there is no {gone}; expected the path.json that `slm path` writes, or its folder.")
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
