"""Hydra's side of a multirun: a sweeper that resumes, whatever launches, and a launcher with one process per job.

`hydra/launcher=processes` is the default of conf/config.yaml, `slurm` lies in `slurm.py`; basic, joblib, submitit_local
and submitit_slurm keep working, under the same sweeper: one owner per sweep folder, cells that are finished or wait in
Slurm not launched again, an index at the end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from slm_exp.core.errors import SlmError, require_one_of
from slm_exp.core.format import override
from slm_exp.core.plugins import Plugin
from slm_exp.core.plugins import words as plugin_words
from slm_exp.core.secrets import masked
from slm_exp.launch.hydra_compat import words
from slm_exp.launch.jobs import SWEEP, JobComposer, pool_workers, single_run, split_sweep
from slm_exp.launch.pool import LOG_ONCE, Interrupted, Pool
from slm_exp.launch.queued import every_job_answers
from slm_exp.launch.screen import Screen
from slm_exp.launch.slurm import OF_THIS_CALL, Queue, SlurmLauncher
from slm_exp.runs.sweep import FAILED, FINISHED, Cell, Job, SweepFolder, complaints, note_death, read_cell, table

log = logging.getLogger(__name__)

GO_ON = "jobs that were submitted go on; slm sweep status shows them"
SELECTIONS = ("missing", "failed", "all")
OWNER_S = 120.0
"""How long a batch job waits for the folder: it may start before the command that submitted it has left."""


class GridSweeper(Sweeper):
    """Every combination of swept values, as Hydra's basic sweeper makes them; it resumes, refuses a folder in use,
    and ends with an index."""

    def __init__(self, params: dict[str, str] | None = None, max_jobs: int | None = None,
                 max_batch_size: int | None = None, select: str | None = None) -> None:
        if select is not None:
            require_one_of("hydra.sweeper.select", select, SELECTIONS)
        self.params, self.max_batch_size, self.select = params or {}, max_batch_size, select  # max_jobs: see jobs.py

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._config = config
        self.path = Path(str(config.hydra.sweep.dir)).resolve()
        with read_write(config), open_dict(config):  # the default name hashes the overrides, which differ in each job
            config.hydra.overrides.hydra.append(override("hydra.sweep.dir", self.path))
        self._launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context,
                                                                 task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Run what is not finished, then say how every cell stands. Raises SystemExit: 1 when a cell is not finished, 2
        when the folder is in use, 128 + the signal when interrupted."""
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        sweep, launcher, reasons = SweepFolder(self.path), self._launcher, dict[str, str]()
        try:
            with sweep.owned(OWNER_S if "SLURM_JOB_ID" in os.environ else 0):
                if isinstance(launcher, SlurmLauncher):
                    before, todo = self._begin(sweep, arguments)
                    status = self._submit(launcher, todo, arguments)
                else:
                    status = self._sweep(sweep, arguments)
            if isinstance(launcher, SlurmLauncher) and not launcher.detach:  # a job on a node owns the folder now
                status = self._wait(launcher, todo, reasons)
                status = self._end(sweep, before, reasons) or status
        except (SlmError, OSError) as error:
            print(masked(f"{type(error).__name__}: {error}"), file=sys.stderr)
            status = 2
        if status:
            raise SystemExit(status)
        return []

    def _begin(self, sweep: SweepFolder, arguments: list[str]) -> tuple[dict[str, Cell], list[Job]]:
        """How this call's jobs stand, and those to run. Raises ConfigError: the queue does not say whether jobs that
        were submitted are alive."""
        before: dict[str, Cell] = {}
        busy = list[str]()
        queue = Queue.of(self.path)
        queue.refuse_unasked(self.path)
        for job in self._jobs(sweep, arguments, queue):
            before[job.run_id] = read_cell(job)
            busy += [job.run_id] * queue.busy(before[job.run_id])
        if already := finished(before):
            print(f"{len(already)} of {len(before)} jobs are finished in {self.path}")
        if busy:
            known = ", ".join(sorted({queue.cells[run_id].job for run_id in busy}))
            print(f"{len(busy)} of {len(before)} jobs wait or run in Slurm ({known}); they are not started again")
        return before, [c.job for run_id, c in before.items() if c.state != FINISHED and run_id not in busy]

    def _sweep(self, sweep: SweepFolder, arguments: list[str]) -> int:
        """Run this call's jobs here; the exit status."""
        reasons = dict[str, str]()
        before, todo = self._begin(sweep, arguments)
        status = self._launch(todo, reasons)
        wrong = self._end(sweep, before, reasons)
        return status or wrong

    def _submit(self, slurm: SlurmLauncher, todo: list[Job], arguments: list[str]) -> int:
        slurm.submit(todo, [*arguments, *words(self._config.hydra.overrides.hydra)], self.select == "failed")
        print(f"how the cells stand: {shlex.join(['slm', 'sweep', 'status', str(self.path)])}")
        return 0

    def _wait(self, slurm: SlurmLauncher, todo: list[Job], reasons: dict[str, str]) -> int:
        try:
            slurm.wait(todo, reasons)
        except KeyboardInterrupt:
            print(GO_ON, file=sys.stderr)
            return 130
        return 0

    def _end(self, sweep: SweepFolder, before: Mapping[str, Cell], reasons: Mapping[str, str]) -> int:
        """Say how every cell of the folder stands, and leave the index: 1 where one of these jobs is not finished.
        `before`: how this call's jobs stood when it began."""
        for cell in before.values():
            if cell.job.run_id in reasons:
                note_death(cell.job, reasons[cell.job.run_id])
        already = finished(before)
        cells = [with_reason(cell, reasons.get(cell.job.run_id), before) for cell in sweep.cells()]
        queue = Queue.of(self.path, cells)
        cells = [queue.told(cell) for cell in cells]
        print(table(cells, already))
        try:
            sweep.write_index(cells, already)
            print(f"index: {self.path / 'index.json'}")
        except OSError as error:  # a full disk: the folders say the same
            print(f"could not write {self.path / 'index.json'}: {error}", file=sys.stderr)
        if wrong := complaints([c for c in cells if c.job.run_id in before]):
            again = shlex.join(["slm", "sweep", "resume", str(self.path), *plugin_words(sweep.plugins)])
            print(f"{wrong}\n{again}", file=sys.stderr)
        return int(bool(wrong))

    def _jobs(self, sweep: SweepFolder, arguments: list[str], queue: Queue) -> list[Job]:
        """The jobs this call is about, on disk as the sweep's definition."""
        hydra = [o for o in words(self._config.hydra.overrides.hydra) if not o.startswith(OF_THIS_CALL)]
        argv = [*arguments, *hydra] if self.select is None else SweepFolder.read(sweep.path).argv
        composer = JobComposer(self._config.hydra, self.path)
        jobs: dict[str, Job] = {}
        plugins: list[Plugin] = []
        for overrides in self._requested(sweep, arguments, queue):
            job, cfg = composer.job(overrides)
            plugins += cfg.plugins
            if (first := jobs.setdefault(job.run_id, job)) is not job:
                log.warning("jobs [%s] and [%s] are the same run %s; it runs once.", " ".join(first.overrides),
                            " ".join(overrides), job.run_id)
        sweep.define(argv, jobs.values(), plugins)
        return list(jobs.values())

    def _requested(self, sweep: SweepFolder, arguments: list[str], queue: Queue) -> list[list[str]]:
        if self.select is None:
            return split_sweep(arguments, self.params)
        cells = SweepFolder.read(sweep.path).cells()
        if self.select == "all":
            for record in (cell.job.folder / "record.json" for cell in cells if not queue.busy(cell)):
                if record.exists():
                    record.replace(record.with_name("record.before.json"))
        return [list(c.job.overrides) for c in cells if self.select != "failed" or c.state in (FAILED, "died")]

    def _launch(self, todo: Sequence[Job], reasons: dict[str, str], launcher: Launcher | None = None) -> int:
        """Hand the jobs to the launcher: 0, or 128 + the signal that came.

        How they ended stands in their folders; `reasons` gets what the launcher knows of those that failed.
        `launcher`: another than the sweep's own.
        """
        launcher = launcher or self._launcher
        size = self.max_batch_size or max(1, len(todo))
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            submitit = "submitit" in type(launcher).__module__
            try:
                with every_job_answers() if submitit else contextlib.nullcontext():
                    returns = launcher.launch([list(j.overrides) for j in batch], initial_job_idx=start)
                reasons |= {j.run_id: str(r._return_value) for j, r in zip(batch, returns, strict=True)
                            if r.status != JobStatus.COMPLETED}
            except Interrupted as stop:
                print(f"stopped by {stop}", file=sys.stderr)
                return 128 + stop.signum
            except KeyboardInterrupt:
                if submitit:
                    print(GO_ON, file=sys.stderr)
                return 130
            except Exception as error:  # e.g. joblib's TerminatedWorkerError: the other cells still count
                log.error("the launcher gave up: %s: %s", type(error).__name__, error)
        return 0


