"""`slm tables NAME [PARAM=VALUE ...] [DIR ...]`: a table of a paper from records.

NAME is a file of conf/table, a .yaml file of your own, `sweep`: one row per run, or `paper`: all of a model with what
they cost, and a folder with every table and figure that has runs. DIR are folders with runs (outputs when none is
given). A table's parameters are set like overrides: slm tables main model=llama2_7b outputs. Of any other model:
model=hf model.path=FOLDER; where none is named it is that of the runs.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from slm_exp.cli.command import FOLDER, command, require_tflops
from slm_exp.core.errors import ConfigError
from slm_exp.forecast.plan import cell_jobs, plan_jobs
from slm_exp.tables.build import OUTPUTS, draw, split_words, with_model
from slm_exp.tables.definition import summaries
from slm_exp.tables.paper import tables_of, write_paper
from slm_exp.tables.records import find_runs


def _notes() -> str:
    lines = [f"  {name:<12} {title} (params: {', '.join(params)})" for name, title, params in summaries()]
    more = "Parameters of all: sizes, seeds, evaluation, calibration, extra; conf/table/_models.yaml has their values."
    return "\n".join(["tables:", *lines, "", more])


def _complete_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    names = [name for name, _, _ in summaries()]
    return [CompletionItem(name) for name in (*names, "sweep", "paper") if name.startswith(incomplete)]


@command(
    "tables", __doc__,
    examples={"slm tables sweep outputs/multirun/threshold_rule": "one row per run",
              "slm tables main outputs --missing": "the commands that fill what is missing",
              "slm tables paper model=llama2_7b --tflops 300": "all tables, their GPU hours, a folder of what is there",
              "slm tables main outputs --format md,tex --out tables": "two formats, into files"},
    exits={0: "the table is written", 2: "a wrong call, or numbers of different protocols"},
    notes=_notes)
@click.argument("name", metavar="NAME", shell_complete=_complete_name)
@click.argument("words", metavar="[PARAM=VALUE or DIR]...", nargs=-1, type=click.Path())
@click.option("--format", "formats", default="md", metavar="md,tex,csv,html",
              help="one goes to stdout, several need --out (default md)")
@click.option("--out", type=FOLDER, metavar="DIR", help="write DIR/NAME.FORMAT instead")
@click.option("--columns", metavar="A,B", help="these columns, in this order: of the table, or any quantity")
@click.option("--missing", is_flag=True, help="print the commands that fill what is missing")
@click.option("--reference", is_flag=True,
              help="ours beside published numbers (conf/reference), with difference and verdict")
@click.option("--form", is_flag=True,
              help="print an empty reference with every row and column, to fill in from a paper")
@click.option("--reference-file", type=FOLDER, metavar="FILE", help="check a filled form, and put it beside ours")
@click.option("--mixed-protocols", is_flag=True, help="show numbers of different protocols too")
@click.option("--tflops", type=float, metavar="N", help="paper: GPU hours on a card that sustains N TFLOP/s")
@click.option("--verify", is_flag=True, help="check the digests of large files of the runs too")
def main(name: str, words: tuple[str, ...], formats: str, out: Path | None, columns: str | None, missing: bool,
         reference: bool, mixed_protocols: bool, verify: bool, form: bool, reference_file: Path | None,
         tflops: float | None) -> int:
    if name == "paper":
        others = {"--columns": columns, "--missing": missing, "--reference": reference, "--form": form,
                  "--reference-file": reference_file, "--mixed-protocols": mixed_protocols}
        if given := [flag for flag, value in others.items() if value]:
            raise ConfigError(f"slm tables paper: {given[0]}; expected PARAM=VALUE, DIR, --out and --tflops only: it "
                              "writes every format, and missing.sh.")
        return _paper(words, out, tflops, verify)
    if tflops is not None:
        raise ConfigError(f"--tflops with slm tables {name}; expected slm tables paper. Of one table: "
                          f"slm plan table={name} --tflops {tflops:g}.")
    return draw(name, words, formats, out, columns, missing, reference, mixed_protocols, verify, form, reference_file)


def _paper(words: tuple[str, ...], out: Path | None, tflops: float | None, verify: bool) -> int:
    """List every table of a model with its cost; write those that have runs."""
    require_tflops(tflops)
    params, folders = split_words(words)
    there = folders or ([OUTPUTS] if OUTPUTS.is_dir() else [])
    runs = find_runs(there, may_be_empty=not folders, verify=verify) if there else []
    params = with_model("main", params, runs)
    tables, left = tables_of(params)
    print(f"{'table':<14}{'runs':>6}{'to run':>8}{'PFLOP':>11}{'GPU hours' if tflops else '':>11}")
    costs, distinct, total = {}, set[str](), 0.0
    for table in tables:
        cells = [[*cell, *(["runtime=cuda"] if tflops else [])] for cell in table.cells()]
        plan = plan_jobs(cell_jobs(table.name, cells), tflops or 1.0)
        hours = None if plan.seconds is None or not tflops else plan.seconds / 3600
        distinct |= {" ".join(job.job.overrides) for job in plan.jobs}
        total += hours or 0
        work = f"{sum(j.flops for j in plan.to_run) / 1e15:,.3g}"
        took = "" if hours is None else f"{hours:.2g}"
        print(f"{table.name:<14}{len(plan.jobs):>6}{len(plan.to_run):>8}{work:>11}{took:>11}")
        costs[table.name] = f"{len(plan.to_run)} runs, {work} PFLOP" + (f", {took} GPU hours" if took else "")
        for problem in dict.fromkeys(job.problem for job in plan.jobs if job.problem):
            print(f"  WOULD FAIL: {problem}")
    took = f"{total:.3g}" if tflops else ""
    print(f"{'together':<14}{len(distinct):>6}{'':>19}{took:>11}   at most: tables share runs")
    for line in left:
        print(f"left out: {line}")
    folder = out or OUTPUTS / "paper" / str(tables[0].params["named"])
    drawn = write_paper(tables, runs, folder, costs)
    for one in drawn:
        print(f"{one.table.name:<14}{one.filled} of {one.rows} rows" + (f": {one.why}" if one.why else ""))
    print(folder / "index.html")
    return 2 if any(one.why not in ("", "no run yet") for one in drawn) else 0
