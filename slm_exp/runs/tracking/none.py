"""No tracking: the record on disk is all there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slm_exp.core.files import JsonObject
from slm_exp.core.registry import register
from slm_exp.runs.tracking.base import Tracker, Tracking


@register("tracking", "none")
@dataclass
class NoTracking(Tracking):
    """Nothing is tracked."""

    def opened(self, record: JsonObject, folder: Path) -> Tracker:
        return Tracker()
