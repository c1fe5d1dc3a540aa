"""The record of a run: the truth that every table and report is built from, on disk at every moment."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from slm_exp import __version__
from slm_exp.core.cache.store import S, StageStore, library_versions
from slm_exp.core.errors import ConfigError, SlmError, StageError
from slm_exp.core.files import write_json, write_text
from slm_exp.evaluation.protocol import FILE as PROTOCOL
from slm_exp.runs.tracking.base import Tracker

if TYPE_CHECKING:
    from slm_exp.core.types import CalibrationTokens, LayerSimilarity, MergePlan
    from slm_exp.evaluation.base import EvalReport
    from slm_exp.models.base import ModelHandle
    from slm_exp.pipeline.config import RunConfig

log = logging.getLogger(__name__)

VERSIONED = ("torch", "transformers", "lm_eval", "datasets", "peft", "wandb", "hydra-core", "omegaconf", "numpy")


SECTIONS = ("config", "versions", "git", "error", "eval", "model", "calibration", "plan", "layers", "params",
            "recovery", "speed")
"""Parts of a record that are objects wherever they stand; a file in which one is not is no record."""
SIDES = ("tasks", "perplexity", "protocol")
"""The same of what was measured on each model."""


def load_record(folder: Path) -> dict[str, Any]:
    """The record in a run's folder.

    Raises:
        SlmError: there is none, or it cannot be read.
    """
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SlmError(f"{folder} holds no record.json; give the folder of a run, e.g. outputs/<run_id>.") from None
    except (OSError, ValueError) as error:
        raise SlmError(f"{path} cannot be read: {error}. Run the experiment again.") from None
    if not _is_record(record):
        raise SlmError(f"{path} is not a run's record. Run the experiment again.")
    return record


def _is_record(told: Any) -> bool:
    def objects(told: Any, parts: Iterable[str]) -> bool:
        return isinstance(told, dict) and all(isinstance(told.get(part) or {}, dict) for part in parts)

    if not objects(told, SECTIONS):
        return False
    stages = told.get("stages") or []
    sides = (told.get("eval") or {}).values()
    return (isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages)
            and all(objects(side or {}, SIDES) and objects(side.get("tasks") or {}, side.get("tasks") or ())
                    for side in sides if side is not None))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a run's folder; None where there is none or it cannot be read."""
    try:
        return load_record(folder)
    except SlmError:
        return None


def is_finished(folder: Path, run_id: str, with_model: bool = False) -> bool:
    """Whether this folder holds the finished record of this run (and its checkpoint), made by this package version."""
    record = read_record(folder)
    if with_model and not (folder / "model" / "config.json").is_file():
        return False
    return (
        record is not None
        and record.get("status") == "finished"
        and record.get("run_id") == run_id
        and record.get("versions", {}).get("slm_exp") == __version__
    )


