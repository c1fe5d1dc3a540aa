"""`slm tables NAME [PARAM=VALUE ...] [DIR ...]`: a table of a paper from records.

NAME is a file of conf/table, a .yaml file of your own, or `sweep`: one row per run. DIR are folders with runs (outputs
when none is given). A table's parameters are set like overrides: slm tables main model=llama2_7b outputs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import click
from click.shell_completion import CompletionItem

from slm_exp.cli.command import FOLDER, command
from slm_exp.core.errors import ConfigError, did_you_mean
from slm_exp.core.files import write_text
from slm_exp.evaluation.base import SEVEN

FORMAT_NAMES = ("md", "tex", "csv", "html")
OUTPUTS = Path("outputs")


def _notes() -> str:
    from slm_exp.tables.definition import read_yaml, table_names, table_path

    lines = []
    for name in table_names():
        about = read_yaml(table_path(name))
        params = ", ".join(about.get("params") or {})
        lines.append(f"  {name:<12} {str(about.get('title', '')).replace(', $model', '')} (params: {params})")
    more = "Parameters of all: sizes, seeds, evaluation, calibration, extra; conf/table/_models.yaml has their values."
    return "\n".join(["tables:", *lines, "", more])


def _complete_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from slm_exp.tables.definition import table_names

    return [CompletionItem(name) for name in (*table_names(), "sweep") if name.startswith(incomplete)]


@command(
    "tables", __doc__,
    examples={
        "slm tables sweep outputs/multirun/threshold_rule": "one row per run",
        "slm tables main outputs --missing": "the commands that fill what is missing",
        "slm tables main outputs --format md,tex --out tables": "two formats, into files",
    },
    exits={0: "the table is written", 2: "a wrong call, or numbers of different protocols"},
    notes=_notes,
)  # fmt: skip
@click.argument("name", metavar="NAME", shell_complete=_complete_name)
@click.argument("words", metavar="[PARAM=VALUE or DIR]...", nargs=-1, type=click.Path())
@click.option("--format", "formats", default="md", metavar="md,tex,csv,html",
              help="one goes to stdout, several need --out (default md)")
@click.option("--out", type=FOLDER, metavar="DIR", help="write DIR/NAME.FORMAT instead")
@click.option("--columns", metavar="A,B", help="these columns, in this order: of the table, or any quantity")
@click.option("--missing", is_flag=True, help="print the commands that fill what is missing")
@click.option("--reference", is_flag=True,
              help="ours beside published numbers (conf/reference), with difference and verdict")
@click.option("--mixed-protocols", is_flag=True, help="show numbers of different protocols too")
def main(**options: Any) -> int:
    """See `slm tables --help`."""
    args = Namespace(**options)
    formats = _formats(args.formats, args.out)
    params, folders = split_words(args.words)
    grid = _sweep(params, folders, args) if args.name == "sweep" else _declared(args.name, params, folders, args)
    if grid is None:
        return 0
    from slm_exp.tables.formats import FORMATS

    for name in formats:
        text = FORMATS[name](grid)
        if args.out is None:
            print(text, end="")
        else:
            path = args.out / f"{grid.name}.{name}"
            write_text(path, text)
            print(path)
    return 0


def _sweep(params: dict[str, Any], folders: list[Path], args: Namespace) -> Any:
    from slm_exp.tables.records import find_runs
    from slm_exp.tables.sweep import sweep_grid

    if params or args.missing or args.reference:
        given = "--missing" if args.missing else "--reference" if args.reference else next(iter(params))
        hint = "slm sweep status DIR tells what a sweep lacks."
        raise ConfigError(f"slm tables sweep: {given}; expected folders only, this table has no cells. {hint}")
    return sweep_grid(find_runs(folders or [OUTPUTS]), args.mixed_protocols, args.columns)


def _declared(name: str, params: dict[str, Any], folders: list[Path], args: Namespace) -> Any:
    from slm_exp.tables.definition import read_table
    from slm_exp.tables.grid import fill, missing_commands
    from slm_exp.tables.records import find_runs

    table = _columns(read_table(name, params), args.columns)
    nowhere = args.missing and not folders and not OUTPUTS.is_dir()
    runs = [] if nowhere else find_runs(folders or [OUTPUTS], may_be_empty=args.missing)
    if args.missing:
        commands = missing_commands(fill(table, runs, mixed_protocols=True, marks=False))
        print("\n".join(commands) if commands else "nothing is missing", file=sys.stdout if commands else sys.stderr)
        return None
    if args.reference:
        from slm_exp.tables.reference import reference_grid

        return reference_grid(table, runs)
    return fill(table, runs, args.mixed_protocols)


def _columns(table: Any, told: str | None) -> Any:
    """The table with other columns: its own by heading, or any quantity."""
    from slm_exp.tables.definition import Column
    from slm_exp.tables.quantities import check_quantity, default_label

    if told is None:
        return table
    own = {name: column for column in table.columns for name in (column.label, column.show)}
    names = [n for name in told.split(",") for n in (SEVEN if name == "tasks" else [name])]
    for name in names:
        if name not in own:
            check_quantity(name, "--columns", own)
    return dataclasses.replace(table, columns=tuple(own.get(n) or Column(default_label(n), n) for n in names))


def _formats(told: str, out: Path | None) -> list[str]:
    names = told.split(",")
    for name in names:
        if name not in FORMAT_NAMES:
            raise ConfigError(f"--format {told}; expected some of {', '.join(FORMAT_NAMES)}. "
                              f"{did_you_mean(name, FORMAT_NAMES)}".rstrip())
    if len(names) > 1 and out is None:
        raise ConfigError(f"--format {told}: several formats need --out DIR.")
    return names


def split_words(words: Sequence[str]) -> tuple[dict[str, Any], list[Path]]:
    """Parameters and folders; what has an equals sign and is no folder is a parameter, its value YAML."""
    import yaml

    params: dict[str, Any] = {}
    folders: list[Path] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or Path(word).is_dir():
            folders.append(Path(word))
            continue
        try:
            params[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{word}: the value is not YAML; expected e.g. {key}=[1,2] or {key}=word.") from None
    return params, folders
