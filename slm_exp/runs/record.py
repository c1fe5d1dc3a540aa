"""The record of a run: the truth that every table and report is built from, on disk at every moment."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_exp import __version__
from slm_exp.core.errors import ConfigError, SlmError

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)

VERSIONED = ("torch", "transformers", "lm_eval", "datasets", "peft", "wandb", "hydra-core", "omegaconf", "numpy")


SECTIONS = ("config", "versions", "git", "error", "eval", "model", "calibration", "plan", "layers", "params",
            "recovery", "speed")
"""Parts of a record that are objects wherever they stand; a file in which one is not is no record."""
SIDES = ("tasks", "perplexity", "protocol")
"""The same of what was measured on each model."""


def load_record(folder: Path) -> dict[str, Any]:
    """The record in a run's folder.

    Raises:
        SlmError: there is none, or it cannot be read.
    """
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SlmError(f"{folder} holds no record.json; give the folder of a run, e.g. outputs/<run_id>.") from None
    except (OSError, ValueError) as error:
        raise SlmError(f"{path} cannot be read: {error}. Run the experiment again.") from None
    if not _is_record(record):
        raise SlmError(f"{path} is not a run's record. Run the experiment again.")
    return record


def _is_record(told: Any) -> bool:
    def objects(told: Any, parts: Iterable[str]) -> bool:
        return isinstance(told, dict) and all(isinstance(told.get(part) or {}, dict) for part in parts)

    if not objects(told, SECTIONS):
        return False
    stages = told.get("stages") or []
    sides = (told.get("eval") or {}).values()
    return (isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages)
            and all(objects(side or {}, SIDES) and objects(side.get("tasks") or {}, side.get("tasks") or ())
                    for side in sides if side is not None))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a run's folder; None where there is none or it cannot be read."""
    try:
        return load_record(folder)
    except SlmError:
        return None


def is_finished(folder: Path, run_id: str, with_model: bool = False) -> bool:
    """Whether this folder holds the finished record of this run (and its checkpoint), made by this package version."""
    record = read_record(folder)
    if with_model and not (folder / "model" / "config.json").is_file():
        return False
    return (
        record is not None
        and record.get("status") == "finished"
        and record.get("run_id") == run_id
        and record.get("versions", {}).get("slm_exp") == __version__
    )


def git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of the checkout this package runs from; None when installed elsewhere."""
    here = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=True,
                              timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here.parent:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be created or written, before anything loads.

    Raises:
        ConfigError: naming the folder and the reason.
    """
    probe = folder / f".probe.{os.getpid()}"
    made = [p for p in [folder, *folder.parents] if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
        for path in made:  # leave no trace of the check
            path.rmdir()
    except OSError as error:
        raise ConfigError(
            f"hydra.run.dir / hydra.sweep.dir = {folder}; expected a folder that can be written ({error.strerror}). "
            "Choose another with hydra.run.dir=FOLDER (single run) or hydra.sweep.dir=FOLDER (multirun)."
        ) from None
