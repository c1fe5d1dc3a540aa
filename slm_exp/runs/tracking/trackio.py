"""Trackio: a local dashboard over SQLite files (`trackio show --project slm_exp`), or a Hugging Face Space's."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slm_exp.core.files import JsonObject, plain
from slm_exp.core.registry import register
from slm_exp.runs.record import failure
from slm_exp.runs.tracking.base import (
    LONGEST_NAME,
    PROJECT,
    Tracker,
    Tracking,
    cannot_start,
    flat,
    mirrored,
    provenance,
)


@register("tracking", "trackio")
@dataclass
class Trackio(Tracking):
    """Mirrors the record to Trackio: config, metrics by record path, the heatmap, the plan and its trace.

    Runs go where Trackio keeps them (TRACKIO_DIR, TRACKIO_SPACE_ID). It knows a run by its name, so that ends with
    digits of the run_id, and a repeated run is continued. Tags stand in the config.
    """

    package: ClassVar[str] = "trackio"
    seconds: ClassVar[float] = 2.0

    @contextlib.contextmanager
    def session(self, record: JsonObject, folder: Path) -> Iterator[Tracker]:
        name = f"{self.display_name(record)[: LONGEST_NAME - 9]}-{record['run_id'][:8]}"
        try:
            import trackio

            with contextlib.redirect_stdout(io.StringIO()):  # it greets
                run = trackio.init(project=self.project or PROJECT, name=name, group=self.group or record.get("group"),
                                   config={**provenance(record), "tags": self.tags}, resume="allow", embed=False,
                                   auto_log_gpu=False, auto_log_cpu=False)
        except Exception as error:
            raise cannot_start(self, error) from error
        tracker = _TrackioTracker(run)
        try:
            yield tracker
        except BaseException as error:
            tracker.log({"status": "failed", "error": failure(error)})
            raise
        finally:
            with contextlib.redirect_stdout(io.StringIO()):
                mirrored("Trackio", run.finish)


class _TrackioTracker(Tracker):
    """Mirrors to one open Trackio run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, section: JsonObject) -> None:
        """One row of its scalars, texts and flags among them."""
        if scalars := flat(section):
            mirrored("Trackio", lambda: self._run.log(scalars))

    def image(self, name: str, path: Path) -> None:
        import trackio

        mirrored("Trackio", lambda: self._run.log({name: trackio.Image(str(path))}))

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        import trackio

        mirrored("Trackio", lambda: self._run.log({name: trackio.Table(columns=[*columns], data=plain(rows))}))
