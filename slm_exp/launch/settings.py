"""Settings of the launcher and the sweeper that this package brings, as `hydra.launcher.*` and `hydra.sweeper.*`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slm_exp.core.errors import ConfigError, require
from slm_exp.launch.hydra_compat import store


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
class SlurmConf:
    """Settings of `hydra/launcher=slurm`. See docs/sweeps.md."""

    _target_: str = "hydra_plugins.slm_exp.SlurmLauncher"
    detach: bool = False
    """Submit and end; `slm sweep status`, `resume` and `rerun` ask the queue at any later time."""
    workers: int | None = None
    """null: a job array with a task per cell. N: one job that runs N cells at a time on its node, each on one of the
    GPUs it got."""
    threads: int | None = None
    """CPU threads per cell; null is cpus_per_task, shared out among the workers."""
    retries: int = 2
    """With workers: see `ProcessesConf`."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int = 2
    """Of the job, or of each task of the array."""
    gpus_per_node: int | None = None
    """The same."""
    mem_gb: int = 8
    """The same. SmolLM2 needs 4 a cell; a 7B model in bfloat16 about 40."""
    timeout_min: int = 240
    signal_delay_s: int = 120
    """So long before its time limit a job goes back to the queue; what is done comes from the cache."""
    max_num_timeout: int = 3
    """How often."""
    array_parallelism: int = 64
    """Tasks of an array at a time."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the program starts (module load ...); from a command line only."""
    additional_parameters: dict[str, str] = field(default_factory=dict)
    """Any other option of sbatch by name, {nodelist: n1}; from a command line only."""


@dataclass
class SearchConf:
    """Settings of a search (`sweep=search`), as `hydra.sweeper.search.*`."""

    minimize: list[str] = field(default_factory=lambda: ["perplexity", "parameters"])
    """Numbers of a run: perplexity (times the dense model's, over all texts), parameters, average, score, or a place in
    its record.json such as eval.compressed.perplexity.news. One or two, with `maximize`."""
    maximize: list[str] = field(default_factory=list)
    n_trials: int = 30
    """Of the whole search: a larger number lets it go on. `hydra.sweeper.max_batch_size` of them (null: 1) run at a
    time, chosen by what those before came to."""
    seed: int = 0
    """Of the sampler."""
    screen: dict[str, str] = field(default_factory=lambda: {"recovery": "none", "evaluation": "none"})
    """What a trial is run with first, if trials are pruned."""
    prune: int | None = None
    """A trial is measured in full unless so many earlier ones beat it by what the first run told: an objective where it
    has it, the plan's final score in place of others. null measures every trial."""


@dataclass
class GridConf:
    """Settings of `hydra/sweeper=grid`."""

    _target_: str = "hydra_plugins.slm_exp.GridSweeper"
    params: dict[str, str] | None = None
    """Swept values by key, as a `sweep=` preset gives them."""
    max_jobs: int = 1000
    """A larger grid is refused before anything is composed."""
    max_batch_size: int | None = None
    """Jobs per call of the launcher; null hands over all at once."""
    select: str | None = None
    """null: the command's jobs. missing, failed or all: those of the folder's sweep.json (`slm sweep`)."""
    search: SearchConf | None = None
    """Choose jobs by what earlier ones came to, where it is set; every combination otherwise."""


POSITIVE = {"workers", "threads", "gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min", "array_parallelism"}
COUNTS = {"retries", "signal_delay_s", "max_num_timeout"}


def check_launcher(launcher: Mapping[str, Any], sweeper: Mapping[str, Any]) -> None:
    """Refuse what the launchers of this package cannot work with, before anything starts. Raises ConfigError: names the
    field; or there is no sbatch."""
    if launcher["_target_"] not in (ProcessesConf._target_, SlurmConf._target_):
        return
    for name in (POSITIVE | COUNTS) & {*launcher}:
        value, least = launcher[name], 1 if name in POSITIVE else 0
        require(value is None or value >= least, f"hydra.launcher.{name}", value, f"null or a number >= {least}")
    if launcher["_target_"] != SlurmConf._target_:
        return
    if sweeper["_target_"] != GridConf._target_:
        raise ConfigError("hydra/launcher=slurm works with hydra/sweeper=grid, which knows what is in the queue; leave "
                          "hydra/sweeper out.")
    if sweeper["search"] is not None:
        raise ConfigError("hydra/launcher=slurm submits all cells at once, and sweep=search chooses each by those "
                          "before it. Run it inside one allocation with hydra/launcher=processes.")
    if not shutil.which("sbatch"):
        raise ConfigError("hydra/launcher=slurm: there is no sbatch on PATH. Start it on a login node of the cluster; "
                          "slm plan --commands prints the cells for any other scheduler.")


def register_settings() -> None:
    """Make them known to Hydra. Idempotent."""
    store("hydra/launcher", "processes", ProcessesConf)
    store("hydra/launcher", "slurm", SlurmConf)
    store("hydra/sweeper", "grid", GridConf)
