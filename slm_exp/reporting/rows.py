"""The runs of a sweep as its page shows them, each in a row."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.core.format import printable
from slm_exp.core.types import MergePlan
from slm_exp.reporting import results
from slm_exp.reporting.results import Comparison
from slm_exp.runs.record import Run
from slm_exp.runs.schema import Measurements, Parameters, Record, Verdict
from slm_exp.runs.state import DAMAGED, DIED, FAILED, FINISHED, UNEXPECTED, WAITING
from slm_exp.runs.statistics.spread import Spread, by_seed, differing, is_seed, spread
from slm_exp.runs.statistics.verdict import verdict_of
from slm_exp.runs.sweep import Cell, SweepFolder
from slm_exp.runs.tracking.base import flat

FACETS = range(2, 13)
"""So many values make a setting one to choose from, in the filter and for the marks of the charts."""
NOTHING = Record()


@dataclass(frozen=True)
class Row:
    """One run of the sweep, as the page shows it."""

    name: str
    """Its folder's."""
    address: str
    """Of its folder, from the sweep's, as links write it."""
    state: str
    """One of STATES."""
    folder: Path
    run: Run | None = None
    """None where it has not begun, or its record cannot be read."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What differs between the sweep's runs, by config path."""
    overrides: tuple[str, ...] = ()
    """As the sweep's definition has them; the settings of a run that has not started."""
    error: str = ""
    """What ended it, in one line."""
    stage: str | None = None
    tasks: tuple[Comparison, ...] = ()
    average: Comparison | None = None
    measured: Measurements = NOTHING.eval
    """The record's `eval`; empty where protocols differ and side by side was not requested."""
    verdict: Verdict = NOTHING.verdict

    @property
    def record(self) -> Record:
        return self.run.record if self.run else NOTHING

    @property
    def params(self) -> Parameters:
        return self.record.params

    @property
    def removed(self) -> float | None:
        return self.params.ratio_removed

    @property
    def score(self) -> float | None:
        return self.record.plan.final_score

    @property
    def kept(self) -> float | None:
        """Share of the dense model's average."""
        dense, small = (side.average for side in self.measured.both)
        return small / dense if dense and small is not None else None

    @property
    def plan(self) -> MergePlan | None:
        """What was decided; None where nothing was, or by a version that wrote other fields."""
        return self.run.plan if self.run else None

    def compared(self, task: str) -> Comparison | None:
        """A task's results, or those of `average`; None where there are none."""
        return self.average if task == "average" else next((c for c in self.tasks if c.task == task), None)

    def perplexity(self, corpus: str, which: str = "compressed") -> float | None:
        return self.measured.of(which).perplexity.get(corpus)

    @cached_property
    def title(self) -> str:
        """The settings in a phrase."""
        return ", ".join(f"{setting(path)} {value}" for path, value in self.settings.items()
                         if value is not None) or self.name

    @property
    def brief(self) -> str:
        """The settings' values alone."""
        return ", ".join("–" if value is None else str(value) for value in self.settings.values()) or self.name

    @property
    def finished(self) -> bool:
        return self.state == FINISHED


def setting(path: str) -> str:
    """A config path as an override writes it: `method.threshold`, `merge_rule`."""
    return path.removesuffix("/name").replace("/", ".")


def read_rows(folder: Path, verify: bool = False) -> tuple[SweepFolder | None, list[Row]]:
    """Every cell of the definition, where there is one, and every run in a subfolder; nothing is left out.

    Raises:
        ConfigError: neither a definition that can be read nor a run; beside runs a damaged one is named on stderr.
    """
    sweep = None
    if (folder / "sweep.json").exists():
        try:
            sweep = SweepFolder.read(folder)
        except ConfigError as error:
            if not any(folder.glob("*/record.json")):
                raise
            print(printable(f"left out: {error}"), file=sys.stderr)
    cells = {cell.job.folder.resolve(): cell for cell in (sweep.cells() if sweep else ())}
    folders = {where: cell.job.folder for where, cell in cells.items()}
    folders |= {path.parent.resolve(): path.parent for path in folder.glob("*/record.json")}
    return sweep, [_row(at, quote(os.path.relpath(at, folder)), cells.get(where), verify)
                   for where, at in sorted(folders.items())]


