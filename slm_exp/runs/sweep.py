"""The folder of a sweep: whose it is, which jobs belong to it, and how each of them stands.

`sweep.json` holds the definition, written before the first job starts; the run folders hold the truth about every
job; `index.json` is the summary left at the end. `slm sweep` needs nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from filelock import Timeout
from pydantic import Field, field_validator

from slm_exp.core.documents import Section, parse
from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.core.files import JsonObject, read_json, write_json
from slm_exp.core.format import printable
from slm_exp.core.locks import Lock
from slm_exp.core.plugins import Plugin
from slm_exp.core.version import __version__
from slm_exp.runs.record import FILE as RECORD
from slm_exp.runs.record import Run, read_run, write_record
from slm_exp.runs.state import (
    DAMAGED,
    DIED,
    FAILED,
    FINISHED,
    LOG,
    RUNNING,
    STATES,
    UNEXPECTED,
    WAITING,
    in_use,
    last_lines,
)

log = logging.getLogger(__name__)

CACHEABLE = ("calibrate", "similarity", "evaluate_dense", "plan", "evaluate")


@dataclass(frozen=True)
class Job:
    """One cell of a grid."""

    run_id: str
    overrides: tuple[str, ...]
    """The job's task overrides, as a single run would take them."""
    folder: Path
    slug: str = ""
    """The readable name that folder names do without."""
    save_model: bool = False
    exact: bool = False
    """Whether a result of other code or versions does not count (`cache.accept=exact`)."""


@dataclass(frozen=True)
class Cell:
    """How a job stands, read from its folder."""

    job: Job
    state: str
    """One of STATES."""
    stage: str | None = None
    """Where it failed or died, or is now."""
    error: str | None = None
    seconds: float | None = None
    from_cache: bool = False
    """Every stage that computes something came from the stage cache."""
    made_otherwise: str = ""
    """How the code that made a finished one differs from that here."""

    @property
    def why(self) -> str:
        """Stage and error in one line; empty where there is neither."""
        error = (self.error or "").strip().splitlines()
        return ": ".join([*([f"stage {self.stage}"] if self.stage else []), *error[:1]])

    def to_json(self) -> JsonObject:
        """A row of index.json and of `slm sweep status --json`."""
        return {"run_id": self.job.run_id, "slug": self.job.slug, "state": self.state, "stage": self.stage,
                "error": self.error, "seconds": self.seconds, "from_cache": self.from_cache,
                "overrides": list(self.job.overrides), "folder": str(self.job.folder)}


def read_cell(job: Job) -> Cell:
    """What the job's folder says. Cost: the record and small files; a lock for a moment where it is not finished."""
    try:
        run = Run.read(job.folder)
    except SlmError as unreadable:
        if in_use(job.folder):
            return Cell(job, RUNNING)
        if (job.folder / RECORD).exists():
            return Cell(job, DAMAGED, error=str(unreadable))
        last = "".join(last_lines(job.folder / LOG, 1)).strip()
        return Cell(job, DIED if last else WAITING, error=last or None)
    record = run.record
    is_result = run.is_result_of(job.run_id, job.save_model)
    other = run.made_otherwise() if is_result else ""
    if is_result and not (job.exact and other):
        cached = {stage.name: stage.cached for stage in record.stages}
        return Cell(job, FINISHED, seconds=record.seconds, made_otherwise=other,
                    from_cache=all(cached.get(name, False) for name in CACHEABLE))
    if in_use(job.folder):
        return Cell(job, RUNNING, record.stage, seconds=record.seconds)
    if run.state == DAMAGED:
        return Cell(job, DAMAGED, error="; ".join(map(str, run.problems)), seconds=record.seconds)
    if run.state == FINISHED:
        made_by = record.versions.get("slm_exp")
        reason = (f"made by other code: {other}" if other else "its checkpoint is missing" if made_by == __version__
                  else f"finished by version {made_by}")
        return Cell(job, WAITING, error=reason)
    if run.state == FAILED:
        return Cell(job, FAILED, record.error.stage, record.error.line, record.seconds)
    return Cell(job, DIED, record.stage, UNEXPECTED, record.seconds)


