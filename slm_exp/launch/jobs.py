"""The jobs of a command line: which there are, where they go, on which workers."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from slm_exp.core.errors import ConfigError
from slm_exp.core.format import override
from slm_exp.core.plugins import words as plugin_words
from slm_exp.core.registry import GROUPS
from slm_exp.core.runtime import cores
from slm_exp.core.secrets import masked
from slm_exp.launch.compose import Composer, compose_raw, conf_dir, explain, one_list, open_mappings, prepare_hydra
from slm_exp.launch.hydra_compat import (
    HYDRA,
    axes,
    count,
    grid,
    is_sweep,
    probes,
    quoted,
    session,
    without_hydra,
    words,
)
from slm_exp.launch.objectives import check_search, require_optuna
from slm_exp.launch.settings import check_launcher
from slm_exp.launch.workers import Worker, make_workers, visible_gpus
from slm_exp.pipeline.config import RunConfig, to_run_config
from slm_exp.runs.record import check_writable
from slm_exp.runs.sweep import LOG, Job, SweepFolder
from slm_exp.runs.tracking.base import slug

SEARCH = "hydra.searchpath="
MANY = 100
"""A grid of this many jobs says so before they are composed."""
_composed: dict[tuple[str, ...], RunConfig] = {}
"""Jobs of this process's command by their overrides: what was checked is what is launched."""


OURS = ("hydra.mode", "hydra.run.", "hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher")
"""Hydra overrides that speak to the sweep, not to a job."""
SWEEP = "SLM_EXP_SWEEP"
"""The variable by which a job with a process of its own knows the name of its sweep."""


@dataclass(frozen=True)
class CommandJobs:
    """What a command line would run."""

    folder: Path
    """The run's, or the sweep's."""
    multirun: bool
    jobs: list[tuple[Job, RunConfig]]
    """In the grid's order; jobs that are the same run stand here once."""
    hydra: DictConfig
    """Hydra's own settings."""

    @property
    def searches(self) -> bool:
        """Whether the jobs are only the ends of what a search chooses from."""
        return self.multirun and self.hydra.sweeper.get("search") is not None

    def capacity(self) -> tuple[int, int]:
        """(jobs at a time, CPU threads of each), as the launcher decides them on this machine."""
        cfgs = [cfg for _, cfg in self.jobs]
        requested = os.environ.get("OMP_NUM_THREADS", "")
        own = max(cfg.runtime.threads or 0 for cfg in cfgs) or (int(requested) if requested.isdigit() else 0)
        if not self.multirun:
            return 1, own or cores()
        launcher = self.hydra.launcher
        pool = pool_workers(cfgs, launcher.get("workers") or launcher.get("n_jobs"), launcher.get("threads"))
        return len(pool), own or int(pool[0].env.get("OMP_NUM_THREADS", cores()))


    def commands(self) -> list[str]:
        """A line for a shell per job, in any order, on any machine with these files; again, it does what is missing."""
        plugins = dict.fromkeys(plugin for _, cfg in self.jobs for plugin in cfg.plugins)
        program = [*(["env", f"{SWEEP}={self.folder.name}"] if self.multirun else []), "python", "-m", "slm_exp",
                   *plugin_words(plugins)]
        return [shlex.join([*program, *single_run(job, self.hydra)]) for job, _ in self.jobs]

    def define(self, overrides: Sequence[str]) -> None:
        """Write a sweep's definition, so that `slm sweep` and `slm report` know its folder before a job has run."""
        if self.multirun:
            plugins = [plugin for _, cfg in self.jobs for plugin in cfg.plugins]
            SweepFolder(self.folder).define(overrides, [job for job, _ in self.jobs], plugins)


def single_run(job: Job, hydra: DictConfig) -> list[str]:
    """The words of one job as a run of its own, given the command's settings of Hydra."""
    inherited = [o for o in words(hydra.overrides.hydra) if not o.startswith(OURS)]
    # a `sweep=` preset among the overrides says MULTIRUN
    return [*job.overrides, *inherited, "hydra.mode=RUN", override("hydra.run.dir", job.folder)]


