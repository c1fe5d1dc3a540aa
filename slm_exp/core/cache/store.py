"""A content-addressed store of stage results, shared by grid cells and safe with several processes.

An entry is a folder `<stage>/<key>/` of plain files (JSON, npy, npz, safetensors; never pickle) with a
`manifest.json` of their sizes and digests. It appears by one rename, so a reader sees a whole entry or none.
The key hashes the stage's inputs, the code that computes it and the library versions; never names or times.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from slm_exp.core.cache import journal
from slm_exp.core.files import digest, file_digest, write_json

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[2]
BUILT = ("core/types.py", "core/widths.py", "models", "merging")
"""What a compressed model is built by: the result of any stage that looks at one depends on it."""
REFIT = ("calibration/fit.py", "engine/ridge.py")
"""What similarity.after=reconstruct scores candidates by."""
CODE = {  # stage -> files and folders of the package that its result depends on
    "model": ("models/smollm2_135m.py",),  # the conversion of the embedded weights
    "calibrate": ("calibration", "core/types.py"),
    "similarity": ("similarity", "kernels", "engine", "models/layouts.py"),
    "plan": (*BUILT, "methods", "search", "engine", "similarity", "kernels", *REFIT, "calibration"),
    "scores": (*BUILT, "search", "engine", "similarity", "kernels", *REFIT),
    "width": (*BUILT, "width", "search", "engine", "similarity", "kernels"),
    "recover": (*BUILT, "recovery", "calibration", "engine"),
    "evaluate": (*BUILT, "evaluation", "engine/fused.py"),
}
LIBRARIES = {"evaluate": ("torch", "transformers", "lm_eval"), "calibrate": ("transformers",),
             "recover": ("torch", "transformers", "peft")}


def default_cache_dir() -> str:
    """`$SLM_EXP_CACHE`, else `$XDG_CACHE_HOME/slm_exp`, else `~/.cache/slm_exp`."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return os.environ.get("SLM_EXP_CACHE") or str(Path(home) / "slm_exp")


class Storable(Protocol):
    """A value that writes itself into a folder and reads itself back."""

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path) -> Self: ...


S = TypeVar("S", bound=Storable)


@cache
def code_version(stage: str) -> str:
    """Digest of the source files a stage depends on: an edit there makes its cached results stale."""
    files: list[Path] = []
    for entry in CODE[stage]:
        path = PACKAGE / entry
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return digest({str(f.relative_to(PACKAGE)): file_digest(f) for f in files})


def library_versions(names: tuple[str, ...] = ("torch", "transformers")) -> dict[str, str | None]:
    """Installed versions, without importing anything."""
    out: dict[str, str | None] = {}
    for name in names:
        try:
            out[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            out[name] = None
    return out


class StageStore:
    """The cache folder. `StageStore(None)` stores nothing and always computes."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def key(self, stage: str, inputs: dict[str, Any]) -> str:
        """Digest of a stage's inputs, code and libraries."""
        return digest({
            "stage": stage, "inputs": inputs, "code": code_version(stage),
            "libraries": library_versions(LIBRARIES.get(stage, ("torch", "transformers"))),
        })

    def cached(self, stage: str, inputs: dict[str, Any], kind: type[S], compute: Callable[[], S]) -> tuple[S, bool]:
        """The stored result for these inputs, or a computed one, stored. Returns (value, whether it was stored).

        Several processes asking for the same entry compute it once: the others wait for the first.
        A damaged entry is reported, removed and computed again. A cache that cannot be written only warns.
        """
        if self.folder is None:
            return compute(), False
        entry = self.folder / stage / self.key(stage, inputs)
        found = self._read(entry, kind)
        if found is not None:
            return found, True
        with self._locked(entry):
            found = self._read(entry, kind)
            if found is not None:
                return found, True
            value = compute()
            try:
                self._write(entry, value, inputs)
            except OSError as error:
                log.warning("could not store %s in the cache: %s. The run goes on.", stage, error)
            return value, False

    def entry_folder(self, stage: str, inputs: dict[str, Any], build: Callable[[Path], None]) -> Path:
        """A stored folder used in place (e.g. converted weights): built once by `build(folder)`.

        Raises:
            OSError: the cache cannot be written; a folder entry has nowhere else to live.
        """
        if self.folder is None:
            raise ValueError("a folder entry needs a cache folder")
        entry = self.folder / stage / self.key(stage, inputs)
        if self._whole(entry):
            with contextlib.suppress(OSError):
                os.utime(entry)  # pruning goes by last use
            return entry
        with self._locked(entry):
            if not self._whole(entry):
                self._build(entry, build, inputs)
        return entry

    def _read(self, entry: Path, kind: type[S]) -> S | None:
        if not self._whole(entry, check_digests=True):
            return None
        try:
            value = kind.load(entry)
        except Exception as error:  # a whole entry of another shape: recompute rather than die
            log.warning("cache entry %s cannot be read (%s); recomputing.", entry, error)
            shutil.rmtree(entry, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(entry)
        return value

    def _write(self, entry: Path, value: Storable, inputs: dict[str, Any]) -> None:
        self._build(entry, value.save, inputs)

    def _build(self, entry: Path, build: Callable[[Path], None], inputs: dict[str, Any]) -> None:
        tmp = entry.with_name(f".{entry.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}.tmp")
        tmp.mkdir(parents=True)
        try:
            build(tmp)
            files = {
                str(f.relative_to(tmp)): {"bytes": f.stat().st_size, "digest": file_digest(f)}
                for f in sorted(tmp.rglob("*")) if f.is_file()
            }
            write_json(tmp / "manifest.json", {"inputs": inputs, "files": files, "created": time.time()})
            if entry.exists():
                shutil.rmtree(entry)
            os.replace(tmp, entry)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)

    @staticmethod
    def problem(entry: Path, check_digests: bool = True) -> str | None:
        """What is wrong with an entry on disk, or None."""
        if (entry / journal.FILE).is_file():
            damaged = journal.read(entry)[1]
            return f"{damaged} lines of {journal.FILE} are damaged" if damaged else None
        try:
            files = json.loads((entry / "manifest.json").read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            return f"manifest unreadable ({type(error).__name__})"
        for name, about in files.items():
            path = entry / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != about["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {about['bytes']}"
            if check_digests and file_digest(path) != about["digest"]:
                return f"{name} has other contents than written"
        return None

    def _whole(self, entry: Path, check_digests: bool = False) -> bool:
        if not entry.is_dir():
            return False
        problem = self.problem(entry, check_digests)
        if problem:
            log.warning("cache entry %s is damaged (%s); recomputing.", entry, problem)
            shutil.rmtree(entry, ignore_errors=True)
        return problem is None

    @contextlib.contextmanager
    def _locked(self, entry: Path) -> Iterator[None]:
        from filelock import FileLock

        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(entry.with_name(f".{entry.name}.lock"))
            lock.acquire()
        except OSError as error:
            log.warning("cache %s cannot be written: %s", self.folder, error)
            yield
            return
        try:
            yield
        finally:
            lock.release()
