"""`report.html` of a sweep: its runs side by side, what differs between them and what came of it.

Everything is read from what the runs left (records, samples, similarity matrices, logs) and from the sweep's own
definition; nothing is recomputed, and the same files give the same bytes.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from slm_exp.core.errors import ConfigError, PlanError, SlmError
from slm_exp.core.files import write_text
from slm_exp.core.types import MergePlan
from slm_exp.evaluation.protocol import mixed
from slm_exp.reporting import atlas, charts, measures, results, sweep_charts
from slm_exp.reporting.page import advice, environment, setting, write_report
from slm_exp.reporting.results import Comparison
from slm_exp.runs.record import load_record
from slm_exp.runs.sweep import (
    DIED,
    FAILED,
    FINISHED,
    LOG,
    RUNNING,
    STATES,
    WAITING,
    Cell,
    SweepFolder,
    last_lines,
    state_of,
)
from slm_exp.runs.tracking.base import flat

UNINTERESTING = ("tracking/", "runtime/", "cache/", "save_model")
"""Settings that change no result: never a column."""
FACETS = range(2, 13)
"""So many values make a setting one to choose from, in the filter and for the marks of the charts."""
LOG_LINES = 25
"""Shown of the log of a run that failed or died."""


@dataclass(frozen=True)
class Row:
    """One run of the sweep, as the page shows it."""

    run: str
    """Its folder's name."""
    address: str
    """Of its folder, from the sweep's, as links write it."""
    state: str
    """One of launch.folder.STATES."""
    folder: Path
    record: dict[str, Any]
    """Empty where there is none."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What differs between the sweep's runs, by config path."""
    overrides: tuple[str, ...] = ()
    """As the sweep's definition has them; the settings of a run that has not started."""
    error: str = ""
    """What ended it, in one line."""
    stage: str | None = None
    tasks: tuple[Comparison, ...] = ()
    average: Comparison | None = None
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The record's `eval`; empty where protocols differ and it was not asked to show them side by side."""

    @property
    def params(self) -> dict[str, Any]:
        return self.record.get("params") or {}

    @property
    def removed(self) -> float | None:
        return self.params.get("ratio_removed")

    @property
    def score(self) -> float | None:
        return (self.record.get("plan") or {}).get("final_score")

    @cached_property
    def plan(self) -> MergePlan | None:
        """What was decided; None where nothing was, or by a version that wrote other fields."""
        try:
            return MergePlan.from_json(self.record["plan"]) if self.record.get("plan") else None
        except (PlanError, TypeError, ValueError):
            return None

    def compared(self, task: str) -> Comparison | None:
        """A task's results, or those of `average`; None where there are none."""
        return self.average if task == "average" else next((c for c in self.tasks if c.task == task), None)

    def perplexity(self, corpus: str, which: str = "compressed") -> float | None:
        value = ((self.measured.get(which) or {}).get("perplexity") or {}).get(corpus)
        return None if value is None else float(value)

    @property
    def told(self) -> str:
        """The settings in a phrase."""
        return ", ".join(f"{setting(path)} {value}" for path, value in self.settings.items()) or self.run

    @property
    def brief(self) -> str:
        """The settings' values alone."""
        return ", ".join("–" if value is None else str(value) for value in self.settings.values()) or self.run

    @property
    def finished(self) -> bool:
        return self.state == FINISHED


@dataclass(frozen=True)
class Trouble:
    """Runs that are not finished for one reason."""

    state: str
    stage: str | None
    error: str
    rows: tuple[Row, ...]
    advice: tuple[str, ...]
    log: str
    """The end of the first one's log."""


@dataclass(frozen=True)
class StageCost:
    """What one stage took over the whole sweep."""

    name: str
    computed: int
    cached: int
    seconds: float
    """Of those computed, together."""
    median: float | None
    """Of those computed."""


def is_sweep(folder: Path) -> bool:
    """Whether runs lie in this folder's subfolders, or a sweep's definition in itself, and no run in itself."""
    return not (folder / "record.json").exists() and (
        any(folder.glob("*/record.json")) or (folder / "sweep.json").exists())


