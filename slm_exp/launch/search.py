"""`sweep=search`: the next cells of a sweep are chosen by what the finished ones came to (Optuna's TPE).

The folder is a sweep's like any other, with the search's memory (`search.db`) in it: the same command, or `slm sweep
resume`, goes on where a kill left it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from slm_exp.core.errors import ConfigError
from slm_exp.core.format import override
from slm_exp.core.plugins import Plugin
from slm_exp.launch.hydra_compat import axis_of, register_plugin, words
from slm_exp.launch.jobs import JobComposer, search_axes
from slm_exp.launch.objectives import number_of
from slm_exp.launch.plugins import GridSweeper, ProcessLauncher, finished
from slm_exp.launch.settings import GridConf, ProcessesConf, SlurmConf
from slm_exp.launch.slurm import OF_THIS_CALL, SlurmLauncher
from slm_exp.runs.record import Run
from slm_exp.runs.sweep import FINISHED, Job, SweepFolder, read_cell

if TYPE_CHECKING:
    from slm_exp.launch.study import Study, Tried

SCREENED = "screened"
"""The folder of first runs, a sweep in the sweep's own."""


def register_plugins() -> None:
    """Make the launchers and the sweeper known to Hydra. Idempotent."""
    register_plugin(ProcessesConf._target_, ProcessLauncher)
    register_plugin(SlurmConf._target_, SlurmLauncher)
    register_plugin(GridConf._target_, SearchSweeper)


class SearchSweeper(GridSweeper):
    """As the grid's in everything but where its jobs come from."""

    def __init__(self, search: DictConfig | None = None, **of_the_grid: Any) -> None:
        super().__init__(**of_the_grid)
        self.search = search
        if search is not None:
            self.minimize = {name: name in search.minimize for name in (*search.minimize, *search.maximize)}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if self.search is None:
            return
        first = copy.deepcopy(config)
        with read_write(first), open_dict(first):
            first.hydra.sweep.dir = str(self.path / SCREENED)
            first.hydra.overrides.hydra.append(override("hydra.sweep.dir", self.path / SCREENED))
        self._first_settings = first.hydra
        self._first: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=first)

    def _sweep(self, sweep: SweepFolder, arguments: list[str]) -> int:
        if (search := self.search) is None or self.select in ("failed", "all"):  # known cells again; none is chosen
            return super()._sweep(sweep, arguments)
        from slm_exp.launch.study import Study

        hydra = [o for o in words(self._config.hydra.overrides.hydra) if not o.startswith(OF_THIS_CALL)]
        found = search_axes(arguments, self.params)
        axes = {key: axis_of(axis) for key, axis in found.items() if axis.is_sweep_override()}
        self._fixed = [f"{key}={axis.get_value_element_as_str()}" for key, axis in found.items() if key not in axes]
        about = {"minimize": list(search.minimize), "maximize": list(search.maximize),
                 "over": {key: str(axis.input_line).partition("=")[2] for key, axis in found.items() if key in axes}}
        study = Study(self.path, axes, self.minimize, about, search.seed)
        self._cells = JobComposer(self._config.hydra, self.path)
        self._plugins: list[Plugin] = []
        jobs = {job.run_id: job for job in map(self._job, study.every())}
        before, reasons, status = {run_id: read_cell(job) for run_id, job in jobs.items()}, dict[str, str](), 0
        waiting = study.unfinished()
        if jobs:
            print(f"{len(study)} of {search.n_trials} trials are chosen in {self.path}, {study.pruned} of them pruned, "
                  f"{len(finished(before))} finished")
        while not status and (batch := self._next(study, waiting, search.n_trials)):
            if search.prune:
                batch, status = self._screened(study, batch, search, reasons)
            made = {tried: self._job(tried) for tried in batch}
            jobs |= {job.run_id: job for job in made.values()}
            before = {job.run_id: read_cell(job) for job in made.values()} | before
            sweep.define([*arguments, *hydra] if self.select is None else SweepFolder.read(self.path).argv,
                         jobs.values(), self._plugins)
            todo = {j.run_id: j for j in made.values() if read_cell(j).state != FINISHED}
            status = status or self._launch(list(todo.values()), reasons)
            for tried, job in made.items():
                if read_cell(job).state == FINISHED:
                    study.tell(tried, self._values(job))
        wrong = self._end(sweep, before, reasons) if jobs else 0
        self._say(study)
        return status or wrong

    def _next(self, study: Study, waiting: list[Tried], n_trials: int) -> list[Tried]:
        """The next batch: what an earlier call chose and did not finish, then new trials."""
        batch = [waiting.pop(0) for _ in range(min(self.max_batch_size or 1, len(waiting)))]
        while len(batch) < (self.max_batch_size or 1) and len(study) < n_trials:
            batch.append(study.ask())
        return batch

    def _job(self, tried: Tried) -> Job:
        job, cfg = self._cells.job([*self._fixed, *tried.overrides])
        self._plugins += cfg.plugins
        return job

    def _screened(self, study: Study, batch: Sequence[Tried], search: DictConfig,
                  reasons: dict[str, str]) -> tuple[list[Tried], int]:
        """Those of a batch that are worth measuring, by a first run of each; and the launcher's status."""
        composer = JobComposer(self._first_settings, self.path / SCREENED)
        changed = [f"{key}={value}" for key, value in search.screen.items()]
        gone = tuple(end for key in search.screen for end in (f"{key}=", f"{key}."))
        kept_of = {tried: [o for o in (*self._fixed, *tried.overrides) if not o.lstrip("+").startswith(gone)]
                   for tried in batch}
        made = {tried: composer.job([*kept, *changed])[0] for tried, kept in kept_of.items()}
        SweepFolder(self.path / SCREENED).define([], made.values())
        todo = {job.run_id: job for job in made.values() if read_cell(job).state != FINISHED}
        if status := self._launch(list(todo.values()), reasons, self._first):
            return [], status
        worth = []
        for tried, job in made.items():
            if read_cell(job).state != FINISHED:  # the whole run will say why
                worth.append(tried)
            elif (by := study.beaten(tried, self._cheap(job))) >= search.prune:
                study.prune(tried)
                print(f"pruned   {' '.join(tried.overrides)}: {by} earlier trials beat it before any evaluation")
            else:
                worth.append(tried)
        return worth, 0

    def _values(self, job: Job) -> list[float]:
        """The objectives of a finished run. Raises ConfigError: it has no such number."""
        run = Run.read(job.folder)
        out = []
        for name in self.minimize:
            if (value := number_of(run, name)) is None:
                raise ConfigError(f"{name} is to be searched by, and {job.folder / 'record.json'} has no such number. "
                                  "Measure it (evaluation=...), or name another in hydra.sweeper.search.")
            out.append(value)
        return out

    def _cheap(self, job: Job) -> list[float]:
        """What a first run tells of every objective, less being better: the objective, or the plan's final score."""
        run, out = Run.read(job.folder), []
        for name, less in self.minimize.items():
            value, score = number_of(run, name), run.record.plan.final_score
            more = score if value is None else value
            out.append(math.inf if more is None else more if less and value is not None else -more)
        return out

    def _say(self, study: Study) -> None:
        front = study.front()
        if not front:
            return
        print(f"{len(study)} trials, {study.pruned} pruned; "
              + ("none beats these in both:" if len(self.minimize) > 1 else "the best:"))
        for tried, values in front:
            numbers = ", ".join(f"{name} {value:,.0f}" if value >= 1e4 else f"{name} {value:.4g}"
                                for name, value in values.items())
            print(f"  {self._job(tried).run_id}  {' '.join(tried.overrides)}: {numbers}")
