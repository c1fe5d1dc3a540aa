"""A pool of processes, one per job: a crash, an out-of-memory or a leak in one job never touches another."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from slm_exp.core.logs import open_log
from slm_exp.core.secrets import masked
from slm_exp.launch.screen import Screen
from slm_exp.launch.workers import Worker
from slm_exp.runs.record import FILE as RECORD
from slm_exp.runs.record import read_run
from slm_exp.runs.state import DIED, FAILED, FINISHED, LOG, last_lines
from slm_exp.runs.sweep import Cell, Job, note_death, read_cell

POLL_S = 0.1
GRACE_S = 10.0
"""How long an interrupted job may take to close its record before it is killed."""
OF_EVERY_JOB = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",  # a job imports this package, never what lies in the folder that the sweep ran in
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]),
}
LOG_ONCE = "hydra.job_logging.root.handlers=[console]"
"""Of a job whose process writes into the run's log already."""
UNSET_BATCH = 4
"""Where halving starts when evaluation.batch_size is null: what the evaluation then takes on a CPU."""
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|MemoryError|out of memory|can't allocate memory|not enough memory|bad_alloc"
)


class Interrupted(BaseException):
    """The launcher got a signal to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass
class Attempt:
    """A job on its way: waiting to be tried, or running."""

    job: Job
    number: int = 1
    batch_size: int | None = None
    """Evaluation batch to insist on; null leaves the job's own."""
    worker: Worker = field(init=False)
    process: subprocess.Popen[bytes] | None = None
    """Null where it could not start; `no_start` says why."""
    no_start: str = ""
    oom_kills: int = 0
    """The kernel's count of processes killed for memory when it started."""


@dataclass
class Pool:
    """Runs jobs on workers until each has finished or failed; from the main thread, so that jobs can die with it."""

    workers: Sequence[Worker]
    command: Callable[[Job, int | None], list[str]]
    """(job, evaluation batch size or null) -> argv of its process."""
    batch_size: Callable[[Job], int | None] = lambda job: None
    """The evaluation batch of a job; null where it is left open."""
    retries: int = 2
    """How often a job that ran out of memory is tried again, each time with half the evaluation batch."""
    env: dict[str, str] = field(default_factory=dict)
    """Added to every job's environment."""

    def run(self, jobs: Sequence[Job], screen: Screen) -> list[Cell]:
        """How each job ended, in the order given. Raises Interrupted: SIGINT, SIGTERM or SIGHUP came; every job got
        SIGTERM and is gone."""
        waiting = deque(Attempt(job) for job in jobs)
        free, running = deque(self.workers), list[Attempt]()
        ended: dict[str, Cell] = {}
        with signals(_interrupt):
            try:
                while waiting or running:
                    while waiting and free:
                        attempt = waiting.popleft()
                        attempt.worker = free.popleft()
                        running.append(attempt)
                        self._start(attempt)
                        screen.started(attempt.job, attempt.worker.name)
                    screen.draw()
                    time.sleep(POLL_S)
                    for attempt in [a for a in running if a.process is None or has_ended(a.process)]:
                        running.remove(attempt)
                        free.appendleft(attempt.worker)
                        cell, smaller = self._ended(attempt)
                        if smaller:
                            waiting.appendleft(Attempt(attempt.job, attempt.number + 1, smaller))
                            screen.retried(attempt.job, f"out of memory; again with evaluation.batch_size={smaller}")
                        else:
                            ended[attempt.job.run_id] = cell
                            screen.ended(cell)
            except BaseException:
                with signals(signal.SIG_IGN):  # nothing interrupts the clean-up; it takes at most GRACE_S
                    stop([a.process for a in running if a.process])
                    for attempt in running:
                        note_death(attempt.job, "stopped with its launcher")
                raise
        return [ended[job.run_id] for job in jobs]

    def _start(self, attempt: Attempt) -> None:
        """Start its process, which may fail (full disk, read-only folder)."""
        attempt.oom_kills = oom_kills()
        job, worker, argv = attempt.job, attempt.worker, self.command(attempt.job, attempt.batch_size)
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            if (before := read_run(job.folder)) and before.state in (FAILED, DIED):
                (job.folder / RECORD).unlink()  # of an earlier attempt: what is there at the end is this one's
            with open_log(job.folder / LOG) as out:
                shown = masked(shlex.join(argv))
                out.write(f"--- {now} attempt {attempt.number} on {worker.name}: {shown}\n".encode())
                attempt.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                                   start_new_session=True,
                                                   env=os.environ | OF_EVERY_JOB | self.env | worker.env)
        except OSError as error:
            attempt.no_start = f"{type(error).__name__}: {error}"

    def _ended(self, attempt: Attempt) -> tuple[Cell, int]:
        """The job's state, and the evaluation batch to try it again with; 0 where that state is final."""
        job = attempt.job
        if attempt.process is None:
            return Cell(job, FAILED, error=attempt.no_start), 0
        code = reap(attempt.process)
        killed_for_memory = code == -signal.SIGKILL and oom_kills() > attempt.oom_kills
        how = died_of(code) + (", taken by the kernel's out-of-memory killer" if killed_for_memory else "")
        if code != 0:
            note_death(job, how)
        cell = read_cell(job)
        if cell.state == FINISHED:
            return cell, 0
        if cell.state != FAILED:  # it never got to a record, or could not write it
            last = "".join(last_lines(job.folder / LOG, 1)).strip()
            cell = Cell(job, FAILED, cell.stage, f"{how}; last log line: {last or 'none'}", cell.seconds)
        if attempt.number <= self.retries and (killed_for_memory or OUT_OF_MEMORY.search(cell.error or "")):
            batch = attempt.batch_size or self.batch_size(job) or UNSET_BATCH
            if batch > 1:
                return cell, batch // 2
        return cell, 0


def died_of(code: int) -> str:
    """A process's exit status in words."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit status {code}"


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since boot; 0 where it does not say."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.M):
            return int(found.group(1))
    return 0


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended. With waitid it stays a zombie, so that its group's id is not used anew."""
    if hasattr(os, "waitid"):
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    return process.poll() is not None


def reap(process: subprocess.Popen[bytes]) -> int:
    """Kill what is left of an ended process's group; its exit status."""
    _kill_group(process.pid, signal.SIGKILL)
    return process.wait()


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to process groups, then, after up to GRACE_S, SIGKILL to what is left. Returns when all are gone."""
    for process in processes:
        _kill_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while not all(map(has_ended, processes)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for process in processes:
        reap(process)


def _kill_group(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


def _interrupt(signum: int, frame: Any) -> None:
    raise Interrupted(signum)


@contextlib.contextmanager
def signals(handler: Any) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP go to `handler`, unless whoever started us had them ignored (nohup, &)."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield
        return
    wanted = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if sys.platform != "win32" else [])]
    before = {s: signal.signal(s, handler) for s in wanted if signal.getsignal(s) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for s, old in before.items():
            signal.signal(s, old)
