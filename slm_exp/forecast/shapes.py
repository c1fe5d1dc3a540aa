"""Known elsewhere now: `ModelSource.sketch` and models/sketch.py."""

from __future__ import annotations

from pathlib import Path

from slm_exp.models.base import ModelSource
from slm_exp.models.sketch import UNKNOWN as UNKNOWN
from slm_exp.models.sketch import Sketch as Sketch


def sketch(source: ModelSource, cache_dir: Path, device_type: str) -> Sketch:
    """What is known of the model that a config names. Reads small files only."""
    return source.sketch(cache_dir, device_type)
