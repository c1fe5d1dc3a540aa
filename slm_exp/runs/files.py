"""The files that are a run's result: listed in its record with size and digest, and checked against that list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from slm_exp.core.files import sha256
from slm_exp.core.types import FITTED
from slm_exp.runs.schema import ResultFile

RESULT = ("plan.json", FITTED, "similarity.npz", "calibration_tokens.npy", "config.yaml", "samples")
"""Besides the checkpoint. Pages, figures, logs and trackers' folders are derived from these or beside the result."""
CHECKPOINT = "model"
SMALL = 1_000_000
"""Bytes below which a file's digest is always checked."""


class Problem(NamedTuple):
    """One way in which a folder is not what its record says."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


def result_files(folder: Path, with_model: bool) -> dict[str, dict[str, int | str]]:
    """name -> {bytes, sha256} of the files of the result. Cost: all of them are read."""
    parts = [folder / name for name in (*RESULT, *([CHECKPOINT] if with_model else []))]
    files = sorted(path for part in parts for path in ([part] if part.is_file() else part.rglob("*"))
                   if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in files}


def problems(folder: Path, files: Mapping[str, ResultFile], verify: bool = False) -> Iterator[Problem]:
    """What is wrong with listed files: sizes are checked, digests of small files, and with `verify` all digests.

    A checkpoint that was removed as a whole is none: nothing that is read from the run depends on it.
    """
    gone = not (folder / CHECKPOINT).exists()
    for name, about in files.items():
        at = PurePosixPath(name)
        if at.is_absolute() or ".." in at.parts or not at.parts:
            yield Problem("record.json", f"lists {name!r}, which is no file of the run's folder")
            continue
        if gone and at.parts[0] == CHECKPOINT:
            continue
        path = folder / name
        try:
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                yield Problem(name, "is missing")
            elif size != about.bytes:
                yield Problem(name, f"has {size:,} bytes, not {about.bytes:,}")
            elif (verify or size < SMALL) and sha256(path) != about.sha256:
                yield Problem(name, "has other contents than were written")
        except OSError as error:
            yield Problem(name, f"cannot be read ({error.strerror})")