def _row(folder: Path, address: str, cell: Cell | None, verify: bool) -> Row:
    overrides = cell.job.overrides if cell else ()
    if not (folder / "record.json").exists():
        state, error = (cell.state, cell.error or "") if cell else (WAITING, "")
        return Row(folder.name, address, state, folder, overrides=overrides, error=error if state == DIED else "")
    try:
        run = Run.read(folder, verify)
    except SlmError as unreadable:
        return Row(folder.name, address, DAMAGED, folder, overrides=overrides, error=str(unreadable))
    error = {FAILED: run.record.error.line, DAMAGED: "; ".join(map(str, run.problems)),
             DIED: f"It {UNEXPECTED}: killed, out of memory, or power."}.get(run.state, "")
    stage = run.record.error.stage or run.record.stage
    return Row(folder.name, address, run.state, folder, run, overrides=overrides, error=error, stage=stage)


def with_results(row: Row) -> Row:
    """The row with what was measured. Reads the run's samples."""
    if row.run is None:
        return row
    tasks = results.compare(row.run)
    return replace(row, measured=row.record.eval, tasks=tuple(tasks), average=results.average(row.run, tasks),
                   verdict=verdict_of(row.run))


def in_order(rows: list[Row]) -> list[Row]:
    """With what differs between the runs, ordered by it, numbers by size."""
    configs = [flat(row.record.config) for row in rows]
    paths = differing(configs)
    filled = [replace(row, settings={path: config.get(path) if config else _given(row.overrides, path)
                                     for path in paths}) for row, config in zip(rows, configs, strict=True)]
    return sorted(filled, key=lambda row: [order(value) for value in row.settings.values()])


def order(value: Any) -> tuple[bool, float, str]:
    """A sorting key for any setting: numbers first, by size."""
    number = isinstance(value, (int, float)) and abs(value) < 1e300  # more are no float
    return not number, float(value) if number else 0.0, str(value)


def _given(overrides: Sequence[str], path: str) -> Any:
    """A setting of a run that has not started, from its overrides."""
    given = {key: value for key, _, value in (o.lstrip("+~").partition("=") for o in reversed(overrides))}
    value = given.get(setting(path))
    try:
        return value if value is None else float(value) if "." in value or "e" in value else int(value)
    except ValueError:
        return value


def facets(rows: list[Row]) -> dict[str, list[Any]]:
    """Settings with few values, and the values: what the table is filtered by."""
    found = {path: {row.settings[path] for row in rows} - {None} for path in (rows[0].settings if rows else ())}
    return {path: sorted(values, key=order) for path, values in found.items() if len(values) in FACETS}


@dataclass(frozen=True)
class OverSeeds:
    """Finished runs that differ in their seeds alone, as one."""

    rows: tuple[Row, ...]
    """Two or more."""
    settings: Mapping[str, Any]
    """Without the seeds."""
    numbers: Mapping[str, Spread]
    """Mean and 95 % interval over the seeds, by the name of NUMBERS."""


NUMBERS: dict[str, Callable[[Row], float | None]] = {
    "Perplexity, times dense": lambda row: r.value if (r := row.verdict.perplexity_ratio) else None,
    "Average": lambda row: None if row.average is None or row.average.compressed is None else (
        100 * row.average.compressed.value),
    "Against dense": lambda row: None if row.average is None or row.average.difference is None else (
        100 * row.average.difference.value),
    "Kept of dense, %": lambda row: None if row.kept is None else 100 * row.kept,
    "Layers": lambda row: row.record.layers.after,
    "Removed, %": lambda row: None if row.removed is None else 100 * row.removed,
    "Similarity": lambda row: row.score,
}
"""What is averaged over seeds: heading -> number."""


def over_seeds(rows: Sequence[Row]) -> list[OverSeeds]:
    """The sweep's settings, each with all of its seeds; none where no setting has two finished runs."""
    done = [row for row in rows if row.finished]
    out = []
    for numbers in by_seed([flat(row.record.config) for row in done]):
        some = tuple(done[n] for n in numbers)
        if len(some) > 1:
            found = {name: [value for row in some if (value := of(row)) is not None] for name, of in NUMBERS.items()}
            out.append(OverSeeds(some, {p: v for p, v in some[0].settings.items() if not is_seed(p)},
                                 {name: spread(values) for name, values in found.items() if len(values) == len(some)}))
    return out
