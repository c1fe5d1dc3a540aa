"""From a command's words to a table: what `slm tables` does."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from slm_exp.core.errors import ConfigError, did_you_mean
from slm_exp.core.files import write_text
from slm_exp.evaluation.base import SEVEN
from slm_exp.tables.definition import Column, Table, read_table
from slm_exp.tables.formats import FORMATS
from slm_exp.tables.grid import Grid, fill, missing_commands
from slm_exp.tables.quantities import check_quantity, default_label
from slm_exp.tables.records import find_runs
from slm_exp.tables.reference import reference_grid
from slm_exp.tables.sweep import sweep_grid

OUTPUTS = Path("outputs")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A call of `slm tables`."""

    name: str
    """`sweep`, a table of conf/table, or a .yaml file."""
    words: Sequence[str]
    """Parameters and folders, see `split_words`."""
    formats: str = "md"
    """Separated by commas."""
    out: Path | None = None
    """A folder for files; None prints."""
    columns: str | None = None
    missing: bool = False
    """Print the commands of what is missing instead."""
    reference: bool = False
    mixed_protocols: bool = False
    verify: bool = False


def draw(wanted: Wanted) -> int:
    """Print a table, write it in several formats, or print what is missing; the exit status.

    Raises:
        ConfigError: a wrong call.
        ProtocolError: numbers of different protocols.
    """
    formats = _formats(wanted.formats, wanted.out)
    params, folders = split_words(wanted.words)
    grid = (_sweep if wanted.name == "sweep" else _declared)(wanted, params, folders)
    if grid is None:
        return 0
    for name in formats:
        text = FORMATS[name](grid)
        if wanted.out is None:
            print(text, end="")
        else:
            path = wanted.out / f"{grid.name}.{name}"
            write_text(path, text)
            print(path)
    return 0


def _sweep(wanted: Wanted, params: dict[str, Any], folders: list[Path]) -> Grid:
    if params or wanted.missing or wanted.reference:
        given = "--missing" if wanted.missing else "--reference" if wanted.reference else next(iter(params))
        hint = "slm sweep status DIR tells what a sweep lacks."
        raise ConfigError(f"slm tables sweep: {given}; expected folders only, this table has no cells. {hint}")
    runs = find_runs(folders or [OUTPUTS], verify=wanted.verify)
    return sweep_grid(runs, wanted.mixed_protocols, wanted.columns)


def _declared(wanted: Wanted, params: dict[str, Any], folders: list[Path]) -> Grid | None:
    table = _with_columns(read_table(wanted.name, params), wanted.columns)
    nowhere = wanted.missing and not folders and not OUTPUTS.is_dir()
    runs = [] if nowhere else find_runs(folders or [OUTPUTS], may_be_empty=wanted.missing, verify=wanted.verify)
    if wanted.missing:
        commands = missing_commands(fill(table, runs, mixed_protocols=True, marks=False))
        print("\n".join(commands) if commands else "nothing is missing", file=sys.stdout if commands else sys.stderr)
        return None
    return reference_grid(table, runs) if wanted.reference else fill(table, runs, wanted.mixed_protocols)


def _with_columns(table: Table, columns: str | None) -> Table:
    """The table with other columns: its own by heading, or any quantity."""
    if columns is None:
        return table
    own = {name: column for column in table.columns for name in (column.label, column.show)}
    names = [n for name in columns.split(",") for n in (SEVEN if name == "tasks" else [name])]
    for name in names:
        if name not in own:
            check_quantity(name, "--columns", own)
    return dataclasses.replace(table, columns=tuple(own.get(n) or Column(default_label(n), n) for n in names))


def _formats(formats: str, out: Path | None) -> list[str]:
    names = formats.split(",")
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"--format {formats}; expected some of {', '.join(FORMATS)}. "
                              f"{did_you_mean(name, FORMATS)}".rstrip())
    if len(names) > 1 and out is None:
        raise ConfigError(f"--format {formats}: several formats need --out DIR.")
    return names


def split_words(words: Sequence[str]) -> tuple[dict[str, Any], list[Path]]:
    """Parameters and folders; what has an equals sign and is no folder is a parameter, its value YAML."""
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
