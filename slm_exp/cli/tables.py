"""`slm tables NAME [PARAM=VALUE ...] [DIR ...]`: a table of a paper from records.

NAME is a file of conf/table, a .yaml file of your own, or `sweep`: one row per run. DIR are folders with runs (outputs
when none is given). A table's parameters are set like overrides: slm tables main model=llama2_7b outputs. Of any
other model: model=hf model.path=FOLDER; where none is named it is that of the runs.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from slm_exp.cli.command import FOLDER, command


def _notes() -> str:
    from slm_exp.tables.definition import summaries

    lines = [f"  {name:<12} {title} (params: {', '.join(params)})" for name, title, params in summaries()]
    more = "Parameters of all: sizes, seeds, evaluation, calibration, extra; conf/table/_models.yaml has their values."
    return "\n".join(["tables:", *lines, "", more])


def _complete_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from slm_exp.tables.definition import summaries

    names = [name for name, _, _ in summaries()]
    return [CompletionItem(name) for name in (*names, "sweep") if name.startswith(incomplete)]


@command(
    "tables", __doc__,
    examples={"slm tables sweep outputs/multirun/threshold_rule": "one row per run",
              "slm tables main outputs --missing": "the commands that fill what is missing",
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
@click.option("--verify", is_flag=True, help="check the digests of large files of the runs too")
def main(name: str, words: tuple[str, ...], formats: str, out: Path | None, columns: str | None, missing: bool,
         reference: bool, mixed_protocols: bool, verify: bool, form: bool, reference_file: Path | None) -> int:
    from slm_exp.tables.build import draw

    return draw(name, words, formats, out, columns, missing, reference, mixed_protocols, verify, form, reference_file)
