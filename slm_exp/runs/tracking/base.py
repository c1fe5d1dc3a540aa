"""The `tracking` group: mirrors a run's record somewhere people look."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slm_exp.core.files import JsonObject, plain
from slm_exp.core.registry import Component

Scalar = str | int | float | bool


class Tracker:
    """What the pipeline tells a tracker, and the one that keeps nothing; the record on disk is the truth, this is a
    mirror.

    No method raises because the place that is written to fails: a mirror that breaks costs a warning, not the run.
    """

    def log(self, section: JsonObject) -> None:
        """Part of the record (nested); numbers become metrics named by record path with `/`."""

    def image(self, name: str, path: Path) -> None:
        """A picture, by a name like `similarity`."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table, e.g. the plan or the trace."""


@dataclass
class Tracking(Component, ABC):
    """A member of the `tracking` group."""

    seconds: ClassVar[float] = 0.0
    """About how long it takes of a run, for the forecast."""

    @abstractmethod
    @contextlib.contextmanager
    def session(self, record: JsonObject, folder: Path) -> Iterator[Tracker]:
        """Open before weights load, with the running record (run_id, config, overrides, group); always close.

        Leaves with the exit code that fits: 0, or 1 when an exception passes through.

        Raises:
            ConfigError: the tracker cannot start; names the remedy.
        """
        yield  # type: ignore[misc]


def flat(section: JsonObject) -> dict[str, Scalar]:
    """Every scalar of a part of the record by its path, `eval/compressed/tasks/piqa/acc`.

    A list of named dicts is walked by name (`stages/plan/seconds`). Other lists have no place in a metric and are
    left out, as are nulls, NaN and infinities.
    """
    out: dict[str, Scalar] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(child, f"{path}/{key}" if path else key)
        elif isinstance(value, list):
            for child in value:
                if isinstance(child, dict) and "name" in child:
                    walk({k: v for k, v in child.items() if k != "name"}, f"{path}/{child['name']}")
        elif value is not None:
            out[path] = value

    walk(plain(section), "")
    return out
