"""What watches a run: the record on disk, and observers that it passes everything on to: the tracker, the pages."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from filelock import Timeout
from omegaconf import OmegaConf

from slm_exp.core.cache.code import package_digest
from slm_exp.core.errors import SlmError, StageError
from slm_exp.core.files import JsonObject, plain, write_json, write_text
from slm_exp.core.format import duration
from slm_exp.core.locks import Lock
from slm_exp.core.plugins import words
from slm_exp.core.secrets import masked
from slm_exp.core.types import MergePlan
from slm_exp.engine.progress import Work, showing
from slm_exp.evaluation.base import EvalReport
from slm_exp.evaluation.protocol import FILE as PROTOCOL
from slm_exp.merging.surgery import flops_per_token, zeroed
from slm_exp.models.base import ModelHandle, dtype_name
from slm_exp.models.sizes import BYTES
from slm_exp.pipeline.config import RunConfig
from slm_exp.pipeline.stages import Experiment, Stage, Step
from slm_exp.reporting.heatmap import draw_heatmap
from slm_exp.reporting.page import write_report
from slm_exp.runs.files import result_files
from slm_exp.runs.record import FILE as RECORD
from slm_exp.runs.record import Run, failure, finished_run, git_state, read_run, versions, write_record
from slm_exp.runs.schema import Record
from slm_exp.runs.state import LOCK, remove_stale_below
from slm_exp.runs.statistics.verdict import judge_run
from slm_exp.runs.tracking.base import Tracker

log = logging.getLogger(__name__)

PICTURE = "similarity.png"
LATENCY_ERROR = 0.05
"""Of a prediction for a whole model, beyond which a run says so."""
CONFIG, BEFORE = "config.yaml", "record.before.json"


class Observer:
    """Hears what happens in a run; by default it does nothing about it."""

    def noted(self, sections: JsonObject) -> None:
        """Parts of the record have changed."""

    def kept(self, stage: str, x: Experiment) -> None:
        """A stage has its value, and the record and the folder have what follows from it."""

    def failed(self) -> None:
        """The run has failed, and its record says so."""


class Mirror(Observer):
    """Passes the record on to a tracker."""

    def __init__(self, track: Tracker, folder: Path) -> None:
        self.track, self.folder = track, folder

    def noted(self, sections: JsonObject) -> None:
        self.track.log(sections)

    def kept(self, stage: str, x: Experiment) -> None:
        if stage == "plan":
            self.track.table("plan", ["slot", "first layer", "last layer", "kind"],
                             [[i, g.start, g.stop - 1, "kept" if g.stop - g.start == 1 else "merged"]
                              for i, g in enumerate(x.plan.slots)])
            columns = ["low", "high", "score", "accepted", *["bound"] * any(t.score is None for t in x.plan.trace)]
            self.track.table("trace", columns, [[getattr(t, name) for name in columns] for t in x.plan.trace])
        if stage == "report":
            self.track.image("similarity", self.folder / PICTURE)


class Pages(Observer):
    """Draws similarity.png and report.html."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def kept(self, stage: str, x: Experiment) -> None:
        if stage == "report":
            title = f"{x.dense.name}: layer similarity ({x.similarity.kernel} CKA)"
            draw_heatmap(x.similarity, x.plan, self.folder / PICTURE, title=title)
            write_report(self.folder, x.record | {"status": "finished"})

    def failed(self) -> None:
        """Which stage, why, what to do. A page that fails must not hide the failure."""
        try:
            write_report(self.folder)
        except Exception as error:
            log.warning("no report page: %s", error)


