"""From a command's words to a table: what `slm tables` does."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from slm_exp.core.errors import ConfigError, did_you_mean
from slm_exp.core.files import write_text
from slm_exp.evaluation.base import SEVEN
from slm_exp.launch.compose import check_key
from slm_exp.runs.statistics.runs import Measured
from slm_exp.tables.definition import Column, Table, check_parameters, parameters, read_table
from slm_exp.tables.facts import Params, model_of
from slm_exp.tables.formats import FORMATS
from slm_exp.tables.grid import fill, missing_commands
from slm_exp.tables.match import check_any
from slm_exp.tables.quantities import check_quantity
from slm_exp.tables.records import find_runs
from slm_exp.tables.reference import form as empty_form
from slm_exp.tables.reference import reference_grid
from slm_exp.tables.sweep import sweep_grid

OUTPUTS = Path("outputs")


def draw(name: str, words: Sequence[str], formats: str = "md", out: Path | None = None, columns: str | None = None,
         missing: bool = False, reference: bool = False, mixed_protocols: bool = False, verify: bool = False,
         form: bool = False, reference_file: Path | None = None) -> int:
    """Print a table, write it in several formats, or print what is missing; the exit status. See `slm tables --help`.

    Raises:
        ConfigError: a wrong call.
        ProtocolError: numbers of different protocols.
    """
    chosen = _formats(formats, out)
    params, folders = split_words(words)
    flags = {"--missing": missing, "--reference": reference, "--form": form, "--reference-file": reference_file}
    if name == "sweep" and (params or any(flags.values())):
        given = next((flag for flag, value in flags.items() if value), None) or next(iter(params))
        raise ConfigError(f"slm tables sweep: {given}; expected folders only, this table has no cells. "
                          "slm sweep status DIR tells what a sweep lacks.")
    if name != "sweep":
        check_parameters(name, params)
    if form:
        print(empty_form(read_table(name, params)), end="")
        return 0
    may_be_empty = missing or reference_file is not None
    nowhere = may_be_empty and not folders and not OUTPUTS.is_dir()
    runs = [] if nowhere else find_runs(folders or [OUTPUTS], may_be_empty, verify)
    table = None if name == "sweep" else _with_columns(read_table(name, with_model(name, params, runs)), columns)
    if table and not (missing or reference or reference_file):
        check_any(table, runs)
    if table and missing:
        commands = missing_commands(fill(table, runs, mixed_protocols=True, marks=False))
        print("\n".join(commands) if commands else "nothing is missing", file=sys.stdout if commands else sys.stderr)
        return 0
    if table is None:
        grid = sweep_grid(runs, mixed_protocols, columns)
    elif reference or reference_file:
        grid = reference_grid(table, runs, mixed_protocols, reference_file)
    else:
        grid = fill(table, runs, mixed_protocols)
    for kind in chosen:
        text = FORMATS[kind](grid)
        if out is None:
            print(text, end="")
        else:
            write_text(path := out / f"{grid.name}.{kind}", text)
            print(path)
    return 0


def _with_columns(table: Table, columns: str | None) -> Table:
    """The table with other columns: its own by heading, or any quantity."""
    if columns is None:
        return table
    own = {name: column for column in table.columns for name in (column.heading, column.show)}
    names = [n for name in columns.split(",") for n in (SEVEN if name == "tasks" else [name])]
    for name in names:
        if name not in own:
            check_quantity(name, "--columns", own)
    return dataclasses.replace(table, columns=tuple(own.get(n) or Column(show=n) for n in names))


def _formats(formats: str, out: Path | None) -> list[str]:
    names = formats.split(",")
    if unknown := [name for name in names if name not in FORMATS]:
        raise ConfigError(f"--format {formats}; expected some of {', '.join(FORMATS)}. "
                          f"{did_you_mean(unknown[0], FORMATS)}".rstrip())
    if len(names) > 1 and out is None:
        raise ConfigError(f"--format {formats}: several formats need --out DIR.")
    return names


def with_model(name: str, params: Params, runs: Sequence[Measured]) -> Params:
    """Parameters with the model of the records, where the call names none. See `facts.model_of` for errors."""
    default = parameters(name).get("model")
    found = {} if "model" in params or default is None else model_of(runs, str(default))
    return found | params | ({"extra": [*found["extra"], *params.get("extra", [])]} if "extra" in found else {})


def split_words(words: Sequence[str]) -> tuple[Params, list[Path]]:
    """Parameters and folders. What has an equals sign and is no folder is a parameter, its value YAML; with a dot in
    its name it is an override of every run, as `extra` has them: model.path=FOLDER."""
    params: Params = {}
    folders: list[Path] = []
    extra: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or Path(word).is_dir():
            folders.append(Path(word))
            continue
        if "." in key:
            check_key(word)
            extra.append(word)
            continue
        try:
            params[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{word}: the value is not YAML; expected e.g. {key}=[1,2] or {key}=word.") from None
    if extra:
        params["extra"] = [*(params.get("extra") or []), *extra]
    return params, folders