def write_sweep_report(folder: Path, mixed_protocols: bool = False, paths: Sequence[Path] = ()) -> Path:
    """Write `folder/report.html` from the runs in its subfolders, and a page of every run that has none.

    Args:
        mixed_protocols: show averages side by side although they were measured by different protocols; else the page
            shows none and says in what they differ.
        paths: path.json files to draw beside the runs, besides those that lie in the folder.

    Raises:
        SlmError: a path.json that was asked for cannot be read.
    """
    sweep, rows = read_rows(folder)
    refused = None if mixed_protocols else mixed(
        {f"{row.run} ({which})": (side or {}).get("protocol")
         for row in rows for which, side in (row.record.get("eval") or {}).items()})
    rows = in_order([row if refused else with_results(row) for row in rows])
    for row in rows:
        if row.record and not (row.finished and (row.folder / "report.html").exists()):
            write_report(row.folder)
    shades = sweep_charts.shades(rows)
    quality = measures.measure(rows)
    staircase = sweep_charts.staircase(rows, measures.read_paths(folder, paths), shades)
    page = environment().get_template("sweep.html.j2").render(
        name=folder.resolve().name, rows=rows, columns=list(rows[0].settings) if rows else [], charts=charts,
        counts={state: n for state in STATES if (n := sum(row.state == state for row in rows))},
        refused=refused, plots=[(m, sweep_charts.scatter(m, shades)) for m in quality], shades=shades,
        shape=sweep_charts.shape, shapes=sweep_charts.shapes(), unit_of=sweep_charts.unit_of, facets=facets(rows),
        staircase=staircase,
        atlas=atlas.gather(rows), strip=atlas.strip, bar=sweep_charts.interval,
        reach=sweep_charts.reach(rows), tasks=list(dict.fromkeys(c.task for row in rows for c in row.tasks)),
        corpora=corpora(rows), troubles=troubles(rows), resume=resume_command(folder, sweep),
        stages=stage_costs(rows), warnings=warnings(rows), origin=origin(rows),
        command=shlex.join(["python", "-m", "slm_exp", "-m", *sweep.argv]) if sweep else "", about=about(rows),
        bound=sweep_charts.bound, zeroed=any(row.params.get("zeroed") for row in rows),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def read_rows(folder: Path) -> tuple[SweepFolder | None, list[Row]]:
    """Every cell of the definition, where there is one, and every run in a subfolder; nothing is left out."""
    try:
        sweep = SweepFolder.read(folder)
    except ConfigError:
        sweep = None
    cells = {cell.job.folder.resolve(): cell for cell in (sweep.cells() if sweep else ())}
    here = {path.parent.resolve(): path.parent for path in folder.glob("*/record.json")}
    rows = []
    for where in sorted({*cells, *here}):
        cell, run = cells.get(where), here.get(where) or cells[where].job.folder
        try:
            record = load_record(run) if (run / "record.json").exists() else {}
        except SlmError as error:
            rows.append(Row(run.name, quote(os.path.relpath(run, folder)), DIED, run, {}, error=str(error),
                            overrides=cell.job.overrides if cell else ()))
            continue
        rows.append(_row(run, quote(os.path.relpath(run, folder)), record, cell))
    return sweep, rows


def _row(run: Path, address: str, record: dict[str, Any], cell: Cell | None) -> Row:
    error = record.get("error") or {}
    state = state_of(run, record) if record else cell.state if cell else WAITING  # finished by any version is finished
    said = f"{error.get('type')}: {error.get('message')}" if state == FAILED else ""
    if state == DIED:
        said = "It ended without a word: killed, out of memory, or power." if record else (cell and cell.error) or ""
    stage = error.get("stage") or record.get("stage")
    overrides = cell.job.overrides if cell else ()
    return Row(run.name, address, state, run, record, overrides=overrides, error=said, stage=stage)


def with_results(row: Row) -> Row:
    """The row with what was measured. Reads the run's samples."""
    measured = row.record.get("eval") or {}
    tasks = results.compare(measured, row.folder / "samples")
    return replace(row, measured=measured, tasks=tuple(tasks), average=results.average(measured, tasks))


def in_order(rows: list[Row]) -> list[Row]:
    """With what differs between the runs, ordered by it, numbers by size.

    A setting that another member of its group implies (`method.protect_last` where only `method` differs) is no
    column.
    """
    configs = [flat(row.record.get("config") or {}) for row in rows]
    known = [config for config in configs if config]
    paths = [path for path in dict.fromkeys(p for config in configs for p in config)
             if not path.startswith(UNINTERESTING) and len({repr(c.get(path)) for c in known}) > 1]

    def implied(path: str) -> bool:
        name = f"{path.partition('/')[0]}/name"
        pairs = {(repr(c.get(name)), repr(c.get(path))) for c in known}
        return path != name and name in paths and len({member for member, _ in pairs}) == len(pairs)

    paths = [path for path in paths if not implied(path)]
    filled = [replace(row, settings={path: config.get(path) if config else _given(row.overrides, path)
                                     for path in paths}) for row, config in zip(rows, configs, strict=True)]
    return sorted(filled, key=lambda row: [order(value) for value in row.settings.values()])


def order(value: Any) -> tuple[bool, float, str]:
    """A sorting key for any setting: numbers first, by size."""
    number = isinstance(value, (int, float))
    return not number, float(value) if number else 0.0, str(value)


def _given(overrides: Sequence[str], path: str) -> Any:
    """A setting of a run that has not started, from its overrides."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key == setting(path):
            try:
                return float(value) if "." in value or "e" in value else int(value)
            except ValueError:
                return value
    return None


def facets(rows: list[Row]) -> dict[str, list[Any]]:
    """Settings with few values, and the values: what the table is filtered by."""
    out = {}
    for path in rows[0].settings if rows else ():
        values = sorted({row.settings[path] for row in rows if row.settings[path] is not None}, key=order)
        if len(values) in FACETS:
            out[path] = values
    return out


def corpora(rows: list[Row]) -> list[str]:
    """Every text that some run has a perplexity on."""
    return list(dict.fromkeys(c for row in rows for side in row.measured.values()
                              for c in (side or {}).get("perplexity") or {}))


def troubles(rows: list[Row]) -> list[Trouble]:
    """Runs that are not finished, those with the same end together, the worst first."""
    together: dict[tuple[str, str | None, str], list[Row]] = {}
    for row in rows:
        if not row.finished:
            together.setdefault((row.state, row.stage, row.error), []).append(row)
    out = []
    for (state, stage, error), some in together.items():
        ended = state in (FAILED, DIED)
        log = "\n".join(last_lines(some[0].folder / LOG, LOG_LINES)) if ended else ""
        out.append(Trouble(state, stage, error, tuple(some), tuple(advice(some[0].record)[:1]), log))
    return sorted(out, key=lambda t: [FAILED, DIED, RUNNING, WAITING].index(t.state))


def resume_command(folder: Path, sweep: SweepFolder | None) -> str | None:
    """What finishes the runs that are not, from where the sweep was started; None without a definition."""
    if sweep is None:
        return None
    inside = sweep.cwd and folder.resolve().is_relative_to(sweep.cwd)
    where = os.path.relpath(folder.resolve(), sweep.cwd) if inside else str(folder)
    return f"slm sweep resume {shlex.quote(where)}"


def stage_costs(rows: list[Row]) -> list[StageCost]:
    """Every stage in the order of the first run that has it: how often computed, how often from the cache."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: -len(row.record.get("stages") or ())):
        for stage in row.record.get("stages") or ():
            stages.setdefault(stage["name"], []).append(stage)
    out = []
    for name, some in stages.items():
        took = [stage["seconds"] for stage in some if not stage["cached"]]
        out.append(StageCost(name, len(took), len(some) - len(took), sum(took), median(took) if took else None))
    return out


def warnings(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """What runs warned of, and which ones."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        for message in row.record.get("warnings") or ():
            out.setdefault(message, []).append(row)
    return list(out.items())


def origin(rows: list[Row]) -> dict[str, list[str]]:
    """What made the runs; more than one value of a thing may be why numbers differ."""
    packages = ("slm_exp", "torch", "transformers", "lm_eval")
    out: dict[str, list[str]] = {name: [] for name in ("code", "device", *packages)}
    for row in rows:
        record = row.record
        git, device = record.get("git") or {}, record.get("device") or {}
        if git:
            out["code"].append(f"{git['commit'][:12]}{' with uncommitted changes' if git.get('dirty') else ''}")
        if isinstance(device, dict) and device:
            out["device"].append(str(device.get("name") or device.get("type")))
        for package in packages:
            if version := (record.get("versions") or {}).get(package):
                out[package].append(str(version))
    return {name: sorted(set(values)) for name, values in out.items() if values}


def about(rows: list[Row]) -> dict[str, list[Any]]:
    """What the runs have in common or not: models with their notes, limits, calibrations."""
    models = {m["name"]: m.get("note") or "" for row in rows if (m := row.record.get("model"))}
    limits = {(row.record.get("config") or {}).get("evaluation", {}).get("limit") for row in rows if row.record}
    drawn = {f"{c['source']}, {c['shape'][0]} × {c['shape'][1]} tokens" for row in rows
             if (c := row.record.get("calibration"))}
    return {"models": sorted(models.items()), "limits": sorted(limits, key=order), "calibrations": sorted(drawn)}