def git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of the checkout this package runs from; None when installed elsewhere."""
    here = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=True,
                              timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here.parent:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


@dataclass
class Stage:
    """One stage while it runs."""

    name: str
    store: StageStore
    cached: bool = False
    """Whether the result came from the cache."""

    def compute(self, kind: type[S], compute: Callable[[], S], **inputs: Any) -> S:
        """The result for these inputs from the stage cache, or computed now."""
        value, self.cached = self.store.cached(self.name.removesuffix("_dense"), inputs, kind, compute)
        return value


@dataclass
class Recorder:
    """Keeps `record.json` true while a run goes on: running, then finished or failed.

    Use as a context manager around the whole run. A second process on the same folder waits for the first.
    """

    cfg: RunConfig
    folder: Path
    overrides: Sequence[str] = ()
    group: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    track: Tracker | None = None
    _started: float = 0.0
    _lock: Any = None

    def __enter__(self) -> Self:
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            log.warning("another process is computing run %s in %s; waiting for it.", self.cfg.run_id, self.folder)
            self._lock.acquire()
        run_id = self.cfg.run_id
        if is_finished(self.folder, run_id, with_model=bool(self.cfg.save_model)):
            self.finished = True
            self.record = read_record(self.folder) or {}
            return self
        if (before := read_record(self.folder)) and before.get("status") == "finished":
            write_json(self.folder / "record.before.json", before)  # computed again: nothing finished is lost
        self._started = time.perf_counter()
        self.record = {
            "run_id": run_id,
            "status": "running",
            "group": self.group,
            "command": shlex.join(["python", "-m", "slm_exp", *self.overrides]),
            "overrides": list(self.overrides),
            "config": self.cfg.resolved(),
            "versions": {"slm_exp": __version__, "python": platform.python_version(), **library_versions(VERSIONED)},
            "device": None,
            "git": git_state(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": None,
            "pid": os.getpid(),
            "stages": [],
            "warnings": [],
            "eval": {"dense": None, "compressed": None},
            "error": None,
        }
        self.write()
        from omegaconf import OmegaConf

        write_text(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.record["config"])))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, tb: Any) -> None:
        try:
            if error is not None and not self.finished:
                self._fail(error)
        finally:
            self._lock.release()

    def write(self) -> None:
        """Put the record on disk, atomically."""
        if self._started:
            self.record["seconds"] = round(time.perf_counter() - self._started, 3)
        write_json(self.folder / "record.json", self.record)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage and note it in the record; an exception inside becomes a StageError."""
        store = StageStore(Path(self.cfg.cache.dir) if self.cfg.cache.enabled else None)
        stage = Stage(name, store)
        log.info("%s ...", name)
        self.record["stage"] = name  # what a killed run was doing, and what a sweep's screen shows
        started = time.perf_counter()
        try:
            self.write()
            yield stage
        except Exception as error:
            raise StageError(name, error) from error
        except BaseException as error:
            error.add_note(f"stage: {name}")
            raise
        entry = {"name": name, "seconds": round(time.perf_counter() - started, 3), "cached": stage.cached}
        self.record["stages"].append(entry)
        log.info("%s done in %.1f s%s", name, entry["seconds"], " (from the cache)" if stage.cached else "")
        self.write()
        if self.track:
            self.track.log({"stages": {name: {"seconds": entry["seconds"], "cached": stage.cached}}})

    def note(self, **sections: Any) -> None:
        """Add sections to the record (written with the next stage) and mirror them to the tracker."""
        self.record.update(sections)
        if self.track:
            self.track.log(sections)

    def warn(self, message: str) -> None:
        """Tell the user once, and keep it in the record."""
        if message not in self.record["warnings"]:
            log.warning(message)
            self.record["warnings"].append(message)

    def accept_evaluations(self) -> None:
        """Hold a finished record to `evaluation.protocol` and `dense_range`, which a run_id does not tell apart."""
        from slm_exp.evaluation.base import EvalReport

        for which, found in self.record["eval"].items():
            if found:
                self.cfg.evaluation.accept(EvalReport(**found, samples={}), dense=which == "dense")

    def keep_evaluation(self, which: str, report: EvalReport) -> None:
        """Per-document results into samples/<which>/, scores into `eval.<which>` of the record, protocol.json."""
        report.save_samples(self.folder / "samples" / which)
        write_json(self.folder / PROTOCOL, report.protocol)
        self.record["eval"][which] = report.to_json()
        if self.track:
            self.track.log({"eval": {which: report.to_json()}})

    def keep_speed(self, speed: dict[str, Any]) -> None:
        """The record's `speed`, and what its numbers do not mean as warnings."""
        self.note(speed=speed)
        for message in speed["notes"]:
            self.warn(message)

    def keep_plan(self, plan: MergePlan) -> None:
        """plan.json, the record's `plan`, its notes as warnings, and the tracker's tables."""
        plan.save(self.folder)
        self.note(plan=plan.to_json())
        for message in plan.notes:
            self.warn(message)
        if plan.n_layers_out == plan.n_layers and not plan.sublayers:
            best = max((t.score for t in plan.trace), default=None)
            lower = best is not None and plan.threshold is not None
            hint = f" The best candidate scored {best:.4f}: lower method.threshold below that." if lower else ""
            self.warn(f"the plan merges and removes nothing.{hint}")
        if self.track:
            kind = {1: "kept"}
            self.track.table("plan", ["slot", "first layer", "last layer", "kind"],
                             [[i, g.start, g.stop - 1, kind.get(g.stop - g.start, "merged")]
                              for i, g in enumerate(plan.slots)])
            self.track.table("trace", ["low", "high", "score", "accepted"],
                             [[t.low, t.high, t.score, t.accepted] for t in plan.trace])

    def keep_width(self, plan: MergePlan) -> None:
        """plan.json and the record's `plan` again, with what was decided about widths, and its notes as warnings."""
        plan.save(self.folder)
        self.note(plan=plan.to_json())
        for message in (plan.width or {}).get("notes", ()):
            self.warn(message)

    def keep_model(self, compressed: ModelHandle, plan: MergePlan, tokens: CalibrationTokens) -> None:
        """model/: the checkpoint, verified in a fresh process before it appears."""
        from slm_exp.runs.checkpoint import save_checkpoint

        save_checkpoint(compressed, self.folder / "model", plan=plan, tokens=tokens, record=self.record)

    def draw(self, alike: LayerSimilarity, plan: MergePlan) -> None:
        """similarity.png and report.html."""
        from slm_exp.reporting.heatmap import draw_heatmap
        from slm_exp.reporting.page import write_report

        picture = self.folder / "similarity.png"
        title = f"{self.record['model']['name']}: layer similarity ({alike.kernel} CKA)"
        draw_heatmap(alike, plan, picture, title=title)
        if self.track:
            self.track.image("similarity", picture)
        write_report(self.folder, self.record | {"status": "finished"})

    def done(self) -> dict[str, Any]:
        """Mark the run finished. Nothing may fail after this."""
        self.record["status"] = "finished"
        self.record.pop("stage", None)
        self.write()
        self.finished = True
        if self.track:
            self.track.log({"status": "finished", "seconds": self.record["seconds"]})
        return self.record

    def _fail(self, error: BaseException) -> None:
        cause = error.__cause__ if isinstance(error, StageError) and error.__cause__ else error
        stage = error.stage if isinstance(error, StageError) else None
        for line in getattr(error, "__notes__", []):
            stage = line.removeprefix("stage: ") if line.startswith("stage: ") else stage
        self.record["status"] = "failed"
        self.record["error"] = {"type": type(cause).__name__, "message": str(cause), "stage": stage}
        trace = "" if isinstance(cause, SlmError) else "".join(traceback.format_exception(cause))
        log.error("run %s failed in stage %s: %s: %s\n%s", self.cfg.run_id, stage, type(cause).__name__, cause, trace)
        try:
            self.write()
            self._draw_failure()
        except OSError as second:  # e.g. the disk is full: the running record stays, which resume takes for unfinished
            print(f"could not write the failed record in {self.folder}: {second}", file=sys.stderr)

    def _draw_failure(self) -> None:
        """report.html of a failed run: which stage, why, what to do. A page that fails must not hide the failure."""
        from slm_exp.reporting.page import write_report

        try:
            write_report(self.folder)
        except Exception as error:
            log.warning("no report page: %s", error)


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be created or written, before anything loads.

    Raises:
        ConfigError: naming the folder and the reason.
    """
    probe = folder / f".probe.{os.getpid()}"
    made = [p for p in [folder, *folder.parents] if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
        for path in made:  # leave no trace of the check
            path.rmdir()
    except OSError as error:
        raise ConfigError(
            f"hydra.run.dir / hydra.sweep.dir = {folder}; expected a folder that can be written ({error.strerror}). "
            "Choose another with hydra.run.dir=FOLDER (single run) or hydra.sweep.dir=FOLDER (multirun)."
        ) from None
