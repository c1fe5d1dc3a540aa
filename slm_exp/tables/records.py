"""The runs that folders hold, and which of them is a table's cell."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.core.files import JsonObject, plain
from slm_exp.core.format import printable
from slm_exp.core.registry import GROUPS, available
from slm_exp.launch.compose import Composer
from slm_exp.pipeline.config import UNSCIENTIFIC
from slm_exp.runs.record import Run
from slm_exp.runs.schema import Record
from slm_exp.runs.state import FINISHED
from slm_exp.runs.statistics.runs import Measured

NO_RESULT = ("hydra", "cache", "save_model")
"""What decides nothing besides the groups in UNSCIENTIFIC."""


def find_runs(folders: Sequence[Path], may_be_empty: bool = False, verify: bool = False) -> list[Measured]:
    """Every run in folders and below them, ordered by what it is, not by where it lies. A record that cannot be read is
    named on stderr. `verify`: check the digests of large files too. Raises ConfigError: no such folder, or no record in
    any of them."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"DIR = {folder}; expected a folder with runs (outputs/multirun/NAME, outputs).")
    found = []
    for at in run_folders(folders):
        try:
            found.append(Measured(Run.read(at, verify)))
        except SlmError as error:
            print(printable(f"left out: {error}"), file=sys.stderr)
    if not found and not may_be_empty:
        raise ConfigError(f"DIR = {', '.join(map(str, folders))}; expected at least one run there, and there is no "
                          "record.json. Multiruns lie in outputs/multirun/NAME.")
    return sorted(found, key=lambda m: (m.record.run_id, m.record.created, str(m.run.folder)))


def run_folders(folders: Sequence[Path]) -> Iterator[Path]:
    """Every folder with a record.json, once, also where a folder is given twice or links lead in a circle."""
    seen: set[Path] = set()
    for folder in folders:
        for at, below, files in os.walk(folder, followlinks=True):
            if (here := Path(at).resolve()) in seen:
                below.clear()
                continue
            seen.add(here)
            if "record.json" in files:
                below.clear()
                yield Path(at)
            below[:] = sorted(name for name in below if not name.startswith("."))


class Finder:
    """Finds the run that overrides mean.

    A cell is that run whose run_id the overrides have here, or whose resolved scientific config they compose to: the
    same records fill the same cells on a machine where files lie elsewhere.
    """

    def __init__(self, runs: Iterable[Measured]) -> None:
        self._runs = list(runs)
        self._found: dict[tuple[str, ...], Measured | None] = {}

    def find(self, overrides: Sequence[str]) -> Measured | None:
        """A finished run before one that failed, a later one before an earlier; None where there is none."""
        key = tuple(overrides)
        if key not in self._found:
            same = self._same(key)
            self._found[key] = max(same, key=lambda m: (m.run.state == FINISHED, m.record.created), default=None)
        return self._found[key]

    def _same(self, overrides: tuple[str, ...]) -> list[Measured]:
        """Only where a record is left that the overrides do not contradict are they composed."""
        left = [m for m in self._runs if not _contradicts(m.record, overrides)]
        if not left:
            return []
        try:
            run_id, wanted = _composed(overrides)
        except ConfigError:  # a file of theirs may be elsewhere: then those runs with the same overrides
            same = [m for m in left if _said(m.record.overrides) == _said(overrides)]
            if not same:
                raise
            return same
        return [m for m in left if m.record.run_id == run_id] or [
            m for m in left if science(m.record.config) == wanted]


def _said(overrides: Iterable[str]) -> set[str]:
    """Overrides without those that change no result."""
    return {o for o in overrides if o.partition("=")[0].partition(".")[0] not in (*UNSCIENTIFIC, *NO_RESULT)}


_composer = cache(Composer)


@lru_cache(maxsize=4096)
def _composed(overrides: tuple[str, ...]) -> tuple[str | None, JsonObject | None]:
    """run_id (None where this machine lacks a file that it depends on) and scientific config of overrides."""
    cfg = _composer().run_config(overrides)
    try:
        run_id = cfg.run_id
    except (ConfigError, OSError):
        run_id = None
    return run_id, science(plain(cfg.resolved()))


def science_of(overrides: Sequence[str]) -> JsonObject | None:
    """What decides a cell's results, as `science` has it of a record."""
    return _composed(tuple(overrides))[1]


def science(config: JsonObject) -> JsonObject | None:
    """The part of a record's `config` that decides results; None where it is not one of this package."""
    out: JsonObject = {}
    for group in GROUPS:
        settings = config.get(group)
        cls = available(group).get(settings.get("name", "")) if isinstance(settings, dict) else None
        if not isinstance(settings, dict) or cls is None:
            return None
        if group not in UNSCIENTIFIC:
            decides = {"name", *(f.name for f in fields(cls) if f.metadata.get("science", True))}
            out[group] = {key: value for key, value in settings.items() if key in decides}
    return {**out, "seed": config.get("seed")}


def _contradicts(record: Record, overrides: Sequence[str]) -> bool:
    """Whether the record's config plainly has another member or number than an override; False where not plain."""
    for override in overrides:
        key, _, text = override.partition("=")
        group, _, name = key.partition(".")
        has = record.config.get(group)
        if not _decides(group, name, has):
            continue
        if isinstance(has, dict):
            if not name and group in GROUPS and text in available(group) and has.get("name") != text:
                return True
            has = has.get(name, text)
        if not isinstance(has, str | bool | list | dict) and _number(text) != has:
            return True  # None is not a number, and a number is not None
    return False


def _decides(group: str, name: str, member: Any) -> bool:
    """Whether an override can change a result, and so a run_id."""
    if group in (*UNSCIENTIFIC, *NO_RESULT):
        return False
    cls = available(group).get(member.get("name", "")) if group in GROUPS and isinstance(member, dict) else None
    return cls is None or all(f.metadata.get("science", True) for f in fields(cls) if f.name == name)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
