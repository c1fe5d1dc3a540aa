"""Weights & Biases: one W&B run per experiment, complete on disk at every moment, offline by default."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slm_exp.core.errors import ConfigError, require_one_of
from slm_exp.core.files import JsonObject
from slm_exp.core.registry import register
from slm_exp.runs.tracking.base import PROJECT, RunTracker, Tracker, Tracking, flat, mirrored, provenance

log = logging.getLogger(__name__)

MODES = ("online", "offline", "disabled")
ALIASES = {"run": "online", "dryrun": "offline"}  # older spellings that WANDB_MODE still knows
REMEDIES = {
    "online": "Log in with `wandb login`, or use tracking.mode=offline (`slm sync` sends it later) or tracking=none.",
    "offline": "Use tracking=none to do without W&B.",
}


@register("tracking", "wandb")
@dataclass
class WandbTracking(Tracking):
    """Mirrors the record to W&B: config, metrics by record path, the heatmap, the plan and its trace.

    The run's id is the run_id, so a repeated cell never becomes a second run. Under a W&B agent, which assigns
    ids and the project, its id is kept and run_id is a config key.
    """

    seconds: ClassVar[float] = 3.0

    project: str | None = None
    """W&B project; null is WANDB_PROJECT, else slm_exp. Under an agent the sweep's own is used."""
    entity: str | None = None
    """W&B user or team; null is WANDB_ENTITY, else your default."""
    mode: str | None = None
    """online, offline or disabled; null follows WANDB_MODE, else online under a W&B agent, else offline."""

    def check(self) -> None:
        if self.mode is not None:
            require_one_of("tracking.mode", self.mode, MODES)

    def in_force(self) -> list[str]:
        mode = self.resolved_mode()
        return [f"tracking.mode: {mode}" + ", slm sync sends it later" * (mode == "offline")] * (self.mode is None)

    def resolved_mode(self) -> str:
        """The mode after the environment had its say. Raises ConfigError: WANDB_MODE holds something else."""
        if self.mode is not None:
            return self.mode
        requested = os.environ.get("WANDB_MODE") or ("online" if under_agent() else "offline")
        mode = ALIASES.get(requested, requested)
        require_one_of("WANDB_MODE", mode, MODES)
        return mode

    @contextlib.contextmanager
    def session(self, record: JsonObject, folder: Path) -> Iterator[Tracker]:
        with _wandb_files_in(folder.resolve() / "wandb"), super().session(record, folder) as tracker:
            yield tracker

    def opened(self, record: JsonObject, folder: Path) -> Tracker:
        """Raises ConfigError: wandb is not installed, or cannot start (no key, no network, no right to write)."""
        mode = self.resolved_mode()
        if mode == "disabled":
            return Tracker()
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"tracking = wandb; the package cannot be imported ({error}). pip install wandb, or use "
                              "tracking=none.") from None
        folder.mkdir(parents=True, exist_ok=True)
        project = self.project or os.environ.get("WANDB_PROJECT") or PROJECT
        ours = {} if under_agent() else {"id": record["run_id"], "project": project, "entity": self.entity}
        config = provenance(record)
        try:
            run = wandb.init(
                **ours, group=self.group or record.get("group"), name=self.display_name(record),
                tags=self.tags, mode=mode, dir=folder, config=config,  # type: ignore[arg-type]
                reinit="finish_previous",  # else a second run in one process would be handed the first one
                settings=wandb.Settings(
                    x_transaction_log_flush_interval=1,  # 15 by default: a kill would lose config and first stages
                    init_timeout=60, silent=True,
                    console="off",  # run.log in the folder has the output
                    disable_git=True, disable_code=True))  # the record's own git state is in the config
        except Exception as error:
            words = " ".join(str(error).split()) or type(error).__name__
            reason = words.partition(" Consider increasing")[0].rstrip(".")
            raise ConfigError(f"tracking.mode = {mode}; W&B cannot start a run: {reason}. {REMEDIES[mode]}") from error
        where = run.url if mode == "online" else f"{Path(run.dir).parent} (slm sync {folder} sends it)"
        log.info("W&B run %s: %s", run.id, where)
        return _WandbTracker("W&B", wandb, run)


class _WandbTracker(RunTracker):
    """Mirrors to one open W&B run."""

    def log(self, section: JsonObject) -> None:
        """One history row of the numbers (they enter the summary too); text and flags go to the summary alone."""
        scalars = flat(section)
        texts = {k: v for k, v in scalars.items() if isinstance(v, (str, bool))}
        if numbers := {k: v for k, v in scalars.items() if k not in texts}:
            mirrored(self.called, lambda: self._run.log(numbers))
        if texts:
            mirrored(self.called, lambda: self._run.summary.update(texts))

    def close(self, failed: bool) -> None:
        """Finish the run; offline, come back only when the last record is on disk."""
        mirrored(self.called, lambda: self._run.finish(exit_code=int(failed)))
        if self._run.settings.mode == "offline":  # finish() returns while the log is still in wandb-core's buffer
            mirrored(self.called, self._library.teardown)


def under_agent() -> bool:
    """Whether a W&B agent started this process: it assigns run id, project and entity."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


@contextlib.contextmanager
def _wandb_files_in(folder: Path) -> Iterator[None]:
    """Point W&B's staging, cache and artifact folders into the run's folder, except where the user chose others."""
    wanted = {f"WANDB_{kind.upper()}_DIR": str(folder / kind) for kind in ("data", "cache", "artifact")}
    ours = {name: path for name, path in wanted.items() if not os.environ.get(name)}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
