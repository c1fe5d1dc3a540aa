"""How a run stands, as its folder shows it: states, the lock probe, the end of its log, what a killed process left."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from slm_exp.core import locks

LOG = "run.log"
LOCK = ".lock"
TEMPORARY = re.compile(r"\..+\.([0-9]+)\.[0-9a-f]{6}\.tmp")
"""The name of a file that is being written, see `core.files.writing`, with the writer's process."""
FINISHED, FAILED, DIED, RUNNING, WAITING, DAMAGED = "finished", "failed", "died", "running", "waiting", "damaged"
STATES = {
    FINISHED: "its record says so, made by this version of the package, and its files are as recorded",
    FAILED: "its record names the stage and the error",
    DIED: "it started, and terminated unexpectedly (killed, out of memory, power)",
    RUNNING: "a process is at work on it",
    WAITING: "not started",
    DAMAGED: "its record cannot be read, or says finished, and it or a file of the result is not as it was written",
}
UNEXPECTED = "terminated unexpectedly"


def in_use(folder: Path) -> bool:
    """Whether a process holds the run folder's lock. The kernel frees it with the process, however that ends."""
    return locks.in_use(folder / LOCK)


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


def remove_stale(target: Path, own_too: bool = False) -> None:
    """Remove temporary files and folders of `target` that killed processes left beside it. `own_too`: also those named
    by this process's id: a process just begun has left none, an earlier one of the same id may have (in a container).
    """
    for left in target.parent.glob(f".{target.name}.*.*"):
        pid = left.name.removeprefix(f".{target.name}.").split(".")[0]
        if left.suffix in (".tmp", ".old") and pid.isdigit():
            _remove_of(int(pid), left, own_too)


def remove_stale_below(folder: Path) -> None:
    """Likewise of every file of a run, in its folder and below; to be called when its run begins."""
    for left in folder.rglob(".*.tmp"):
        if found := TEMPORARY.fullmatch(left.name):
            _remove_of(int(found[1]), left, own_too=True)


def _remove_of(pid: int, left: Path, own_too: bool) -> None:
    if _alive(pid) and not (own_too and pid == os.getpid()):
        return
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
