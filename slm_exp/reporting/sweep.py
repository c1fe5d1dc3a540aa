"""`report.html` of a sweep: its runs side by side, what differs between them and what came of it.

Everything is read from what the runs left (records, samples, similarity matrices, logs) and from the sweep's own
definition; nothing is recomputed, and the same files give the same bytes.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from slm_exp.core.errors import SlmError
from slm_exp.core.files import write_text
from slm_exp.core.format import printable, with_error
from slm_exp.evaluation.protocol import mixed
from slm_exp.reporting import atlas, charts, measures, svg, sweep_charts
from slm_exp.reporting.budgets import BUDGETS
from slm_exp.reporting.page import advice, environment, write_report
from slm_exp.reporting.rows import NUMBERS, Row, facets, in_order, order, over_seeds, read_rows, with_results
from slm_exp.reporting.staircase import exponential
from slm_exp.runs.record import Run, say_unverified
from slm_exp.runs.state import DAMAGED, DIED, FAILED, LOG, RUNNING, STATES, WAITING, last_lines
from slm_exp.runs.sweep import SweepFolder

LOG_LINES = 25
"""Shown of the log of a run that failed or died."""


class Trouble(NamedTuple):
    """Incomplete or damaged runs, for one reason."""

    state: str
    stage: str | None
    error: str
    rows: tuple[Row, ...]
    advice: tuple[str, ...]
    log: str
    """The end of the first one's log."""


class StageCost(NamedTuple):
    """What one stage took over the whole sweep: seconds of the runs that computed it, together and the median."""

    name: str
    computed: int
    cached: int
    seconds: float
    median: float | None


def is_sweep(folder: Path) -> bool:
    """Whether runs lie in this folder's subfolders, or a sweep's definition in itself, and no run in itself."""
    return not (folder / "record.json").exists() and (
        any(folder.glob("*/record.json")) or (folder / "sweep.json").exists())


def write_reports(folders: Sequence[Path], mixed_protocols: bool, paths: Sequence[Path], verify: bool,
                  figures: bool = False) -> int:
    """`slm report`: a page of every folder, its path on stdout. 2 where one can have none, 1 where a run is damaged."""
    status = 0
    for folder in folders:
        wrong = ""
        try:
            if is_sweep(folder):
                print(write_sweep_report(folder, mixed_protocols, paths, verify, figures))
            else:
                run = Run.read(folder, verify)
                print(write_report(folder, run=run))
                if figures:
                    from slm_exp.reporting.figures import run_figures  # matplotlib

                    run_figures(run)
                if run.damage:
                    wrong, status = f"{folder} is damaged: {run.damage}", max(status, 1)
            if figures and (folder / svg.FIGURES).is_dir():
                print(folder / svg.FIGURES)
        except SlmError as error:
            wrong, status = str(error), 2
        if wrong:
            print(printable(f"slm report: {wrong}"), file=sys.stderr)
    return status


def write_sweep_report(folder: Path, mixed_protocols: bool = False, paths: Sequence[Path] = (),
                       verify: bool = False, figures: bool = False) -> Path:
    """Write `folder/report.html` from the runs in its subfolders, and a page of every run that has none.

    Args:
        mixed_protocols: show averages side by side although they were measured by different protocols; else the page
            shows none and says in what they differ.
        verify: check the digests of large files too.
        figures: every plot as PDF and SVG in `folder/figures` too.
        paths: path.json files to draw beside the runs, besides those that lie in the folder.
    Raises SlmError: a path.json that was given cannot be read.
    """
    sweep, rows = read_rows(folder, verify)
    refused = None if mixed_protocols else mixed(
        {f"{row.name} ({which})": row.record.eval.of(which).protocol
         for row in rows for which in ("dense", "compressed")})
    rows = in_order([row if refused else with_results(row) for row in rows])
    for row in rows:
        if row.run and not (row.finished and (row.folder / "report.html").exists()):
            write_report(row.folder, run=row.run)
    shades = sweep_charts.shades(rows)
    quality = measures.over_budgets(rows)
    tasks = list(dict.fromkeys(c.task for row in rows for c in row.tasks))
    seeds = over_seeds(rows)
    averages = not refused and any(row.average or row.measured.compressed.average is not None for row in rows)
    found = measures.read_paths(folder, paths)
    staircase = sweep_charts.staircase(rows, found, shades)
    page = environment().get_template("sweep.html.j2").render(
        name=folder.resolve().name, rows=rows, columns=list(rows[0].settings) if rows else [], charts=charts, svg=svg,
        counts={state: n for state in STATES if (n := sum(row.state == state for row in rows))},
        refused=refused, shades=shades,
        plots={budget: [(m, sweep_charts.scatter(m, shades)) for m in some] for budget, some in quality.items()},
        shape=sweep_charts.shape, shapes=sweep_charts.shapes(), averages=averages, facets=facets(rows),
        curves=[path for path in found if path.curve("params")], curve=sweep_charts.curve, budgets=BUDGETS,
        exponential=exponential, staircase=staircase, atlas=atlas.gather(rows), strip=atlas.strip,
        bar=sweep_charts.interval,
        reach=sweep_charts.reach(rows), tasks=tasks, compared=[*(["average"] if averages else []), *tasks],
        corpora=list(dict.fromkeys(c for row in rows for side in row.measured.both for c in side.perplexity)),
        troubles=troubles(rows), resume=resume_command(folder, sweep),
        stages=stage_costs(rows), warnings=warnings(rows), origin=origin(rows),
        command=shlex.join(["python", "-m", "slm_exp", "-m", *sweep.argv]) if sweep else "", about=about(rows),
        seeds=seeds, numbers=[n for n in NUMBERS if any(n in group.numbers for group in seeds)],
        with_error=with_error, bound=sweep_charts.bound,
        zeroed=any(row.params.zeroed for row in rows),
        unverified=say_unverified(row.run for row in rows if row.run))
    path = folder / "report.html"
    write_text(path, page)
    if figures:
        from slm_exp.reporting.figures import sweep_figures

        sweep_figures(folder, rows, staircase.paths if staircase else ())
    return path