@dataclass
class Recorder:
    """Keeps `record.json` true while a run goes on: running, then finished or failed.

    Use as a context manager around the whole run. A second process on the same folder waits for the first.
    """

    cfg: RunConfig
    folder: Path
    overrides: Sequence[str] = ()
    group: str | None = None
    record: JsonObject = field(default_factory=dict)
    finished: bool = False
    observers: list[Observer] = field(default_factory=list)
    _started: float = 0.0
    _before: JsonObject | None = None
    _lock: Any = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        run_id = self.cfg.run_id
        self._lock = Lock(self.folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            log.warning("another process is computing run %s in %s; waiting for it.", run_id, self.folder)
            self._lock.acquire()
        remove_stale_below(self.folder)
        if done := finished_run(self.folder, run_id, bool(self.cfg.save_model), self.cfg.cache.accept == "exact"):
            self.finished, self.record = True, done.record.raw
            return self
        if (before := read_run(self.folder)) and before.record.status == "finished":
            self._before = before.record.raw
            write_json(self.folder / BEFORE, self._before)  # nothing that was finished is lost
        self._started = time.perf_counter()
        overrides = masked(self.overrides)
        self.record = {
            "run_id": run_id, "status": "running", "group": self.group,
            "command": shlex.join(["python", "-m", "slm_exp", *words(self.cfg.plugins), *overrides]),
            "overrides": overrides, "plugins": [plugin.model_dump() for plugin in self.cfg.plugins],
            "config": masked(self.cfg.resolved()), "versions": versions(), "code": package_digest(), "device": None,
            "git": git_state(), "created": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": None,
            "pid": os.getpid(), "stages": [], "warnings": [], "eval": {"dense": None, "compressed": None},
            "error": None}
        self.write()
        write_text(self.folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(self.record["config"])))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, tb: Any) -> None:
        try:
            if isinstance(error, StageError) and error.refused and self.group is None:
                self._withdraw()
            elif error is not None and not self.finished:
                self._fail(error)
        finally:
            self._lock.release()

    def write(self) -> None:
        """Put the record on disk, atomically."""
        if self._started:
            self.record["seconds"] = round(time.perf_counter() - self._started, 3)
        write_record(self.folder, self.record)

    def step(self, step: Step, x: Experiment) -> None:
        """Carry out the stages of a step, timed under its name."""
        worked = False
        with self.stage(step.name) as cached:
            for stage in step.stages:
                if stage.when(x):  # asked in turn: one may hang on what the one before it found
                    cached.append(self.carry_out(stage, x))
                    worked |= stage.works(x)
        done = self.record["stages"][-1]
        if worked:  # nothing is said of no width to prune, and the like
            log.info("%-14s %8s%s", step.name, duration(done["seconds"]), "  from the cache" if done["cached"] else "")

    def watch(self, observer: Observer) -> None:
        """Have an observer hear of the run from here on, and of what the record says so far."""
        self.observers.append(observer)
        observer.noted({name: self.record[name] for name in ("device", "model", "stages")})

    def carry_out(self, stage: Stage[Any], x: Experiment) -> bool:
        """Carry out one stage and keep what it gave. Returns whether its value came from the stage cache."""
        cached = stage.carry_out(x)
        match stage.name:
            case "load":
                self.note(device=self.cfg.runtime.describe(x.dense.device),
                          model={"name": x.dense.name, "note": x.dense.note, "digest": x.dense.digest,
                                 "random": x.dense.random})
            case "latency":
                x.latency.save(self.folder)
                error = max(abs(c.error) for c in x.latency.checks)
                if error > LATENCY_ERROR and not x.dense.random:
                    self.warn(f"{x.latency.describe()}: an error of {error:.1%}. Was the machine busy? The budget is "
                              "met by this table; `slm cache` can remove it, to be measured anew.")
            case "calibrate":
                x.tokens.save(self.folder)
                self.note(calibration=x.tokens.describe())
            case "similarity":
                x.similarity.save(self.folder)
            case "evaluate_dense":
                self.keep_evaluation("dense", x.dense_report)
            case "plan":
                self.keep_plan(x.plan, x.plan.notes)
                if not x.plan.changes_layers and (x.plan.width is None or self.cfg.width.prunes):
                    best = max(x.plan.trace, key=lambda t: t.most, default=None)
                    hint = ""
                    if best is not None and x.plan.threshold is not None:
                        scored = "scored" if best.score is not None else "scored at most"
                        hint = f" The best candidate {scored} {best.most:.4f}: lower method.threshold below that."
                    self.warn(f"the plan merges and removes nothing.{hint}")
            case "narrowed_score":
                self.keep_plan(x.plan, x.plan.width.notes if x.plan.width else ())
            case "held_out":
                self.note(recovery=x.recovery_report)
            case "recover":
                self.note(recovery=x.recovery_report, layers={"before": x.dense.n_layers, "after": x.model.n_layers},
                          params={"before": x.dense.n_params, "after": x.model.n_params,
                                  "ratio_removed": 1 - x.model.n_params / x.dense.n_params,
                                  "zeroed": zeroed(x.model, x.plan)},
                          costs=self._costs(x))
            case "evaluate":
                self.keep_evaluation("compressed", x.report)
                run = Run(self.folder, Record.of(plain(self.record)), on_disk=False)
                self.note(verdict=judge_run(run).model_dump(exclude_none=True))
            case "time":
                self.note(speed=x.speed)
                self.warn(*x.speed["notes"])
        for observer in self.observers:
            observer.kept(stage.name, x)
        return cached

    def _costs(self, x: Experiment) -> JsonObject:
        """`costs` of the record: what both models take to run and to keep. Loads no weights."""
        length, size = int(x.tokens.tokens_NT.shape[1]), BYTES[dtype_name(x.dense.config, self.cfg.model.dtype)]

        def of(model: ModelHandle, plan: MergePlan) -> JsonObject:
            return {"flops_per_token": flops_per_token(model, plan, length), "bytes": model.n_params * size}

        return {"length": length, "dense": of(x.dense, MergePlan(x.dense.n_layers)), "compressed": of(x.model, x.plan)}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[list[bool]]:
        """Time a stage and note it in the record; an exception inside becomes a StageError.

        Yields a list for whether each part of it came from the cache.
        """
        parts: list[bool] = []
        self.record["stage"] = name  # what a killed run was doing, and what a sweep's screen shows
        started = time.perf_counter()
        try:
            self.write()
            with showing(Work(name)):
                yield parts
        except Exception as error:
            raise StageError(name, error) from error
        except BaseException as error:
            error.add_note(f"stage: {name}")
            raise
        entry = {"seconds": round(time.perf_counter() - started, 3), "cached": bool(parts) and all(parts)}
        self.record["stages"].append({"name": name, **entry})
        self.write()
        self._pass_on(stages={name: entry})

    def note(self, **sections: Any) -> None:
        """Add sections to the record, written with the next stage."""
        self.record.update(sections)
        self._pass_on(**sections)

    def _pass_on(self, **sections: Any) -> None:
        for observer in self.observers:
            observer.noted(sections)

    def warn(self, *messages: str) -> None:
        """Log once, and keep it in the record."""
        for message in messages:
            if message not in self.record["warnings"]:
                log.warning(message)
                self.record["warnings"].append(message)

    def accept_evaluations(self) -> None:
        """Hold a finished record to `evaluation.protocol` and `dense_range`, which a run_id does not tell apart."""
        for which, stored in self.record["eval"].items():
            if stored:
                self.cfg.evaluation.accept(EvalReport.from_json(stored), dense=which == "dense")

    def keep_evaluation(self, which: str, report: EvalReport) -> None:
        """Per-document results into samples/<which>/, scores into `eval.<which>` of the record, protocol.json."""
        report.save_samples(self.folder / "samples" / which)
        write_json(self.folder / PROTOCOL, report.protocol.to_json())
        self.record["eval"][which] = report.to_json()
        self._pass_on(eval={which: report.to_json()})
        self.cfg.evaluation.accept(report, dense=which == "dense")

    def keep_plan(self, plan: MergePlan, notes: Sequence[str]) -> None:
        """plan.json and the record's `plan`; the notes as warnings."""
        plan.save(self.folder)
        self.note(plan=plan.to_json())
        self.warn(*notes)

    def done(self) -> JsonObject:
        """Mark the run finished, with size and digest of every file that is its result. Nothing may fail after this."""
        self.record |= {"files": result_files(self.folder, bool(self.cfg.save_model)), "status": "finished"}
        self.record.pop("stage", None)
        self.write()
        self.finished = True
        self._pass_on(status="finished", seconds=self.record["seconds"])
        return self.record

    def _withdraw(self) -> None:
        """Leave the folder as it was found: nothing has been computed."""
        for name in (RECORD, CONFIG):
            (self.folder / name).unlink(missing_ok=True)
        if self._before:
            write_record(self.folder, self._before)
            write_text(self.folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(self._before["config"])))
            (self.folder / BEFORE).unlink(missing_ok=True)

    def _fail(self, error: BaseException) -> None:
        cause = error.__cause__ if isinstance(error, StageError) and error.__cause__ else error
        about = failure(error)
        self.record |= {"status": "failed", "error": about}
        trace = "" if isinstance(cause, SlmError) else "".join(traceback.format_exception(cause))
        log.error("run %s failed in stage %s: %s: %s\n%s", self.cfg.run_id, about["stage"], about["type"], cause, trace)
        try:
            self.write()
            for observer in self.observers:
                observer.failed()
        except OSError as second:  # e.g. the disk is full: the running record stays, which resume takes for unfinished
            print(f"could not write the failed record in {self.folder}: {second}", file=sys.stderr)
