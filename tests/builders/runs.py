"""Real runs of the tiny model, through the command line's own way to a config and the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slm_exp.launch.compose import compose_run
from slm_exp.pipeline.config import RunConfig
from slm_exp.pipeline.run import run

QUICK = ("model=tiny", "evaluation=none", "tracking=none", "runtime=cpu", "calibration.n_samples=4",
         "calibration.seq_len=32")  # fmt: skip
"""A run of a second."""


def tiny_config(cache: Path, *overrides: str) -> RunConfig:
    """Of a quick run that saves no checkpoint unless asked to."""
    cfg = compose_run([*QUICK, f"cache.dir={cache}", *overrides])
    if cfg.save_model is None:
        cfg.save_model = False
    return cfg


def tiny_run(folder: Path, *overrides: str, cache: Path | None = None) -> dict[str, Any]:
    """Carry out a quick run in `folder`, its stage cache beside it unless given. Returns the record."""
    return run(tiny_config(cache or folder.parent / "cache", *overrides), folder, overrides)