def command_jobs(overrides: Sequence[str], multirun: bool = False, *, cells: Sequence[Sequence[str]] | None = None,
                 name: str = "", identify: Callable[[RunConfig], str] = lambda cfg: cfg.run_id) -> CommandJobs:
    """Compose and check every job of a command. Cost: 0.2 s, and 5 ms a job.

    Args:
        overrides: of the command, Hydra's own included; several values of a key make a grid.
        multirun: a grid, also where nothing is swept.
        cells: the jobs, given outright; `overrides` then holds Hydra's settings only.
        name: of the sweep's folder where `cells` are given.
        identify: a run's id; empty where it is not known without reading weights.
    Raises ConfigError: names the first bad field, and in a grid the job; or the grid is larger than
    `hydra.sweeper.max_jobs`; or there is nothing to run.
    """
    _composed.clear()
    overrides = fields_of_swept_groups(open_mappings(overrides))
    task = [o for o in overrides if not o.startswith(HYDRA)]
    swept = [o for o in task if is_sweep(o)]
    for o in swept:
        if os.path.exists(os.path.expanduser(o.partition("=")[2])):  # a list may be longer than a name can be
            raise ConfigError(f"{o}: a comma makes several values of it, and there is a file or folder of that whole "
                              f"name. If it is meant: {quoted(o)}")
    whole = compose_raw([o for o in overrides if o not in swept], with_hydra=True)
    if not (multirun or swept or cells is not None or whole.hydra.mode == RunMode.MULTIRUN):
        cfg = to_run_config(without_hydra(whole))
        run_id = identify(cfg)
        where = str(OmegaConf.to_container(whole.hydra.run, resolve=False)["dir"])  # type: ignore[index, call-overload]
        with open_dict(whole.hydra):
            whole.hydra.run.dir = where.replace("${run_id:}", run_id or "RUN_ID")
        job = Job(run_id, tuple(task), Path(str(whole.hydra.run.dir)), save_model=cfg.save_model is not False,
                  exact=cfg.cache.accept == "exact")
        return CommandJobs(job.folder, False, [(job, cfg)], whole.hydra)
    with open_dict(whole.hydra):
        whole.hydra.overrides.task = task  # a sweep's default name hashes what is swept too
        if name and not any(o.startswith("hydra.sweep.dir=") for o in overrides):
            whole.hydra.sweep.dir = f"outputs/multirun/{name}"
    folder, sweeper = Path(str(whole.hydra.sweep.dir)), whole.hydra.sweeper
    if cells is None and sweeper.get("select"):
        cells = [job.overrides for job in SweepFolder.read(folder).jobs]
    elif cells is None and sweeper.get("search") is not None:
        check_search(sweeper.search)
        cells = probes(search_axes(task, dict(sweeper.params or {})))
    elif cells is None:
        cells = split_sweep(task, dict(sweeper.get("params") or {}), sweeper.get("max_jobs"))
    made: dict[str, tuple[Job, RunConfig]] = {}
    composer = JobComposer(whole.hydra, folder, identify)
    for cell in cells:
        job, cfg = composer.job([o for o in cell if not o.startswith(HYDRA)])
        made.setdefault(job.run_id or " ".join(job.overrides), (job, cfg))
    if sweeper.get("search") is not None:
        require_optuna()
    if not made:
        raise ConfigError("no job is left: the grid is empty.")
    return CommandJobs(folder, True, list(made.values()), whole.hydra)


class JobComposer:
    """Makes the jobs of one sweep from their overrides.

    Args:
        hydra: the command's own settings of Hydra.
        identify: see `command_jobs`.
    """

    def __init__(self, hydra: DictConfig, folder: Path,
                 identify: Callable[[RunConfig], str] = lambda cfg: cfg.run_id) -> None:
        self.folder, self.identify = folder, identify
        self.settings = words(hydra.overrides.hydra)
        self.by_run_id = OmegaConf.to_container(hydra.sweep, resolve=False)["subdir"] == "${run_id:}"  # type: ignore[index, call-overload]
        self.composer = Composer([o for o in self.settings if o.startswith(SEARCH)])

    def job(self, overrides: Sequence[str]) -> tuple[Job, RunConfig]:
        """The job with its run_id and folder, and its checked config. Raises ConfigError: names the job and the first
        bad field."""
        task = tuple(overrides)
        try:
            cfg = _composed.get(task) or self.composer.run_config(task)
            run_id = self.identify(cfg)
        except ConfigError as error:
            raise ConfigError(f"job {' '.join(task)}: {error}") from None
        _composed[task] = cfg
        subdir = run_id
        if not self.by_run_id:
            subdir = str(compose_raw([*self.settings, *task], with_hydra=True).hydra.sweep.subdir)
        name = masked(slug(cfg.resolved()))
        return Job(run_id, task, self.folder / subdir, name, bool(cfg.save_model), cfg.cache.accept == "exact"), cfg


def check_all(overrides: Sequence[str], multirun: bool) -> CommandJobs:
    """Compose and check every job of the command, and the folder it writes, before the first one starts. Raises
    ConfigError: names the first bad field; in a multirun, the job too."""
    found = command_jobs(overrides, multirun)
    if found.multirun and not multirun and found.hydra.mode != RunMode.MULTIRUN:
        several = next(o for o in overrides if is_sweep(o))
        raise ConfigError(f"{several}: several values make a multirun; add -m: "
                          f"{shlex.join(['python', '-m', 'slm_exp', '-m', *overrides])}{one_list(several)}")
    if found.multirun:
        check_launcher(found.hydra.launcher, found.hydra.sweeper)
    check_writable(found.folder)
    log = found.folder / LOG
    if log.is_symlink() or (log.exists() and not log.is_file()):
        raise ConfigError(f"{log} is a {'link' if log.is_symlink() else 'folder, pipe or device'}; "
                          "expected no file or a plain one. Remove it.")
    return found


