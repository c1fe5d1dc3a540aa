"""Settings of the launcher and the sweeper that this package brings, as `hydra.launcher.*` and `hydra.sweeper.*`."""

from __future__ import annotations

from dataclasses import dataclass, field

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


def register_settings() -> None:
    """Make both known to Hydra. Idempotent."""
    store("hydra/launcher", "processes", ProcessesConf)
    store("hydra/sweeper", "grid", GridConf)
