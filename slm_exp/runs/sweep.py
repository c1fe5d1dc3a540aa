"""The folder of a sweep: whose it is, which jobs belong to it, and how each of them stands.

`sweep.json` holds the definition, written before the first job starts; the run folders hold the truth about every
job; `index.json` is the summary left at the end. `slm sweep` needs nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import Timeout

from slm_exp import __version__
from slm_exp.core import locks
from slm_exp.core.errors import ConfigError
from slm_exp.core.files import write_json
from slm_exp.runs.record import is_finished, read_record

log = logging.getLogger(__name__)

LOG = "run.log"
FINISHED, FAILED, DIED, RUNNING, WAITING = "finished", "failed", "died", "running", "waiting"
STATES = {
    FINISHED: "its record says so, made by this version of the package",
    FAILED: "its record names the stage and the error",
    DIED: "it started, and terminated unexpectedly (killed, out of memory, power)",
    RUNNING: "a process is at work on it",
    WAITING: "not started",
}
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

    @property
    def why(self) -> str:
        """Stage and error in one line; empty where there is neither."""
        error = (self.error or "").strip().splitlines()
        return ": ".join([*([f"stage {self.stage}"] if self.stage else []), *error[:1]])

    def to_json(self) -> dict[str, Any]:
        """A row of index.json and of `slm sweep status --json`."""
        return {
            "run_id": self.job.run_id,
            "slug": self.job.slug,
            "state": self.state,
            "stage": self.stage,
            "error": self.error,
            "seconds": self.seconds,
            "from_cache": self.from_cache,
            "overrides": list(self.job.overrides),
            "folder": str(self.job.folder),
        }


def read_cell(job: Job) -> Cell:
    """What the job's folder says. Cost: one small file, and one lock taken for a moment where it is not finished."""
    record = read_record(job.folder)
    if is_finished(job.folder, job.run_id, with_model=job.save_model) and record is not None:
        stages = {s["name"]: s["cached"] for s in record.get("stages", ())}
        return Cell(
            job, FINISHED, seconds=record.get("seconds"), from_cache=all(stages.get(name, False) for name in CACHEABLE)
        )
    stage, seconds = (record.get("stage"), record.get("seconds")) if record else (None, None)
    if in_use(job.folder):
        return Cell(job, RUNNING, stage, seconds=seconds)
    if record is None:
        last = last_lines(job.folder / LOG, 1)
        return Cell(job, DIED if last else WAITING, error=last[0].strip() if last else None)
    if record.get("status") == "finished":
        other = record.get("versions", {}).get("slm_exp")
        reason = "its checkpoint is missing" if other == __version__ else f"finished by version {other}"
        return Cell(job, WAITING, error=reason)
    if record.get("status") == "failed" and isinstance(error := record.get("error"), dict):
        return Cell(job, FAILED, error.get("stage"), f"{error.get('type')}: {error.get('message')}", seconds)
    return Cell(job, DIED, stage, "terminated unexpectedly", seconds)