def note_death(job: Job, message: str) -> None:
    """Turn the record of a job that terminated unexpectedly into a failed one that says how it ended."""
    run = read_run(job.folder)
    if run is None or run.state != DIED:
        return
    error = {"type": "ProcessDied", "message": message, "stage": run.record.stage}
    try:
        write_record(job.folder, run.record.raw | {"status": FAILED, "error": error})
    except OSError as error_writing:  # a full disk: the running record without a process says as much
        log.warning("could not note in %s that the job died: %s", job.folder, error_writing)


class StoredJob(Section):
    """A job in sweep.json; its folder from the sweep's."""

    run_id: str
    overrides: list[str]
    folder: str
    slug: str
    save_model: bool
    exact: bool = False

    @field_validator("folder")
    @classmethod
    def _a_path(cls, folder: str) -> str:
        if "\0" in folder or any(len(os.fsencode(part)) > 255 for part in folder.split("/")):
            raise ValueError(f"{folder[:60]!r} is no name of a folder.")
        return folder


class StoredSweep(Section):
    argv: list[str]
    cwd: str
    jobs: list[StoredJob]
    plugins: list[Plugin] = Field(default_factory=list)


@dataclass
class SweepFolder:
    """A sweep's folder on disk, and its sweep.json."""

    path: Path
    argv: list[str] = field(default_factory=list)
    """The command's overrides, Hydra's own included, without -m."""
    cwd: str = ""
    """Where the command ran: relative paths in overrides mean that folder."""
    jobs: list[Job] = field(default_factory=list)
    plugins: list[Plugin] = field(default_factory=list)
    """What its jobs need; never loaded because this file says so."""

    @classmethod
    def read(cls, path: Path) -> SweepFolder:
        """The definition in a sweep's folder. Raises ConfigError: this is no sweep's folder."""
        try:
            stored = parse(StoredSweep, read_json(path / "sweep.json"))
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(no_sweep(path)) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not the folder of a sweep: sweep.json cannot be read "
                              f"({type(error).__name__}: {error}). Multiruns lie in outputs/multirun/NAME unless "
                              "hydra.sweep.dir said otherwise.") from None
        return cls(path, stored.argv, stored.cwd, [
            Job(j.run_id, tuple(j.overrides), path / j.folder, j.slug, j.save_model, j.exact) for j in stored.jobs],
            stored.plugins)

    def write(self) -> None:
        """sweep.json, atomically."""
        jobs = [{"run_id": j.run_id, "overrides": list(j.overrides), "folder": os.path.relpath(j.folder, self.path),
                 "slug": j.slug, "save_model": j.save_model, "exact": j.exact} for j in self.jobs]
        write_json(self.path / "sweep.json", {
            "name": self.path.name, "version": __version__, "written": _now(), "argv": self.argv, "cwd": self.cwd,
            "jobs": jobs, "plugins": [plugin.model_dump() for plugin in self.plugins]})

    def define(self, argv: Sequence[str], jobs: Iterable[Job], plugins: Iterable[Plugin] = ()) -> None:
        """Add a command's jobs, and the plug-ins they come from, to those the folder already has, and put the
        definition on disk.

        A job whose overrides mean another run by now (other defaults, other contents of an input file) replaces the
        one they meant before.
        """
        self.argv, self.cwd = list(argv), os.getcwd()
        new = {j.run_id: j for j in jobs}
        meant = {j.overrides: j.run_id for j in new.values()}
        before = SweepFolder(self.path)
        with contextlib.suppress(ConfigError):
            before = SweepFolder.read(self.path)
        old = {j.run_id: j for j in before.jobs}
        self.plugins = list({p.name: p for p in (*before.plugins, *plugins)}.values())
        for job in list(old.values()):
            if meant.get(job.overrides, job.run_id) != job.run_id:
                log.warning("[%s] means run %s now; it was %s when the sweep began.", " ".join(job.overrides),
                            meant[job.overrides], job.run_id)
                del old[job.run_id]
        self.jobs = list((old | new).values())
        self.write()

    @contextlib.contextmanager
    def owned(self, wait: float = 0) -> Iterator[None]:
        """Be the only launcher at work here; the kernel frees the lock with the process. Raises ConfigError: another
        launcher is at work, for `wait` seconds; names its pid and host."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock, about = Lock(self.path / ".launcher.lock"), self.path / ".launcher.json"
        try:
            lock.acquire(timeout=wait)
        except Timeout:
            owner: dict[str, object] = {}
            with contextlib.suppress(OSError, ValueError):
                owner = dict(read_json(about))
            pid, host, since = (owner.get(key, "?") for key in ("pid", "host", "since"))
            raise ConfigError(f"hydra.sweep.dir = {self.path}; the launcher with pid {pid} on host {host} is at work "
                              f"there since {since}. Wait for it (slm sweep status {self.path}), or choose another "
                              "folder with hydra.sweep.dir=FOLDER.") from None
        try:
            write_json(about, {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()})
            yield
            about.unlink(missing_ok=True)
        finally:
            lock.release()

    def cells(self) -> list[Cell]:
        """How every job stands, in the order of the definition."""
        return [read_cell(job) for job in self.jobs]

    def write_index(self, cells: Sequence[Cell], already: frozenset[str] = frozenset()) -> None:
        """index.json: every cell, and which were finished before this launch."""
        counts = {state: n for state in STATES  # an index of an older version has no state of damage
                  if (n := sum(c.state == state for c in cells)) or state != DAMAGED}
        rows = [c.to_json() | {"already_finished": c.job.run_id in already} for c in cells]
        write_json(self.path / "index.json", {"name": self.path.name, "counts": counts, "jobs": rows})


def no_sweep(path: Path) -> str:
    """What a folder without sweep.json is, where one of a sweep was wanted, and what to do."""
    where = "Multiruns lie in outputs/multirun/NAME unless hydra.sweep.dir said otherwise."
    if not path.is_dir():
        return f"there is no folder {path}. {where}"
    if (path.parent / "sweep.json").is_file():
        return f"{path} is one run of the sweep {path.parent}; give the sweep's folder."
    if run := read_run(path):
        return f"{path} is a single run, not a sweep. The same command does what is missing: {run.again}"
    for level in ("*", "multirun/*"):
        if inside := sorted(found.parent for found in path.glob(f"{level}/sweep.json")):
            return f"{path} is not the folder of a sweep, but sweeps lie in it: {', '.join(map(str, inside[:5]))}."
    return f"{path} is not the folder of a sweep: it holds no sweep.json. {where}"


def differing(jobs: Sequence[Job]) -> dict[str, str]:
    """run_id -> the overrides in which this job differs from some other one; all of them for a single job."""
    common = set.intersection(*(set(j.overrides) for j in jobs)) if len(jobs) > 1 else set()
    return {j.run_id: " ".join(o for o in j.overrides if o not in common) or "(defaults)" for j in jobs}


def table(cells: Sequence[Cell], already: frozenset[str] = frozenset()) -> str:
    """One line per job: state, time, run_id, what sets it apart, where it failed and why; then the counts."""
    apart = differing([c.job for c in cells])
    lines = []
    for cell in cells:
        note = " ".join(cell.why.split())[:200]
        if cell.state == FINISHED:
            note = "finished before" if cell.job.run_id in already else "from the cache" if cell.from_cache else ""
        seconds = "" if cell.seconds is None else f"{cell.seconds:.0f} s"
        line = f"{cell.state:<9}{seconds:>8}  {cell.job.run_id}  {apart[cell.job.run_id]}"
        lines.append(printable(line + (f"  [{note}]" if note else "")))
    counts = ", ".join(f"{n} {state}" for state in STATES if (n := sum(c.state == state for c in cells)))
    lines.append(f"{len(cells)} jobs: {counts or 'none'}")
    if other := [c.made_otherwise for c in cells if c.made_otherwise]:
        lines.append(f"{len(other)} made by other code: {other[0]}; slm sweep rerun computes them again")
    return "\n".join(lines)


def complaints(cells: Sequence[Cell]) -> str:
    """Every incomplete job with its error and where to look; empty when all are finished."""
    apart = differing([c.job for c in cells])
    lines = []
    for job, cell in ((cell.job, cell) for cell in cells if cell.state != FINISHED):
        lines.append(printable(f"run {job.run_id} ({apart[job.run_id]}) {cell.state}" + (cell.why and f": {cell.why}")))
        lines.append(f"  {job.folder / LOG if (job.folder / LOG).exists() else job.folder}")
    return "\n".join(lines)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
