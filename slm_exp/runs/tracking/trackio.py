"""Trackio: a local dashboard over SQLite files (`trackio show --project slm_exp`), or a Hugging Face Space's."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slm_exp.core.files import JsonObject
from slm_exp.core.registry import register
from slm_exp.runs.tracking.base import LONGEST_NAME, PROJECT, RunTracker, Tracker, Tracking, flat, mirrored, provenance


@register("tracking", "trackio")
@dataclass
class Trackio(Tracking):
    """Mirrors the record to Trackio: config, metrics by record path, the heatmap, the plan and its trace.

    Runs go where Trackio keeps them (TRACKIO_DIR, TRACKIO_SPACE_ID). It knows a run by its name, so that ends with
    digits of the run_id, and a repeated run is continued. Tags stand in the config.
    """

    package: ClassVar[str] = "trackio"
    seconds: ClassVar[float] = 2.0

    def opened(self, record: JsonObject, folder: Path) -> Tracker:
        import trackio

        name = f"{self.display_name(record)[: LONGEST_NAME - 9]}-{record['run_id'][:8]}"
        with contextlib.redirect_stdout(io.StringIO()):  # it greets
            run = trackio.init(project=self.project or PROJECT, name=name, group=self.group or record.get("group"),
                               config={**provenance(record), "tags": self.tags}, resume="allow", embed=False,
                               auto_log_gpu=False, auto_log_cpu=False)
        return _TrackioTracker("Trackio", trackio, run)


class _TrackioTracker(RunTracker):
    """Mirrors to one open Trackio run."""

    def close(self, failed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of an upload; by itself at the process's end too
            mirrored(self.called, self._library.finish)

    def log(self, section: JsonObject) -> None:
        """One row of its scalars, texts and flags among them."""
        if scalars := flat(section):
            mirrored(self.called, lambda: self._run.log(scalars))
