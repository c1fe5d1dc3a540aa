"""`hydra/launcher=slurm`: a sweep's cells as batch jobs, and what the queue says of them at any later time.

Without `workers` a job array has a task per cell; with them one job holds a node and runs all cells on the pool of
`hydra/launcher=processes` there. What was submitted stands in the sweep's `slurm.json`, so nothing depends on the
process that submitted it: whoever reads the folder asks the queue before a cell is started twice.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from slm_exp.core.documents import Section, parse
from slm_exp.core.errors import ConfigError, SlmError
from slm_exp.core.files import read_json, write_json, write_text
from slm_exp.core.format import override
from slm_exp.launch.jobs import SWEEP, JobComposer, single_run
from slm_exp.launch.pool import LOG_ONCE, OF_EVERY_JOB
from slm_exp.launch.screen import Screen
from slm_exp.runs.record import FILE as RECORD
from slm_exp.runs.record import read_run
from slm_exp.runs.state import DIED, FAILED, FINISHED, LOG, RUNNING, WAITING
from slm_exp.runs.sweep import Cell, Job, SweepFolder, note_death, read_cell

FILE = "slurm.json"
OF_THIS_CALL = ("hydra.mode", "hydra.sweep.dir", "hydra.sweeper.select")
"""Overrides that `slm sweep resume` gives anew."""
LOOK_S = 5.0
"""Between two looks at the queue. A cell that is missing in two of them, without a result, has died."""
ARRAY = 1000
"""Tasks of an array at most: what a cluster takes by default (MaxArraySize)."""
OPTIONS = {"partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint",
           "cpus_per_task": "cpus-per-task", "gpus_per_node": "gpus-per-node", "timeout_min": "time"}
"""Our settings -> sbatch's options, given as they are."""
SCRIPT = """\
#!/bin/sh
# {about}
cd {cwd} || exit 2
{exports}
{setup}
again() {{ # near the time limit: go to the back of the queue; what is done is in the cache
  [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ] && scontrol requeue "$SLURM_JOB_ID" || kill -TERM "$child"
}}
trap again USR1
{command} & child=$!
wait "$child"; code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done # the signal ended the first wait
exit "$code"
"""


class Submitted(Section):
    """A cell's latest job."""

    job: str
    """As squeue has it: 12, or 12_3 for a task of an array."""
    user: str
    log: str
    since: float = 0.0
    """When it was submitted, seconds since 1970 (0: by an earlier version)."""


class Submissions(Section):
    cells: dict[str, Submitted]
    """run_id -> its job."""


@dataclass
class Queue:
    """What was submitted for a sweep's cells, and what the queue says of it now.

    Raises, in `of`:
        ConfigError: slurm.json cannot be read.
    """

    cells: Mapping[str, Submitted] = field(default_factory=dict)
    states: Mapping[str, str] | None = field(default_factory=dict)
    """Job -> PENDING, RUNNING, ...; null where the queue did not answer."""
    why: str = ""
    """Why it did not."""

    @classmethod
    def of(cls, folder: Path, cells: Iterable[Cell] | None = None) -> Queue:
        """Of a sweep's folder and its cells. Cost: squeue once, where a cell that is not finished was submitted."""
        if not (folder / FILE).exists():
            return cls()
        cells = SweepFolder.read(folder).cells() if cells is None else cells
        try:
            stored = parse(Submissions, read_json(folder / FILE)).cells
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder / FILE} cannot be read ({error}): it says which cells wait or run in Slurm. "
                              "If none of them does any more, remove it.") from None
        own = os.environ.get("SLURM_JOB_ID")  # a job on a node of its own asks about its own cells
        left = {c.job.run_id for c in cells if c.state != FINISHED}
        known = {run_id: s for run_id, s in stored.items() if run_id in left and s.job != own}
        states, why = queued(sorted({s.user for s in known.values()})) if known else ({}, "")
        return cls(known, states, why)

    def busy(self, cell: Cell) -> bool:
        """Whether the cell waits or runs in Slurm, so that it must not be started."""
        submitted = self.cells.get(cell.job.run_id)
        if submitted is None or cell.state == FINISHED or (state := (self.states or {}).get(submitted.job)) is None:
            return False
        if cell.state != FAILED or state == "PENDING":
            return True
        record = cell.job.folder / RECORD  # of an earlier attempt, where the workers of its job have yet to reach it
        return "_" not in submitted.job and record.exists() and record.stat().st_mtime < submitted.since

    def told(self, cell: Cell) -> Cell:
        """The cell as its folder and the queue together show it."""
        if (submitted := self.cells.get(cell.job.run_id)) is None or self.states is None:
            return cell
        if self.busy(cell):
            state = self.states[submitted.job]
            begun = cell.state == RUNNING or ("_" in submitted.job and state != "PENDING")
            return replace(cell, state=RUNNING if begun else WAITING, error=f"job {submitted.job} is {state} in Slurm")
        if cell.state in (WAITING, DIED):
            return replace(cell, state=DIED, error=f"job {submitted.job} ended without a result; see {submitted.log}")
        return cell

    def refuse_unasked(self, folder: Path) -> None:
        """Raise ConfigError where cells were submitted and nobody says whether they wait or run."""
        if self.states is None:
            jobs = sorted({s.job.partition("_")[0] for s in self.cells.values()})
            raise ConfigError(f"{folder}: {len(self.cells)} unfinished cells were submitted to Slurm (job "
                              f"{', '.join(jobs)}), and the queue does not answer here: {self.why}. Start it where "
                              f"squeue works; or, if these jobs are gone, remove {folder / FILE}.")


