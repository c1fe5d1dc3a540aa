"""Hydra's side of a multirun: a sweeper that resumes, whatever launches, and a launcher with one process per job.

`hydra/launcher=processes` is the default of conf/config.yaml; basic, joblib, submitit_local and submitit_slurm keep
working, under the same sweeper: one owner per sweep folder, finished cells not launched again, an index at the end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper

from slm_exp.core.errors import SlmError, require, require_one_of
from slm_exp.launch.pool import Interrupted, Pool
from slm_exp.launch.queued import every_job_answers
from slm_exp.launch.screen import Screen
from slm_exp.launch.workers import make_workers, visible_gpus
from slm_exp.runs.sweep import FAILED, FINISHED, Cell, Job, SweepFolder, complaints, note_death, read_cell, table

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from slm_exp.pipeline.config import RunConfig

log = logging.getLogger(__name__)

SELECTIONS = ("missing", "failed", "all")
OURS = ("hydra.mode", "hydra.run.", "hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher")
"""Hydra overrides that speak to the sweep, not to a job."""


@dataclass
class ProcessesConf:
    """Settings of `hydra/launcher=processes`."""

    _target_: str = "hydra_plugins.slm_exp.ProcessLauncher"
    workers: int | None = None
    """Jobs at a time; null is one per visible GPU, or one per core as far as memory goes."""
    threads: int | None = None
    """CPU threads per job; null shares the cores out."""
    retries: int = 2
    """How often a job that ran out of memory is tried again, each time with half the evaluation batch."""


@dataclass
class GridConf:
    """Settings of `hydra/sweeper=grid`."""

    _target_: str = "hydra_plugins.slm_exp.GridSweeper"
    params: dict[str, str] | None = None
    """Swept values by key, as a `sweep=` preset gives them."""
    max_batch_size: int | None = None
    """Jobs per call of the launcher; null hands over all at once."""
    select: str | None = None
    """null: the command's jobs. missing, failed or all: those of the folder's sweep.json (`slm sweep`)."""


def register_plugins() -> None:
    """Make the launcher and the sweeper known to Hydra. Idempotent."""
    store, known = ConfigStore.instance(), Plugins.instance().class_name_to_class
    store.store(group="hydra/launcher", name="processes", node=ProcessesConf, provider="slm_exp")
    store.store(group="hydra/sweeper", name="grid", node=GridConf, provider="slm_exp")
    # Hydra instantiates plugins by names below hydra_plugins only, and pickles classes by their true module: so the
    # classes stay here and are entered under such a name.
    known["hydra_plugins.slm_exp.ProcessLauncher"] = ProcessLauncher
    known["hydra_plugins.slm_exp.GridSweeper"] = GridSweeper


def compose_job(context: HydraContext, config: DictConfig, overrides: Sequence[str]) -> tuple[Job, RunConfig]:
    """A job of the sweep from its overrides: its run_id, folder and checked config."""
    from omegaconf import OmegaConf

    from slm_exp.launch.compose import checked, science_only
    from slm_exp.pipeline.config import to_run_config
    from slm_exp.runs.tracking.wandb import slug

    by_run_id = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"] == "${run_id:}"  # type: ignore[index, call-overload]
    if by_run_id and tuple(overrides) in checked:
        cfg = checked[tuple(overrides)]
        subdir = cfg.run_id
    else:
        composed = context.config_loader.load_sweep_config(config, list(overrides))
        cfg = checked[tuple(overrides)] = to_run_config(science_only(composed))
        subdir = str(composed.hydra.sweep.subdir)
    folder = Path(str(config.hydra.sweep.dir)).resolve() / subdir
    return Job(cfg.run_id, tuple(overrides), folder, slug(cfg.resolved()), bool(cfg.save_model)), cfg


class GridSweeper(Sweeper):
    """Every combination of swept values, as Hydra's basic sweeper makes them; it resumes, refuses a folder in use,
    and ends with an index."""

    def __init__(
        self, params: dict[str, str] | None = None, max_batch_size: int | None = None, select: str | None = None
    ) -> None:
        if select is not None:
            require_one_of("hydra.sweeper.select", select, SELECTIONS)
        self.params, self.max_batch_size, self.select = params or {}, max_batch_size, select

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from omegaconf import open_dict, read_write

        self._context, self._config = hydra_context, config
        self.path = Path(str(config.hydra.sweep.dir)).resolve()
        with read_write(config), open_dict(config):  # the default name hashes the overrides, which differ in each job
            config.hydra.overrides.hydra.append(override("hydra.sweep.dir", self.path))
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run what is not finished, then say how every cell stands.

        Raises:
            SystemExit: 1 when a cell is not finished, 2 when the folder is in use, 128 + the signal when interrupted.
        """
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        sweep = SweepFolder(self.path)
        try:
            with sweep.owned():
                status = self._sweep(sweep, arguments)
        except (SlmError, OSError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            status = 2
        if status:
            raise SystemExit(status)
        return []

    def _sweep(self, sweep: SweepFolder, arguments: list[str]) -> int:
        asked = self._jobs(sweep, arguments)
        already = frozenset(j.run_id for j in asked if read_cell(j).state == FINISHED)
        todo = [j for j in asked if j.run_id not in already]
        if already:
            print(f"{len(already)} of {len(asked)} jobs are finished in {self.path}")
        told: dict[str, str] = {}
        status = self._launch(todo, told)
        for job in todo:
            if job.run_id in told:
                note_death(job, told[job.run_id])
        cells = [_with_reason(cell, told.get(cell.job.run_id)) for cell in sweep.cells()]
        print(table(cells, already))
        try:
            sweep.write_index(cells, already)
            print(f"index: {self.path / 'index.json'}")
        except OSError as error:  # a full disk: the folders say the same
            print(f"could not write {self.path / 'index.json'}: {error}", file=sys.stderr)
        mine = {j.run_id for j in asked}
        if wrong := complaints([c for c in cells if c.job.run_id in mine]):
            print(f"{wrong}\nslm sweep resume {self.path}", file=sys.stderr)
        return status or int(bool(wrong))

    def _jobs(self, sweep: SweepFolder, arguments: list[str]) -> list[Job]:
        """The jobs this call is about, on disk as the sweep's definition."""
        hydra = [o for o in self._config.hydra.overrides.hydra if not o.startswith(("hydra.mode", "hydra.sweep"))]
        argv = [*arguments, *hydra] if self.select is None else SweepFolder.read(sweep.path).argv
        jobs: dict[str, Job] = {}
        for overrides in self._asked(sweep, arguments):
            job, _ = compose_job(self._context, self._config, overrides)
            if job.run_id in jobs:
                log.warning(
                    "jobs [%s] and [%s] are the same run %s; it runs once.",
                    " ".join(jobs[job.run_id].overrides),
                    " ".join(overrides),
                    job.run_id,
                )
            jobs.setdefault(job.run_id, job)
        sweep.define(argv, jobs.values())
        return list(jobs.values())

    def _asked(self, sweep: SweepFolder, arguments: list[str]) -> list[list[str]]:
        from slm_exp.launch.compose import split_sweep

        if self.select is None:
            return split_sweep(arguments, self.params)
        cells = SweepFolder.read(sweep.path).cells()
        chosen = [c for c in cells if self.select != "failed" or c.state in (FAILED, "died")]
        if self.select == "all":
            for cell in chosen:
                record = cell.job.folder / "record.json"
                if record.exists():
                    record.replace(record.with_name("record.before.json"))
        return [list(c.job.overrides) for c in chosen]

    def _launch(self, todo: list[Job], told: dict[str, str]) -> int:
        """Hand the jobs to the launcher: 0, or 128 + the signal that came.

        How they ended stands in their folders; `told` gets what the launcher knows of those that failed.
        """
        size = self.max_batch_size or max(1, len(todo))
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            submitit = "submitit" in type(self._launcher).__module__
            try:
                with every_job_answers() if submitit else contextlib.nullcontext():
                    returns = self._launcher.launch([list(j.overrides) for j in batch], initial_job_idx=start)
                told |= {
                    j.run_id: str(r._return_value)
                    for j, r in zip(batch, returns, strict=True)
                    if r.status != JobStatus.COMPLETED
                }
            except Interrupted as stop:
                print(f"stopped by {stop}", file=sys.stderr)
                return 128 + stop.signum
            except KeyboardInterrupt:
                if submitit:
                    print("jobs that were submitted go on; slm sweep status shows them", file=sys.stderr)
                return 130
            except Exception as error:  # e.g. joblib's TerminatedWorkerError: the other cells still count
                log.error("the launcher gave up: %s: %s", type(error).__name__, error)
        return 0


class ProcessLauncher(Launcher):
    """One operating-system process per job, on a pool over the visible GPUs or over the cores."""

    def __init__(self, workers: int | None, threads: int | None, retries: int) -> None:
        require(workers is None or workers >= 1, "hydra.launcher.workers", workers, "null or a number >= 1")
        require(threads is None or threads >= 1, "hydra.launcher.threads", threads, "null or a number >= 1")
        require(retries >= 0, "hydra.launcher.retries", retries, "a number >= 0")
        self.workers, self.threads, self.retries = workers, threads, retries
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self.config is not None
        assert self.hydra_context is not None
        setup_globals()
        made = [compose_job(self.hydra_context, self.config, overrides) for overrides in job_overrides]
        if not made:
            return []
        jobs = [job for job, _ in made]
        cfgs = {job.run_id: cfg for job, cfg in made}
        path = Path(str(self.config.hydra.sweep.dir)).resolve()
        pool = Pool(
            make_workers(self.workers, self.threads, gpus_for(made[0][1]), len(jobs), heaviest(cfgs.values())),
            command=lambda job, batch: self._command(job, batch),
            batch_size=lambda job: cfgs[job.run_id].evaluation.batch_size,
            retries=self.retries,
            env={"SLM_EXP_SWEEP": path.name},
        )
        print(f"{len(jobs)} jobs on {len(pool.workers)} workers in {path}")
        screen = Screen(path.name, jobs)
        try:
            cells = pool.run(jobs, screen)
        finally:
            screen.close()
        return [_job_return(cell) for cell in cells]

    def _command(self, job: Job, batch_size: int | None) -> list[str]:
        assert self.config is not None
        inherited = [o for o in self.config.hydra.overrides.hydra if not o.startswith(OURS)]
        return [
            sys.executable,
            "-m",
            "slm_exp.cli.job",
            str(os.getpid()),
            *job.overrides,
            *([f"evaluation.batch_size={batch_size}"] if batch_size else []),
            *inherited,
            "hydra.mode=RUN",  # a `sweep=` preset among the overrides says MULTIRUN
            "hydra.job_logging.root.handlers=[console]",  # the process's output is the run's log already
            override("hydra.run.dir", job.folder),
        ]


def _job_return(cell: Cell) -> JobReturn:
    if cell.state == FINISHED:
        return JobReturn(overrides=cell.job.overrides, working_dir=str(cell.job.folder), status=JobStatus.COMPLETED)
    return JobReturn(
        overrides=cell.job.overrides,
        working_dir=str(cell.job.folder),
        status=JobStatus.FAILED,
        _return_value=SlmError(cell.error or cell.state),
    )


def _with_reason(cell: Cell, reason: str | None) -> Cell:
    """The cell, failed for the launcher's reason where its folder has none (e.g. a folder that cannot be written)."""
    if reason is None or cell.state == FINISHED or (cell.state == FAILED and cell.error):
        return cell
    return replace(cell, state=FAILED, error=reason)


def gpus_for(cfg: RunConfig) -> list[str]:
    """The GPUs to deal out, one per job: none for jobs on the CPU, on a GPU chosen by number, or on several at once."""
    device = cfg.model.device or cfg.runtime.device
    return visible_gpus() if device in ("auto", "cuda") and cfg.model.device_map is None else []


def heaviest(cfgs: Iterable[RunConfig]) -> int | None:
    """Bytes of the largest model's weights among the jobs; None where one is not known before it is fetched."""
    sizes = [cfg.model.weights_bytes() for cfg in cfgs]
    return None if None in sizes else max(size for size in sizes if size is not None)


def override(key: str, value: object) -> str:
    """`key='value'`, quoted for Hydra whatever the value holds."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return f"{key}={QuotedString(text=str(value), quote=Quote.single).with_quotes()}"