def troubles(rows: list[Row]) -> list[Trouble]:
    """Incomplete and damaged runs, those with the same end together, the worst first."""
    together: dict[tuple[str, str | None, str], list[Row]] = {}
    for row in rows:
        if not row.finished:
            together.setdefault((row.state, row.stage, row.error), []).append(row)
    out = []
    for (state, stage, error), some in together.items():
        ended = state in (FAILED, DIED)
        log = "\n".join(last_lines(some[0].folder / LOG, LOG_LINES)) if ended else ""
        out.append(Trouble(state, stage, error, tuple(some), tuple(advice(some[0].record)[:1]), log))
    return sorted(out, key=lambda t: [DAMAGED, FAILED, DIED, RUNNING, WAITING].index(t.state))


def resume_command(folder: Path, sweep: SweepFolder | None) -> str | None:
    """What finishes the runs that are not, from where the sweep was started; None without a definition."""
    if sweep is None:
        return None
    inside = sweep.cwd and folder.resolve().is_relative_to(sweep.cwd)
    return f"slm sweep resume {shlex.quote(os.path.relpath(folder.resolve(), sweep.cwd) if inside else str(folder))}"


def stage_costs(rows: list[Row]) -> list[StageCost]:
    """Every stage in the order of the first run that has it: how often computed, how often from the cache."""
    every = [stage for row in sorted(rows, key=lambda row: -len(row.record.stages)) for stage in row.record.stages]
    out = []
    for name in dict.fromkeys(stage.name for stage in every):
        took = [stage.seconds for stage in every if stage.name == name and not stage.cached]
        cached = sum(stage.cached for stage in every if stage.name == name)
        out.append(StageCost(name, len(took), cached, sum(took), median(took) if took else None))
    return out


def warnings(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """What runs warned of, and which ones."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        for message in row.record.warnings:
            out.setdefault(message, []).append(row)
    return list(out.items())


def origin(rows: list[Row]) -> dict[str, list[str]]:
    """What made the runs; more than one value of a thing may be why numbers differ."""
    packages = ("slm_exp", "torch", "transformers", "lm_eval")
    records = [row.record for row in rows]
    out = {"code": {r.git.commit[:12] + (" with uncommitted changes" if r.git.dirty else "") for r in records if r.git},
           "device": {r.device.name or r.device.type for r in records if r.device},
           **{name: {version for r in records if (version := r.versions.get(name))} for name in packages}}
    return {name: sorted(values) for name, values in out.items() if values}


class About(NamedTuple):
    """What the runs have in common or not: models with their notes, limits, calibrations."""

    models: list[tuple[str, str]]
    limits: list[int | None]
    calibrations: list[str]


def about(rows: list[Row]) -> About:
    records = [row.record for row in rows if row.record]
    models = {record.model.name: record.model.note for record in records if record.model}
    limits = {record.member("evaluation").get("limit") for record in records}
    drawn = {f"{c.source}, {c.size} tokens" for c in (record.calibration for record in records) if c}
    return About(sorted(models.items()), sorted(limits, key=order), sorted(drawn))