class ProcessLauncher(Launcher):
    """One operating-system process per job, on a pool over the visible GPUs or over the cores."""

    def __init__(self, workers: int | None, threads: int | None, retries: int) -> None:
        self.workers, self.threads, self.retries = workers, threads, retries

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._hydra = config.hydra

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        path = Path(str(self._hydra.sweep.dir)).resolve()
        composer = JobComposer(self._hydra, path)
        made = [composer.job(overrides) for overrides in job_overrides]
        if not made:
            return []
        jobs, cfgs = [job for job, _ in made], {job.run_id: cfg for job, cfg in made}
        pool = Pool(pool_workers([cfg for _, cfg in made], self.workers, self.threads), self._command,
                    lambda job: cfgs[job.run_id].evaluation.batch_size, self.retries, {SWEEP: path.name})
        counts = [f"{n} {what}{'s' * (n != 1)}" for n, what in ((len(jobs), "job"), (len(pool.workers), "worker"))]
        print(f"{' on '.join(counts)} in {path}")
        others = SweepFolder.read(path).jobs if (path / "sweep.json").exists() else []
        with contextlib.closing(Screen(path.name, jobs, others=others)) as screen:
            return [_job_return(cell) for cell in pool.run(jobs, screen)]

    def _command(self, job: Job, batch_size: int | None) -> list[str]:
        smaller = [f"evaluation.batch_size={batch_size}"] if batch_size else []
        return [sys.executable, "-m", "slm_exp.cli.job", str(os.getpid()), *single_run(job, self._hydra), *smaller,
                LOG_ONCE]


def finished(cells: Mapping[str, Cell]) -> frozenset[str]:
    """The run_ids of those that are."""
    return frozenset(run_id for run_id, cell in cells.items() if cell.state == FINISHED)


def _job_return(cell: Cell) -> JobReturn:
    done = cell.state == FINISHED
    return JobReturn(overrides=cell.job.overrides, working_dir=str(cell.job.folder),
                     status=JobStatus.COMPLETED if done else JobStatus.FAILED,
                     _return_value=None if done else SlmError(cell.error or cell.state))


def with_reason(cell: Cell, reason: str | None, before: Mapping[str, Cell]) -> Cell:
    """The cell, failed for the launcher's reason where its folder has none (e.g. a folder that cannot be written), or
    that of an earlier launch."""
    told = cell.state == FAILED and cell.error and cell != before.get(cell.job.run_id)
    known = reason is None or cell.state == FINISHED or told
    return cell if known else replace(cell, state=FAILED, error=reason)