def split_sweep(overrides: Sequence[str], params: dict[str, str], limit: int | None = None) -> list[list[str]]:
    """The jobs of a grid: every combination of swept values, a preset's parameters first. Raises ConfigError: an
    override that cannot be parsed; more than `limit` jobs, counted before any is made."""
    given = {o.partition("=")[0] for o in overrides}
    swept = [f"{k}={v}" for k, v in params.items() if k not in given] + list(overrides)
    prepare_hydra()
    try:
        with session(str(conf_dir())):
            of = axes(swept)
            if limit is not None and (jobs := math.prod(map(count, of.values()))) > limit:
                sizes = ", ".join(f"{key} ({n})" for key, axis in of.items() if (n := count(axis)) > 1)
                raise ConfigError(f"{jobs} jobs: {sizes}; expected at most hydra.sweeper.max_jobs = {limit}. If all of "
                                  f"them are meant: hydra.sweeper.max_jobs={jobs}")
            if limit is not None and jobs >= MANY:
                print(f"{jobs} jobs to compose and check", file=sys.stderr)
            if none := next((axis for axis in of.values() if not count(axis)), None):
                raise ConfigError(f"{none.input_line}: it has no value, so no job is left.")
            return grid(of)
    except HydraException as error:
        raise ConfigError(explain(error, overrides)) from None


def search_axes(overrides: Sequence[str], params: Mapping[str, str]) -> dict[str, Override]:
    """The overrides of a search by key. A preset's parameters count where the command line names none. Raises
    ConfigError: an override that cannot be parsed, or nothing to search."""
    own = any(is_sweep(o) for o in overrides)
    prepare_hydra()
    try:
        with session(str(conf_dir())):
            found = axes([*([] if own else [f"{k}={v}" for k, v in params.items()]), *overrides], intervals=True)
            if not any(axis.is_sweep_override() for axis in found.values()):
                raise ConfigError("a search without anything to choose; expected e.g. 'method.threshold="
                                  "interval(0.6,0.99)', or a choice: merge_rule=top_layer,mean")
            return found
    except HydraException as error:
        raise ConfigError(explain(error, overrides)) from None


def fields_of_swept_groups(overrides: Sequence[str], search: Sequence[str] = ()) -> list[str]:
    """Let `method=a,b method.merge=true` set a field of the members that are swept, not of the default member.

    Hydra composes a multirun's own config without what is swept, and would look for the field in the default member.
    A value written as a choice of one is swept too: it reaches every job and nothing else.
    `search`: the override of the search path that a command's options stand for.
    """
    swept = {o.partition("=")[0] for o in overrides if is_sweep(o)}
    if preset := [o for o in overrides if o.startswith("sweep=")]:
        search = [*search, *(o for o in overrides if o.startswith(SEARCH))]
        swept |= set(compose_raw([*preset, *search], with_hydra=True).hydra.sweeper.get("params") or ())
    out = []
    for o in overrides:
        key, equals, value = o.partition("=")
        field_of_one = key.partition(".")[0] in swept & set(GROUPS) and "." in key and equals and not is_sweep(o)
        out.append(f"{key}=choice({value})" if field_of_one else o)
    return out


def pool_workers(cfgs: Sequence[RunConfig], workers: int | None, threads: int | None) -> list[Worker]:
    """The workers for these jobs; null is as many as the machine takes (see `make_workers`).

    GPUs are dealt out one per job where any job may use one, or as many as work together in a job, and none asks for
    GPUs by number or spreads a model over several: it would not find them.
    """
    devices = {cfg.model.device or cfg.runtime.device for cfg in cfgs}
    own = any(device.startswith("cuda:") for device in devices) or any(cfg.model.device_map for cfg in cfgs)
    gpus = visible_gpus() if devices & {"auto", "cuda"} and not own else []
    ranks = max((max(cfg.recovery.ranks(), cfg.evaluation.processes) for cfg in cfgs), default=1)
    gpus = [",".join(gpus[i : i + ranks]) for i in range(0, len(gpus) - ranks + 1, ranks)] or gpus
    sizes = [cfg.model.weights_bytes() for cfg in cfgs]  # null: not known before the weights are fetched
    largest = None if None in sizes else max(size for size in sizes if size is not None)
    return make_workers(workers, threads, gpus, len(cfgs), largest)
