"""What the runs of a sweep are compared by: a quality over the number of parameters, and which runs no other beats."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp.core.errors import SlmError

if TYPE_CHECKING:
    from slm_exp.reporting.sweep import Row

Z95 = 1.96
"""Standard errors from a mean to either end of its 95 % interval."""


@dataclass(frozen=True)
class Point:
    """One model: a run's compressed one, or the dense one, which belongs to no run."""

    row: Row | None
    params: int
    """Those that have an effect: without the ones that removed halves of layers leave behind as zeros."""
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

    def show(self, value: float) -> str:
        return f"{value:.{self.digits}f}" if abs(value) < 1e5 else f"{value:.3g}"

    @property
    def front(self) -> list[Point]:
        """From the smallest model up."""
        return sorted((p for p in self.points if p.front), key=lambda p: p.params)


def measure(rows: Sequence[Row]) -> list[Measure]:
    """Every measure that the finished runs allow: the seven-task average (else each task), perplexities, similarity."""
    done = [row for row in rows if row.finished and row.params]
    out = []
    if any(row.average for row in done):
        out.append(_measure("average", "Seven-task average", "per cent", 1, True, done, [
            (row, _accuracy(row.average)) for row in done]))
    else:
        out += [_measure(f"task-{task}", task, "per cent", 1, True, done, [
            (row, _accuracy(row.compared(task))) for row in done])
            for task in dict.fromkeys(c.task for row in done for c in row.tasks)]
    texts = dict.fromkeys(c for row in done for c in (row.measured.get("compressed") or {}).get("perplexity") or {})
    out += [_measure(f"perplexity-{corpus}", f"Perplexity, {corpus}", "lower is better", 2, False, done, [
        (row, _plain(row.perplexity(corpus, "dense"), row.perplexity(corpus))) for row in done]) for corpus in texts]
    for kind in sorted({row.record["plan"].get("similarity") or "" for row in done if row.score is not None}):
        of = [row for row in done if row.score is not None and (row.record["plan"].get("similarity") or "") == kind]
        out.append(_measure(f"score-{kind}", f"Similarity to dense, {kind}", "1 is identical", 4, True, of, [
            (row, _plain(1.0, row.score)) for row in of]))
    return [m for m in out if m.points]


Sides = tuple[tuple[float, float | None] | None, tuple[float, float | None] | None]
"""Dense and compressed, each (value, standard error) or None."""


def _accuracy(row: Any) -> Sides:
    both = [None if row is None or e is None else (100 * e.value, None if e.stderr is None else 100 * e.stderr)
            for e in ((row.dense, row.compressed) if row else (None, None))]
    return both[0], both[1]


def _plain(dense: float | None, compressed: float | None) -> Sides:
    return None if dense is None else (dense, None), None if compressed is None else (compressed, None)


def _measure(key: str, name: str, unit: str, digits: int, higher: bool, done: Sequence[Row],
             found: Sequence[tuple[Row, Sides]]) -> Measure:
    dense = {(row.params["before"], *side) for row, (side, _) in found if side}
    points = [Point(None, params, value, stderr) for params, value, stderr in
              sorted(dense, key=lambda d: (d[0], d[1], d[2] or 0.0))]
    points += [Point(row, row.params["after"] - (row.params.get("zeroed") or 0), *side) for row, (_, side) in found
               if side and math.isfinite(side[0])]
    if all(p.row is None for p in points):
        points = []
    here = sum(p.row is not None for p in points)
    return Measure(key, name, unit, digits, higher, _with_front(points, higher), len(done) - here)


def _with_front(points: Sequence[Point], higher: bool) -> tuple[Point, ...]:
    """Points with their `front`: for every size upwards, those better than all smaller ones."""
    best: float | None = None
    good: set[tuple[int, float]] = set()
    for params in sorted({p.params for p in points}):
        here = [p.value for p in points if p.params == params]
        value = max(here) if higher else min(here)
        if best is None or (value > best if higher else value < best):
            best = value
            good.add((params, value))
    return tuple(replace(p, front=(p.params, p.value) in good) for p in points)


@dataclass(frozen=True)
class ThresholdPath:
    """A path.json: what every threshold in a range gives."""

    source: str
    plans: tuple[dict[str, Any], ...]
    """`{threshold_low, threshold_high, n_layers, final_score}`, ascending."""
    rule: str
    similarity: str
    model: str
    """Its weights' digest."""
    calibration: str
    """Its tokens' digest."""
    unknown: tuple[tuple[float, float], ...] = ()


def read_paths(folder: Path, given: Sequence[Path] = ()) -> list[ThresholdPath]:
    """The path.json files that lie in a folder or in its subfolders (those that cannot be read are no paths), and
    those asked for.

    Raises:
        SlmError: one that was asked for is not there or is no path.
    """
    found = sorted((*folder.glob("path.json"), *folder.glob("*/path.json")))
    asked = [path / "path.json" if path.is_dir() else path for path in given]
    out = []
    for path in dict.fromkeys([*found, *asked]):
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            config = told["config"]
            out.append(ThresholdPath(
                path.name if path.parent == folder else f"{path.parent.name}/{path.name}", tuple(told["plans"]),
                config["merge_rule"]["name"], config["similarity"]["name"], told["model"]["digest"],
                told["calibration"]["digest"], tuple((a, b) for a, b in told.get("unknown", ()))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if path in asked:
                raise SlmError(f"{path} is no threshold path ({type(error).__name__}: {error}); expected the path.json "
                               "that `slm path` writes, or its folder.") from None
    return out
