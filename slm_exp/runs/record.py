"""A run on disk: its record, the truth that every table and report is built from, and the folder it describes."""

from __future__ import annotations

import logging
import platform
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

from slm_exp.core.cache.code import PACKAGE, package_digest
from slm_exp.core.cache.store import library_versions
from slm_exp.core.errors import ConfigError, PlanError, SlmError, StageError
from slm_exp.core.files import JsonObject, digest, probing, read_json, read_text, write_json
from slm_exp.core.format import override, printable
from slm_exp.core.secrets import masked
from slm_exp.core.types import LayerSimilarity, MergePlan
from slm_exp.core.version import __version__
from slm_exp.runs.files import CHECKPOINT, Problem, problems
from slm_exp.runs.schema import Record
from slm_exp.runs.state import DAMAGED, DIED, FAILED, FINISHED, RUNNING, in_use

log = logging.getLogger(__name__)

FILE = "record.json"
VERSIONED = ("torch", "transformers", "lm_eval", "datasets", "peft", "wandb", "hydra-core", "omegaconf", "numpy")
DECISIVE = ("slm_exp", "torch", "transformers", "lm_eval")
"""Versions that a finished record is compared by; others change no number that is known of."""
STATUSES = (RUNNING, FAILED, FINISHED)
"""What a record says of itself; the other states follow from it and the folder."""


def no_run(folder: Path) -> str:
    """What a folder without a record is, where one of a run was wanted, and what to give in its place."""
    if not folder.exists():
        return f"there is no {folder}; give the folder of a run, e.g. outputs/<run_id>."
    if not folder.is_dir():
        return f"{folder} is a file; give the folder of a run" + (f": {folder.parent}." if folder.name == FILE else ".")
    if inside := sorted(path.parent for path in folder.glob(f"*/{FILE}")):
        return f"{folder} is no run, there are {len(inside)} in it; give one: {inside[0]}."
    return f"{folder} holds no {FILE}; give the folder of a run, e.g. outputs/<run_id>."


@dataclass(eq=False)
class Run:
    """One run, read once."""

    folder: Path
    record: Record
    verify: bool = False
    """Check the digests of large files too."""
    on_disk: bool = True
    """False for the record of a run that goes on, which cannot be checked yet."""
    unreadable: list[Problem] = field(default_factory=list)
    """Files that could not be read when they were wanted."""

    @classmethod
    def read(cls, folder: Path, verify: bool = False) -> Self:
        """The run in a folder.

        Raises:
            SlmError: there is no record, or it cannot be read, or is another document: of every version, a record has
                a run_id and one of STATUSES.
        """
        path = folder / FILE
        try:
            record = Record.of(read_json(path))
            if not record.run_id or record.status not in STATUSES:
                has = printable(f"run_id = {record.run_id!r}, status = {record.status!r}"[:200])
                raise ValueError(f"it is no run's record ({has}; expected one of {', '.join(STATUSES)})")
            return cls(folder, record, verify)
        except (FileNotFoundError, NotADirectoryError):
            raise SlmError(no_run(folder)) from None
        except (OSError, ValueError) as error:
            raise SlmError(f"{path} cannot be read: {str(error).rstrip('.')}. Run the experiment again.") from None

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        """In what record and files differ from what was written; small files are read."""
        record = self.record
        if not self.on_disk:
            return ()
        wrong = ""
        if record.digest is None and record.files:
            wrong = "lists files and has no digest of its own"
        elif record.digest is not None and record.digest != record_digest(record.raw):
            wrong = "was changed after it was written: its digest is not that of its contents"
        own = [Problem(FILE, wrong)] if wrong else []
        return (*own, *problems(self.folder, record.files, self.verify))

    @property
    def unverified(self) -> bool:
        """Whether a finished run is of a version whose records list no files, so that nothing can be checked."""
        record = self.record
        return self.on_disk and record.status == FINISHED and record.digest is None and not record.files

    @cached_property
    def state(self) -> str:
        """One of STATES. A run whose record says running, and whose folder no process holds, has died."""
        if self.record.status == FINISHED:
            return DAMAGED if self.problems else FINISHED
        if self.record.status == FAILED:
            return FAILED
        return RUNNING if in_use(self.folder) else DIED

    @property
    def damage(self) -> str:
        """What differs, and the command that computes it again; empty where nothing does."""
        return f"{'; '.join(map(str, self.problems))}. Computed again by: {self.again}" if self.problems else ""

    @property
    def again(self) -> str:
        """The command that computes what is missing here."""
        if (self.folder.parent / "sweep.json").is_file():
            return f"slm sweep resume {shlex.quote(str(self.folder.parent))}"
        where = override("hydra.run.dir", self.folder)
        return printable(shlex.join(["python", "-m", "slm_exp", *self.record.words, where]))

    @cached_property
    def plan(self) -> MergePlan | None:
        """What was decided; None where nothing was, or by a version that wrote other fields."""
        if not self.record.plan:
            return None
        try:
            return MergePlan.from_json(self.record.raw["plan"])
        except (PlanError, TypeError, ValueError, KeyError, AttributeError) as error:
            self.unreadable.append(Problem(f"{FILE} plan", f"cannot be read ({error})"))
            return None

    @cached_property
    def similarity(self) -> LayerSimilarity | None:
        """The layer similarity matrix; None where there is none, or a damaged one."""
        path = self.folder / "similarity.npz"
        if not path.exists():  # a run that stopped before
            return None
        try:
            loaded = LayerSimilarity.load(self.folder)
            shape = loaded.matrix_LL.shape
            if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
                raise ValueError(f"a matrix of shape {shape}")
            return loaded
        except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds, MemoryError among them
            self.unreadable.append(Problem(path.name, f"cannot be read ({type(error).__name__}: {error})"))
            return None

    @property
    def config_yaml(self) -> str | None:
        """config.yaml; None where it cannot be read."""
        try:
            return read_text(self.folder / "config.yaml")
        except (OSError, ValueError):
            return None

    def samples(self, which: str, task: str) -> Path:
        """The file of one model's answers to a task, document by document."""
        return self.folder / "samples" / which / f"{task}.jsonl.gz"

    def is_result_of(self, run_id: str, with_model: bool = False) -> bool:
        """Whether this is the finished result of a run of this package version, whole (and with its checkpoint)."""
        return (self.state == FINISHED and self.record.run_id == run_id
                and self.record.versions.get("slm_exp") == __version__
                and (not with_model or (self.folder / CHECKPOINT / "config.json").is_file()))

    def made_otherwise(self) -> str:
        """How code and versions that made it differ from those here: `torch 2.12.0 (here 2.13.0)`; else empty."""
        here = versions()
        out = [f"{name} {made} (here {here[name]})" for name in DECISIVE
               if (made := self.record.versions.get(name)) != here[name] and name in self.record.versions]
        if self.record.code is not None and self.record.code != package_digest():
            out.append(f"source {self.record.code[:8]} (here {package_digest()[:8]})")
        return ", ".join(out)


