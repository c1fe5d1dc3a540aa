"""One experiment: load, calibrate, similarity, evaluate, plan, merge, narrow, recover, evaluate, save, report.

The stages are declared in `pipeline/stages.py`, in this order; here they are carried out and watched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm_exp.core.cache.store import StageStore
from slm_exp.evaluation.base import Evaluation
from slm_exp.pipeline.config import RunConfig
from slm_exp.pipeline.observers import Mirror, Pages, Recorder
from slm_exp.pipeline.stages import Experiment, steps
from slm_exp.runs.record import is_finished
from slm_exp.runs.tracking.none import NoTracking


def run(cfg: RunConfig, folder: Path, overrides: Sequence[str] = (), group: str | None = None,
        training: Path | None = None) -> dict[str, Any]:
    """Carry out one experiment and leave its record in `folder`; a finished one is returned as it is.

    Every stage takes its result from the stage cache when an earlier run had the same inputs; weights load only
    when a stage needs them.
    `training`: where a training keeps its checkpoints, if not in `folder` (see `take_part`). Raises StageError: names
    the stage and chains the cause; the failed record is on disk, or none where the first stage of a run that belongs to
    no `group` refuses.
    """
    with Recorder(cfg, folder, overrides, group, observers=[Pages(folder)]) as rec:
        if rec.finished:
            rec.accept_evaluations()
            return rec.record
        rec.warn(*cfg.advice())
        store = StageStore(cfg.cache_folder)
        x = Experiment(cfg, folder, store, training, record=rec.record)
        load, *others = steps(cfg)
        rec.step(load, x)  # what cannot work is refused before a tracker hears of it
        with cfg.tracking.session(rec.record, folder) as x.track:
            rec.watch(Mirror(x.track, folder))
            for step in others:
                rec.step(step, x)
            return rec.done()


def take_part(cfg: RunConfig, folder: Path) -> None:
    """What a process beside the first does under a launcher: come to the recovery, and train with the others."""
    if not cfg.recovery.trains() or is_finished(folder, cfg.run_id, with_model=bool(cfg.save_model)):
        return
    with tempfile.TemporaryDirectory(prefix="slm_exp-rank-") as own:
        run(replace(cfg, evaluation=Evaluation(), tracking=NoTracking(), save_model=False), Path(own), training=folder)