def in_use(folder: Path) -> bool:
    """Whether a process holds the run folder's lock. The kernel frees it with the process, however that ends."""
    return locks.in_use(folder / ".lock")


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log that say something, the last one last; fewer, or none, where there are no more.

    Cost: the last 4 kB a line, at most 64 kB, are read.
    """
    try:
        with open(path, "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - min(4096 * count, 65536)))
            lines = f.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [line.rstrip() for line in lines if line.strip()][-count:]


def note_death(job: Job, message: str) -> None:
    """Turn the record of a job that terminated unexpectedly into a failed one that says how it ended."""
    record = read_record(job.folder)
    if record is None or record.get("status") != "running" or in_use(job.folder):
        return
    record["status"] = "failed"
    record["error"] = {"type": "ProcessDied", "message": message, "stage": record.get("stage")}
    try:
        write_json(job.folder / "record.json", record)
    except OSError as error:  # a full disk: the running record without a process says as much
        log.warning("could not note in %s that the job died: %s", job.folder, error)


@dataclass
class SweepFolder:
    """A sweep's folder on disk."""

    path: Path
    argv: list[str] = field(default_factory=list)
    """The command's overrides, Hydra's own included, without -m."""
    cwd: str = ""
    """Where the command ran: relative paths in overrides mean that folder."""
    jobs: list[Job] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> SweepFolder:
        """The definition in a sweep's folder.

        Raises:
            ConfigError: this is no sweep's folder.
        """
        try:
            told = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
            jobs = [
                Job(j["run_id"], tuple(j["overrides"]), path / j["folder"], j["slug"], j["save_model"])
                for j in told["jobs"]
            ]
            return cls(path, list(told["argv"]), told["cwd"], jobs)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is not the folder of a sweep: sweep.json cannot be read ({type(error).__name__}: {error}). "
                "Multiruns lie in outputs/multirun/NAME unless hydra.sweep.dir said otherwise."
            ) from None

    def write(self) -> None:
        """sweep.json, atomically."""
        write_json(
            self.path / "sweep.json",
            {
                "name": self.path.name,
                "version": __version__,
                "written": datetime.now(UTC).isoformat(timespec="seconds"),
                "argv": self.argv,
                "cwd": self.cwd,
                "jobs": [
                    {
                        "run_id": j.run_id,
                        "overrides": list(j.overrides),
                        "folder": os.path.relpath(j.folder, self.path),
                        "slug": j.slug,
                        "save_model": j.save_model,
                    }
                    for j in self.jobs
                ],
            },
        )

    def define(self, argv: Sequence[str], jobs: Iterable[Job]) -> None:
        """Add a command's jobs to those the folder already has, and put the definition on disk.

        A job whose overrides mean another run by now (other defaults, other contents of an input file) replaces the
        one they meant before.
        """
        self.argv, self.cwd = list(argv), os.getcwd()
        new = {j.run_id: j for j in jobs}
        meant = {j.overrides: j.run_id for j in new.values()}
        try:
            old = {j.run_id: j for j in SweepFolder.read(self.path).jobs}
        except ConfigError:
            old = {}
        for job in list(old.values()):
            if meant.get(job.overrides, job.run_id) != job.run_id:
                log.warning(
                    "[%s] means run %s now; it was %s when the sweep began.",
                    " ".join(job.overrides),
                    meant[job.overrides],
                    job.run_id,
                )
                del old[job.run_id]
        self.jobs = list((old | new).values())
        self.write()

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Be the only launcher at work here; the kernel frees the lock with the process.

        Raises:
            ConfigError: another launcher is at work; names its pid and host.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock, about = locks.Lock(self.path / ".launcher.lock"), self.path / ".launcher.json"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            owner = {}
            with contextlib.suppress(OSError, ValueError):
                owner = json.loads(about.read_text())
            raise ConfigError(
                f"hydra.sweep.dir = {self.path}; the launcher with pid {owner.get('pid', '?')} on host "
                f"{owner.get('host', '?')} is at work there since {owner.get('since', '?')}. Wait for it "
                f"(slm sweep status {self.path}), or choose another folder with hydra.sweep.dir=FOLDER."
            ) from None
        try:
            since = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(about, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
            yield
            about.unlink(missing_ok=True)
        finally:
            lock.release()

    def cells(self) -> list[Cell]:
        """How every job stands, in the order of the definition."""
        return [read_cell(job) for job in self.jobs]

    def write_index(self, cells: Sequence[Cell], already: frozenset[str] = frozenset()) -> None:
        """index.json: every cell, and which were finished before this launch."""
        counts = {state: sum(c.state == state for c in cells) for state in STATES}
        rows = [c.to_json() | {"already_finished": c.job.run_id in already} for c in cells]
        write_json(self.path / "index.json", {"name": self.path.name, "counts": counts, "jobs": rows})


def differing(jobs: Sequence[Job]) -> dict[str, str]:
    """run_id -> the overrides in which this job differs from some other one; all of them for a single job."""
    common = set.intersection(*(set(j.overrides) for j in jobs)) if len(jobs) > 1 else set()
    return {j.run_id: " ".join(o for o in j.overrides if o not in common) or "(defaults)" for j in jobs}


def table(cells: Sequence[Cell], already: frozenset[str] = frozenset()) -> str:
    """One line per job: state, time, run_id, what sets it apart, where it failed and why; then the counts."""
    apart = differing([c.job for c in cells])
    lines = []
    for cell in cells:
        note = cell.why[:200]
        if cell.state == FINISHED:
            note = "finished before" if cell.job.run_id in already else "from the cache" if cell.from_cache else ""
        seconds = "" if cell.seconds is None else f"{cell.seconds:.0f} s"
        line = f"{cell.state:<9}{seconds:>8}  {cell.job.run_id}  {apart[cell.job.run_id]}"
        lines.append(line + (f"  [{note}]" if note else ""))
    counts = ", ".join(f"{n} {state}" for state in STATES if (n := sum(c.state == state for c in cells)))
    return "\n".join([*lines, f"{len(cells)} jobs: {counts or 'none'}"])


def complaints(cells: Sequence[Cell]) -> str:
    """Every job that is not finished by name, with its error and where to look; empty when all are finished."""
    apart = differing([c.job for c in cells])
    lines = []
    for cell in cells:
        if cell.state != FINISHED:
            lines.append(
                f"run {cell.job.run_id} ({apart[cell.job.run_id]}) {cell.state}" + (cell.why and f": {cell.why}")
            )
            log_file = cell.job.folder / LOG
            lines.append(f"  {log_file if log_file.exists() else cell.job.folder}")
    return "\n".join(lines)


def state_of(folder: Path, record: dict[str, Any]) -> str:
    """One of STATES. A run whose record says running, and whose folder no process holds, has died."""
    status = record.get("status")
    if status in (FINISHED, FAILED):
        return str(status)
    return RUNNING if in_use(folder) else DIED