def read_run(folder: Path, verify: bool = False) -> Run | None:
    """The run in a folder; None where there is none or its record cannot be read."""
    try:
        return Run.read(folder, verify)
    except SlmError:
        return None


def record_beside(plan: Path) -> Record:
    """The record of the run that a plan.json, or a folder with one, is of; an empty one where there is none.

    Raises:
        SlmError: it cannot be read, so that nobody knows what was done besides the plan.
    """
    folder = plan if plan.is_dir() else plan.parent
    return Run.read(folder).record if (folder / FILE).exists() else Record()


def finished_run(folder: Path, run_id: str, with_model: bool = False, exact: bool = False) -> Run | None:
    """The finished, whole result of a run in its folder; None where it has to be computed. Says why it does not count.

    Args:
        exact: also the source, and the versions of torch, transformers and lm-eval, must be those here
            (`cache.accept=exact`); else a difference is said in one line.
    """
    run = read_run(folder)
    if run and run.state == DAMAGED:
        log.warning("the result in %s is damaged and is computed again: %s", folder,
                    printable("; ".join(map(str, run.problems))))
    if run is None or not run.is_result_of(run_id, with_model):
        return None
    other = run.made_otherwise() or ("the record of an older version does not say" if exact and run.unverified else "")
    if other and exact:
        log.warning("the result in %s was made by other code and is computed again: %s", folder, other)
        return None
    if other:
        log.warning("the result in %s was made by other code: %s. cache.accept=exact computes it again.", folder, other)
    return run


def is_finished(folder: Path, run_id: str, with_model: bool = False) -> bool:
    """Whether this folder holds the whole, finished result of this run (and its checkpoint), by this version."""
    run = read_run(folder)
    return run is not None and run.is_result_of(run_id, with_model)


def record_digest(record: JsonObject) -> str:
    """Of a record without its `digest`, 16 hex digits."""
    return digest({key: value for key, value in record.items() if key != "digest"})


def write_record(folder: Path, record: JsonObject) -> None:
    """Put a record on disk, atomically, with the digest of itself."""
    record["digest"] = record_digest(record)
    write_json(folder / FILE, record)


def say_unverified(runs: Iterable[Run]) -> str | None:
    """One line about finished runs of which nothing can be checked; None where there are none."""
    if not (count := sum(run.unverified for run in runs)):
        return None
    some, they = ("run", "record lists") if count == 1 else ("runs", "records list")
    return f"Unverified: {count} {some} of an older version, whose {they} neither files nor digests."


def failure(error: BaseException) -> dict[str, str | None]:
    """The record's `error` of a run that this ended: the cause, without secrets, and the stage it happened in."""
    stage = error.stage if isinstance(error, StageError) else None
    cause = error.__cause__ if stage and error.__cause__ else error
    for line in getattr(error, "__notes__", []):
        stage = line.removeprefix("stage: ") if line.startswith("stage: ") else stage
    return {"type": type(cause).__name__, "message": masked(str(cause)), "stage": stage}


def versions() -> dict[str, str | None]:
    """The record's `versions`."""
    return {"slm_exp": __version__, "python": platform.python_version(), **library_versions(VERSIONED)}


def git_state() -> dict[str, str | bool] | None:
    """Commit and cleanliness of the checkout this package runs from; None when installed elsewhere."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(PACKAGE), *args], capture_output=True, text=True, check=True,
                              timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != PACKAGE.parent:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def check_writable(folder: Path, setting: str = "hydra.run.dir / hydra.sweep.dir", remedy: str = (
        "Choose another with hydra.run.dir=FOLDER (single run) or hydra.sweep.dir=FOLDER (multirun).")) -> None:
    """Refuse an output folder that cannot be created or written, before anything loads.

    Raises:
        ConfigError: naming the folder and the reason.
    """
    try:
        with probing(folder):
            pass
    except OSError as error:
        raise ConfigError(f"{setting} = {folder}; expected a folder that can be written ({error.strerror}). {remedy}"
                          ) from None