def queued(users: Sequence[str]) -> tuple[dict[str, str] | None, str]:
    """Job (or task of an array) -> its state, of all that these users have in the queue; or null and why."""
    command = ["squeue", "-h", "-r", "-u", ",".join(users), "-o", "%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(error)
    if done.returncode:
        return None, done.stderr.strip()
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip()), ""


class SlurmLauncher(Launcher):
    """Batch jobs by sbatch; settings as `SlurmConf` says."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.detach = bool(settings["detach"])

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._hydra = config.hydra
        self.folder = Path(str(config.hydra.sweep.dir)).resolve()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Not for ours: the grid sweeper submits, and waits once it has given the folder free (`check_launcher`)."""
        raise ConfigError("hydra/launcher=slurm works with hydra/sweeper=grid.")

    def submit(self, jobs: Sequence[Job], argv: Sequence[str], failed: bool) -> None:
        """Hand the cells to Slurm and note the jobs in slurm.json. `argv`: the command's overrides, for a job that runs
        the folder's unfinished cells on its node; `failed`: only those that failed or died. Raises ConfigError: sbatch
        refuses; its own words."""
        if not jobs:
            return
        workers = self.settings["workers"]
        if workers:
            self._submit(jobs, self._on_node(argv, failed), f"{len(jobs)} cells, {workers} at a time")
        else:
            composer = JobComposer(self._hydra, self.folder)
            for start in range(0, len(jobs), ARRAY):
                part = jobs[start : start + ARRAY]
                lines = [self._cell(composer.job(job.overrides)[0]) for job in part]
                self._submit(part, lines, f"a cell for each of {len(part)} tasks")

    def wait(self, jobs: Sequence[Job], reasons: dict[str, str]) -> None:
        """Until no cell waits or runs in Slurm; `reasons` gets why one has no result."""
        left = {job.run_id: job for job in jobs}
        gone, shown = dict.fromkeys(left, 0), set[str]()
        with contextlib.closing(Screen(self.folder.name, jobs)) as screen:
            while left:
                cells = [read_cell(job) for job in left.values()]
                queue = Queue.of(self.folder, cells)
                for cell in cells:
                    run_id, told = cell.job.run_id, queue.told(cell)
                    if queue.states is None or queue.busy(cell):
                        gone[run_id] = 0
                        if told.state == RUNNING and run_id not in shown:
                            shown.add(run_id)
                            screen.started(cell.job, f"job {queue.cells[run_id].job}")
                        continue
                    gone[run_id] += 1
                    if cell.state != FINISHED and gone[run_id] < 2:
                        continue
                    if told.state == DIED:
                        reasons[run_id] = told.error or ""
                        note_death(cell.job, reasons[run_id])
                    screen.ended(told)
                    del left[run_id]
                screen.draw()
                if left:
                    time.sleep(LOOK_S)

    def _cell(self, job: Job) -> str:
        """A line for a shell that runs one cell, its output in the run's log."""
        before = read_run(job.folder)
        if before and before.state in (FAILED, DIED):  # of an earlier attempt: what is there at the end is this one's
            (job.folder / RECORD).unlink()
        run = shlex.join([sys.executable, "-m", "slm_exp", *single_run(job, self._hydra), LOG_ONCE])
        folder, log = shlex.quote(str(job.folder)), shlex.quote(str(job.folder / LOG))
        return f"mkdir -p {folder} && exec {run} >> {log} 2>&1"

    def _on_node(self, argv: Sequence[str], failed: bool) -> str:
        """What `slm sweep resume` would do, by the pool of one machine; requeued, it goes on."""
        s = self.settings
        own = [o for o in argv if not o.startswith(("hydra/launcher", "hydra.launcher.", *OF_THIS_CALL))]
        pool = {"workers": s["workers"], "threads": s["threads"] or max(1, s["cpus_per_task"] // s["workers"]),
                "retries": s["retries"]}
        return shlex.join([sys.executable, "-m", "slm_exp", "-m", *own, "hydra/launcher=processes",
                           *(f"hydra.launcher.{name}={value}" for name, value in pool.items()),
                           override("hydra.sweep.dir", self.folder),
                           f"hydra.sweeper.select={'failed' if failed else 'missing'}"])

    def _submit(self, jobs: Sequence[Job], command: str | Sequence[str], about: str) -> None:
        """One job, or one array where there is a command per cell."""
        s, at = self.settings, self.folder / "slurm"
        at.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.stem) for p in at.glob("*.sh") if p.stem.isdigit()), default=0)
        array = not isinstance(command, str)
        exports = OF_EVERY_JOB | {SWEEP: self.folder.name}
        if array:
            exports |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(s["threads"] or s["cpus_per_task"])}
            write_text(at / f"{number}.cells", "".join(f"{line}\n" for line in command))
            command = f'sh -c "$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(at / f"{number}.cells"))})"'
        script = SCRIPT.format(
            about=f"{self.folder}: {about}", cwd=shlex.quote(os.getcwd()), command=command, setup="\n".join(s["setup"]),
            restarts=s["max_num_timeout"],
            exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in exports.items()))
        write_text(path := at / f"{number}.sh", script)
        log = str(at / (f"{number}_%a.log" if array else f"{number}.log"))
        options = {
            "job-name": self.folder.name, "output": log, "open-mode": "append", "ntasks": 1, "nodes": 1,
            "mem": f"{s['mem_gb']}G", "signal": f"B:USR1@{s['signal_delay_s']}", "export": "ALL", "requeue": True,
            **{theirs: s[ours] for ours, theirs in OPTIONS.items()},
            **({"array": f"0-{len(jobs) - 1}%{s['array_parallelism']}"} if array else {}),
            **s["additional_parameters"],
        }
        argv = ["sbatch", "--parsable", *(f"--{n}" if value is True else f"--{n}={value}"
                                          for n, value in options.items() if value not in (None, False)), str(path)]
        since = time.time()
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
        except subprocess.CalledProcessError as error:
            raise ConfigError(f"{shlex.join(argv)}: {' '.join(error.stderr.split())}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SlmError(f"{shlex.join(argv)}: {error}. Whether it was submitted, squeue says.") from None
        job = done.stdout.strip().partition(";")[0]  # JOB or JOB;CLUSTER
        new = {j.run_id: {"job": f"{job}_{i}" if array else job, "user": getpass.getuser(), "since": since,
                          "log": log.replace("%a", str(i))} for i, j in enumerate(jobs)}
        before: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):
            before = read_json(self.folder / FILE)["cells"]
        write_json(self.folder / FILE, {"cells": before | new})
        print(f"submitted job {job}: {about}")
