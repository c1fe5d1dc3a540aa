"""Settings of the launcher and the sweeper that this package brings, as `hydra.launcher.*` and `hydra.sweeper.*`."""

from __future__ import annotations

from dataclasses import dataclass

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


def register_settings() -> None:
    """Make both known to Hydra. Idempotent."""
    store("hydra/launcher", "processes", ProcessesConf)
    store("hydra/sweeper", "grid", GridConf)
